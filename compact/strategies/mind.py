"""MIND: a small Teaching Assistant learns to foresee which rationales this student can use (method §4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor, nn

from compact.config import CompactConfig
from compact.errors import UserError
from compact.randomness import random_state_kept
from compact.strategies.base import Context, Strategy
from compact_kernels import Statistics
from compact_kernels.ragged import on_device
from compact_kernels.rule import segment_sum

LEAST_LOG = math.log(1e-30)  # of a target probability
MOST_PATHS = 256  # that are learnt from at once: attention looks at all pairs


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

    def forward(self, features: Tensor, apart: Tensor) -> Tensor:
        """(S, F) → (S,) scores; a question's paths see each other and nobody else, whatever their number.

        Args:
            apart: :func:`paths_apart` of the batch. (S, S) bool
        """
        path = self.encode(features)  # (S, W)
        if self.across is not None:
            row = path[None]  # the batch's paths in one row
            seen, _ = self.across(row, row, row, attn_mask=apart, need_weights=False)
            path = path + seen[0]
        return self.score(self.norm(path)).squeeze(1).sigmoid()


class _Lesson(NamedTuple):
    """What the assistant learns from one batch; detached."""

    features: Tensor  # (S, F) float32
    question: Tensor  # (S,) int64, of each path
    losses: Tensor  # (S,) L_real
    questions: int

    def to(self, device: torch.device | str) -> _Lesson:
        return _Lesson(self.features.to(device), self.question.to(device), self.losses.to(device), self.questions)


class Mind(Strategy):
    """α = softmax of s/τ_student over the paths whose score s is at least β times the question's best.

    The assistant learns from L_meta = KL(π_τ(s) ‖ π_τ(−L_real)) and from nothing else; its inputs and L_real are
    detached. Its gradients are summed over the questions of its window, over all ranks, and divided by their number:
    how a step is split into batches and ranks does not matter. As it does not move within a window, a batch is but
    kept there, and learnt from at the window's end.

    What resumes: parameters, optimizer, the window under way, and the averages of ``inertia: ema``.
    """

    divergence = "jsd"

    def __init__(self, config: CompactConfig, teachers: Sequence[str]) -> None:
        super().__init__(config, teachers)
        self.options = config.mind
        self.warmup_epochs = config.mind.warmup
        self.net: TeachingAssistant | None = None  # made when the first batch shows how wide a feature is
        self.optimizer: torch.optim.Optimizer | None = None
        # The window: what this rank has seen since the assistant's last step.
        self.lessons: list[_Lesson] = []
        self.settled = 0  # how many of them are of steps that are over: those a checkpoint keeps
        self.steps = 0  # of the student
        # Exponential averages of L_real, (rows · teachers,) float64, NaN where not met; the questions' rows in it.
        self.trend: Tensor | None = None
        self._rows: dict[str, int] = {}
        self.fresh: list[tuple[list[str], Tensor, Tensor]] = []  # of this rank since the last step
        self.learnt: list[tuple[Tensor, int]] = []  # Σ L_meta and of how many questions, since the last log
        self._alike = False  # whether all ranks have been given the first one's parameters
        self._waiting: dict[str, Any] | None = None

    # ---- α ----

    @torch.no_grad()
    def given(self, context: Context) -> Tensor:
        apart = paths_apart(context.ragged.question_of_sequence)
        scores = self._score(self._features(context), apart)
        best = _by_question(scores, apart).amax(1)
        left_out = scores < self.options.threshold * best  # all but I_dyn
        scores = (scores / self.options.student_temperature).masked_fill(left_out, -torch.inf)
        return _by_question(scores, apart).softmax(1).diagonal().contiguous()

    # ---- learning ----

    @torch.no_grad()
    def observe(self, statistics: Statistics, context: Context, alpha: Tensor) -> None:
        features, ragged = self._features(context), context.ragged  # first: what it builds restores the averages
        losses = self._real_losses(statistics, context)
        # A copy: the batch's own may be written over, by a CUDA graph's next replay for one.
        self.lessons.append(_Lesson(features.clone(), ragged.question_of_sequence, losses, ragged.num_questions))

    def step(self, learning_rate: float | None = None) -> None:
        ranks = PartialState().num_processes
        if self.optimizer is None or (len(self.lessons) == self.settled and ranks == 1):  # another may have seen some
            return
        if not self._alike:  # not earlier: a rank may build it alone, to show a question
            for parameter in self._parameters():
                parameter.data = broadcast(parameter.data)
            self._alike = True
        if self.options.inertia == "ema":
            fresh, self.fresh = self.fresh, []
            if ranks > 1:
                fresh = gather_object([(names, *(part.cpu() for part in parts)) for names, *parts in fresh])
            for part in fresh:
                self._remember(*part)
        self.steps, self.settled = self.steps + 1, len(self.lessons)
        if learning_rate is not None and self.steps < self.options.accumulation:
            return
        gradient = self._learn()
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.warmup_rate if learning_rate is None else self.options.rate * learning_rate
        parameters = self._parameters()
        for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters])):
            parameter.grad = part.view_as(parameter)
        self.optimizer.step()

    def _learn(self) -> Tensor:
        """L_meta's gradient over the window's questions, all ranks', end to end; the window is empty then. (P,)"""
        parameters = self._parameters()
        total = parameters[0].new_zeros(sum(p.numel() for p in parameters) + 1)  # of a rank that has seen none
        for together in _in_parts(self.lessons):
            total = total + self._sum_of_gradients(together)
        total = reduce(total, "sum")
        self.lessons, self.settled, self.steps = [], 0, 0
        return total[:-1] / total[-1].clamp_min(1)

    def _sum_of_gradients(self, lessons: Sequence[_Lesson]) -> Tensor:
        """Of L_meta over the questions of the lessons, end to end, and how many questions these are. (P + 1,)"""
        starts = accumulate((lesson.questions for lesson in lessons), initial=0)
        question = torch.cat([lesson.question + start for lesson, start in zip(lessons, starts)])
        apart = paths_apart(question)
        losses = torch.cat([lesson.losses for lesson in lessons])
        with torch.enable_grad(), torch.autocast(losses.device.type, enabled=False):
            scores = self._score(torch.cat([lesson.features for lesson in lessons]), apart)
            predicted = _log_softmax(scores / self.options.temperature, apart)
            target = _log_softmax(-losses / self.options.temperature, apart)
            meta = (predicted.exp() * (predicted - target.clamp_min(LEAST_LOG))).sum()
            gradients = torch.autograd.grad(meta, self._parameters())
        questions = sum(lesson.questions for lesson in lessons)
        self.learnt.append((meta.detach(), questions))
        return torch.cat([*(gradient.flatten() for gradient in gradients), losses.new_full((1,), questions)])

    def logs(self) -> dict[str, float]:
        learnt, self.learnt = self.learnt, []
        if not learnt:
            return {}
        return {"mind/meta_loss": float(sum(meta for meta, _ in learnt)) / sum(questions for _, questions in learnt)}

    def _real_losses(self, statistics: Statistics, context: Context) -> Tensor:
        """L_real (S,), the mean cross entropy of each path, or its exponential average."""
        ragged = context.ragged
        losses = -segment_sum(statistics.tokens.logprob, ragged.cu_rows)
        losses = losses / statistics.targets_per_rationale.clamp_min(1)
        if self.options.inertia == "optimizer":
            return losses
        ends = ragged.sizes.cu_questions
        names = [name for name, first, last in zip(context.question_ids, ends, ends[1:]) for _ in range(last - first)]
        loss, keep = losses.double(), self.options.decay
        trend, places = self._places(names, context.teachers)
        before = trend[places]
        averaged = torch.where(before.isnan(), loss, keep * before + (1 - keep) * loss)
        self.fresh.append((names, context.teachers, averaged))
        return averaged.to(losses.dtype)

    def _places(self, names: Sequence[str], teachers: Tensor) -> tuple[Tensor, Tensor]:
        """The averages, with room for these questions, and where in them those of each rationale's are. (S,) int64"""
        device, count = teachers.device, len(self.teachers)
        rows = on_device([self._rows.setdefault(name, len(self._rows)) for name in names], torch.int64, device)
        if self.trend is None:
            self.trend = torch.empty(0, dtype=torch.float64, device=device)
        if (missing := len(self._rows) * count - self.trend.numel()) > 0:
            room = self.trend.new_full((max(missing, self.trend.numel()),), torch.nan)
            self.trend = torch.cat([self.trend, room])
        return self.trend, rows * count + teachers

    def _remember(self, names: Sequence[str], teachers: Tensor, averaged: Tensor) -> None:
        """Of two rationales of one teacher the larger average counts."""
        device = averaged.device if self.trend is None else self.trend.device
        trend, places = self._places(names, teachers.to(device))
        trend.scatter_reduce_(0, places, averaged.to(device), "amax", include_self=False)

    # ---- the network ----

    def _features(self, context: Context) -> Tensor:
        """What the assistant sees of each path, (S, F) float32; the first time the assistant is built for it."""
        features = context.pooled
        if self.options.features == "sentence":
            if context.embeddings is None:
                raise UserError("mind.features is sentence, and the batch has no embeddings: set consensus.encoder")
            features = context.embeddings
        features = features.detach().float()
        if self.net is None:
            self._build(features)
        return features

    def _score(self, features: Tensor, apart: Tensor) -> Tensor:
        """(S, F) → (S,)"""
        assert self.net is not None
        # No autocast: the network is small, and its scores are compared.
        with torch.autocast(features.device.type, enabled=False):
            return self.net(features, apart)

    def _build(self, features: Tensor) -> None:
        with random_state_kept(seed=torch.initial_seed() % 2**32):  # the run's, whenever the first batch comes
            net = TeachingAssistant(
                features.shape[1], self.options.width, self.options.heads if self.options.attention else 0
            )
        self.net = net.to(features.device)
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=self.options.warmup_rate, weight_decay=0.0, fused=True)
        if self._waiting is not None:
            self._restore(self._waiting)

    def _parameters(self) -> list[nn.Parameter]:
        return [] if self.net is None else list(self.net.parameters())

    # ---- resume ----

    def state_dict(self) -> dict[str, Any]:
        if self.net is None or self.optimizer is None:
            return self._waiting or {}
        ours = [tuple(lesson.to("cpu")) for lesson in self.lessons[: self.settled]]
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lessons": gather_object([ours]) if PartialState().num_processes > 1 else [ours],  # by rank
            "steps": self.steps,
            "trend": self._averages(),
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
        place = PartialState()
        ours = state["lessons"][place.process_index :: place.num_processes]  # of one rank or more
        self.lessons = [_Lesson(*lesson).to(device) for lesson in chain.from_iterable(ours)]
        self.settled, self.steps, self.fresh, self._waiting = len(self.lessons), state["steps"], [], None
        self.trend, self._rows = None, {}
        if state["trend"]:
            names, teachers = zip(*(key.rsplit("\t", 1) for key in state["trend"]))
            averaged = on_device(list(state["trend"].values()), torch.float64, device)
            self._remember(names, on_device([int(teacher) for teacher in teachers], torch.int64, device), averaged)

    def _averages(self) -> dict[str, float]:
        """Of every question and teacher that were met, by both with a tab between them."""
        if self.trend is None:
            return {}
        values, count = self.trend.tolist(), len(self.teachers)
        keys = [f"{name}\t{teacher}" for name in self._rows for teacher in range(count)]
        return {key: value for key, value in zip(keys, values) if not math.isnan(value)}


def paths_apart(question: Tensor) -> Tensor:
    """Which pairs of a batch's rationales are not of one question. (S,) the question of each → (S, S) bool"""
    return question[:, None] != question


def _in_parts(lessons: Sequence[_Lesson]) -> list[list[_Lesson]]:
    """Lessons to learn from at once: of :data:`MOST_PATHS` at most, unless a single one has more."""
    parts: list[list[_Lesson]] = []
    room = 0
    for lesson in lessons:
        room -= len(lesson.losses)
        if room < 0 or not parts:
            parts.append([])
            room = MOST_PATHS - len(lesson.losses)
        parts[-1].append(lesson)
    return parts


def _by_question(values: Tensor, apart: Tensor) -> Tensor:
    """A row a rationale: the values of its question's, −∞ at all others. (S,) → (S, S), differentiable"""
    return values.expand_as(apart).masked_fill(apart, -torch.inf)


def _log_softmax(scores: Tensor, apart: Tensor) -> Tensor:
    """log-softmax over the rationales of each question. (S,), differentiable"""
    return _by_question(scores, apart).log_softmax(1).diagonal()
