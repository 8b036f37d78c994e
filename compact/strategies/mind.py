"""MIND: a small Teaching Assistant learns to foresee which rationales this student can use (method §4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from compact.config import CompactConfig
from compact.errors import UserError
from compact.strategies.base import Context, Strategy
from compact_kernels import Ragged, Statistics
from compact_kernels.rule import question_of_sequence, question_softmax, segment_sum


class TeachingAssistant(nn.Module):
    """MetaNet: a feature a path → MLP → self-attention across a question's paths → a score a path in (0, 1).

    Args:
        features: F. width: of the MLP and of attention. heads: of attention; 0: each path is scored alone.
    """

    def __init__(self, features: int, width: int, heads: int) -> None:
        super().__init__()
        # A student's hidden states have a few huge coordinates: without the norm they would be all that is seen.
        self.encode = nn.Sequential(
            nn.LayerNorm(features), nn.Linear(features, width), nn.GELU(), nn.Linear(width, width)
        )
        self.across = nn.MultiheadAttention(width, heads, batch_first=True) if heads else None
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)

    def forward(self, features: Tensor, ragged: Ragged) -> Tensor:
        """(S, F) → (S,) scores; a question's paths see each other and nobody else, whatever their number."""
        path = self.encode(features)  # (S, W)
        if self.across is not None:
            question, slot = _slots(ragged)
            shape = (ragged.num_questions, ragged.sizes.most_rationales)
            padded = path.new_zeros(*shape, path.shape[1]).index_put((question, slot), path)  # (Q, K, W)
            absent = torch.ones(shape, dtype=torch.bool, device=path.device).index_put(
                (question, slot), torch.zeros_like(slot, dtype=torch.bool)
            )
            seen, _ = self.across(padded, padded, padded, key_padding_mask=absent, need_weights=False)
            path = path + seen[question, slot]
        return self.score(self.norm(path)).squeeze(1).sigmoid()


class Mind(Strategy):
    """α = softmax of s/τ_student over the paths whose score s is at least β times the question's best.

    The assistant learns from L_meta = KL(π_τ(s) ‖ π_τ(−L_real)) and from nothing else; its inputs and L_real are
    detached. Its gradients are summed over the questions of its window, over all ranks, and divided by their number:
    how a step is split into batches and ranks does not matter.

    What resumes: parameters, optimizer, the window under way, and the averages of ``inertia: ema``.
    """

    divergence = "jsd"

    def __init__(self, config: CompactConfig, teachers: Sequence[str]) -> None:
        super().__init__(config, teachers)
        self.options = config.mind
        self.warmup_epochs = config.mind.warmup
        self.net: TeachingAssistant | None = None  # made when the first batch shows how wide a feature is
        self.optimizer: torch.optim.Optimizer | None = None
        # Gradients end to end, and how many questions they are of: (P + 1,) each.
        self.batch: Tensor | None = None  # this rank's, since the student's last step
        self.window: Tensor | None = None  # all ranks', since the assistant's last step
        self.steps = 0  # the student's in that window
        self.trend: dict[str, float] = {}  # "question\tteacher" → exponential average of L_real
        self.fresh: dict[str, float] = {}  # of this rank since the last step
        self._alike = False  # whether all ranks have been given the first one's parameters
        self._waiting: dict[str, Any] | None = None
        self._scored: tuple[Context, Tensor] | None = None  # α's own scores, for the same batch's L_meta

    # ---- α ----

    @torch.no_grad()
    def given(self, context: Context) -> Tensor:
        with torch.enable_grad():
            scores = self._scores(context)
        self._scored = context, scores
        scores, ragged = scores.detach(), context.ragged
        question = question_of_sequence(ragged)
        best = torch.segment_reduce(scores, "max", offsets=ragged.cu_questions.long(), unsafe=True)
        chosen = scores >= self.options.threshold * best[question]  # I_dyn
        return question_softmax((scores / self.options.student_temperature).where(chosen, -torch.inf), ragged)

    # ---- learning ----

    def observe(self, statistics: Statistics, context: Context, alpha: Tensor) -> None:
        losses = self._real_losses(statistics, context)
        with torch.enable_grad():
            scored, self._scored = self._scored, None
            scores = scored[1] if scored is not None and scored[0] is context else self._scores(context)
            predicted = _log_softmax(scores / self.options.temperature, context.ragged)
            target = question_softmax(-losses / self.options.temperature, context.ragged)
            meta = (predicted.exp() * (predicted - target.clamp_min(1e-30).log())).sum()
            gradients = torch.autograd.grad(meta, self._parameters())
        count = losses.new_tensor([float(context.ragged.num_questions)])
        added = torch.cat([*(gradient.flatten() for gradient in gradients), count])
        self.batch = added if self.batch is None else self.batch + added

    def step(self, learning_rate: float | None = None) -> None:
        if self.batch is None or self.optimizer is None:
            return
        if not self._alike:  # not earlier: a rank may build it alone, to show a question
            for parameter in self._parameters():
                parameter.data = broadcast(parameter.data)
            self._alike = True
        added, self.batch = reduce(self.batch, "sum"), None
        self.window = added if self.window is None else self.window + added
        if self.options.inertia == "ema":
            for part in gather_object([self.fresh]):
                self.trend |= part
            self.fresh = {}
        self.steps += 1
        if learning_rate is not None and self.steps < self.options.accumulation:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.warmup_rate if learning_rate is None else self.options.rate * learning_rate
        parameters = self._parameters()
        mean = self.window[:-1] / self.window[-1].clamp_min(1)
        for parameter, gradient in zip(parameters, mean.split([p.numel() for p in parameters])):
            parameter.grad = gradient.view_as(parameter)
        self.optimizer.step()
        self.window, self.steps = None, 0

    def _real_losses(self, statistics: Statistics, context: Context) -> Tensor:
        """L_real (S,), the mean cross entropy of each path, or its exponential average."""
        ragged = context.ragged
        losses = -segment_sum(statistics.tokens.logprob, ragged.cu_rows)
        losses = losses / statistics.targets_per_rationale.clamp_min(1)
        if self.options.inertia == "optimizer":
            return losses
        counts = ragged.host.cu_questions.diff().tolist()
        owners = [name for name, count in zip(context.question_ids, counts) for _ in range(count)]
        keys = [f"{owner}\t{teacher}" for owner, teacher in zip(owners, context.teachers.tolist())]
        keep = self.options.decay
        averaged = [
            keep * self.trend[key] + (1 - keep) * loss if key in self.trend else loss
            for key, loss in zip(keys, losses.tolist())
        ]
        self.fresh |= dict(zip(keys, averaged))
        return losses.new_tensor(averaged)

    # ---- the network ----

    def _scores(self, context: Context) -> Tensor:
        features = context.pooled
        if self.options.features == "sentence":
            if context.embeddings is None:
                raise UserError("mind.features is sentence, and the batch has no embeddings: set consensus.encoder")
            features = context.embeddings
        if self.net is None:
            self._build(features)
        assert self.net is not None
        with torch.autocast(features.device.type, enabled=False):  # small, and its scores are compared
            return self.net(features.detach().float(), context.ragged)

    def _build(self, features: Tensor) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(torch.initial_seed() % 2**32)  # the run's seed, whenever the first batch comes
            net = TeachingAssistant(
                features.shape[1], self.options.width, self.options.heads if self.options.attention else 0
            )
        self.net = net.to(features.device)
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=self.options.warmup_rate, weight_decay=0.0)
        if self._waiting is not None:
            self._restore(self._waiting)

    def _parameters(self) -> list[nn.Parameter]:
        return [] if self.net is None else list(self.net.parameters())

    # ---- resume ----

    def state_dict(self) -> dict[str, Any]:
        if self.net is None or self.optimizer is None:
            return self._waiting or {}
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "window": self.window,
            "steps": self.steps,
            "trend": self.trend,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.net is None:
            self._waiting = state  # until a batch shows how wide a feature is
        else:
            self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        assert self.net is not None and self.optimizer is not None
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        device = next(self.net.parameters()).device
        self.window = None if state["window"] is None else state["window"].to(device)
        self.steps, self.trend = state["steps"], dict(state["trend"])
        self._waiting = None


def _slots(ragged: Ragged) -> tuple[Tensor, Tensor]:
    """The question of each rationale and its place among that question's, (S,) each."""
    question = question_of_sequence(ragged)
    first = ragged.cu_questions.long()[question]
    return question, torch.arange(question.numel(), device=question.device) - first


def _log_softmax(scores: Tensor, ragged: Ragged) -> Tensor:
    """log-softmax over the rationales of each question, (S,), differentiable."""
    question, slot = _slots(ragged)
    shape = (ragged.num_questions, ragged.sizes.most_rationales)
    padded = scores.new_full(shape, -torch.inf).index_put((question, slot), scores)
    return F.log_softmax(padded, 1)[question, slot]
