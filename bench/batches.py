"""A packed batch with the logits of a trained model: one problem that every contender of a work is given."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.shapes import Shape
from compact_kernels import Ragged

TARGET_PROBABILITY = 0.6  # mean probability of the target that the hidden states are tuned to
IGNORE = -100


@dataclass
class Problem:
    """The same N scored rows in the three layouts that contenders take. Hidden states and `head` are leaves.

    T packed tokens, N scored rows, S rationales, D hidden, V vocabulary.
    """

    shape: Shape
    ragged: Ragged
    head: Tensor  # (V, D) trained
    frozen_head: Tensor  # (V, D) the same memory, without gradient
    packed: Tensor  # (T, D) every token, as COMPACT takes them with `ragged`
    packed_targets: Tensor  # (T,)
    dense: Tensor  # (S·L, D) every row that has a next token: prompts are there, their targets ignored
    dense_targets: Tensor  # (S·L,)
    rows: Tensor  # (N, D) the scored rows alone
    row_targets: Tensor  # (N,)
    consensus: Tensor  # (S,)
    weights: Tensor  # (S,) α, given
    row_weights: Tensor  # (N,) the same per token, normalised like the loss
    facts: dict[str, float]  # mean probability of the target and its spread

    def clear(self) -> None:
        for leaf in (self.head, self.packed, self.dense, self.rows):
            leaf.grad = None

    def gradient_bytes(self) -> int:
        """Of the gradients that the last round left."""
        grads = [leaf.grad for leaf in (self.head, self.packed, self.dense, self.rows) if leaf.grad is not None]
        return sum(grad.numel() * grad.element_size() for grad in grads)


def make_problem(
    shape: Shape,
    *,
    questions: int,
    rationales: int,
    tokens: int,
    masked: float = 0.0,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> Problem:
    """`questions` × `rationales` sequences of `tokens` rows, a share `masked` of them a prompt at the start.

    A sequence has tokens + 1 tokens: the last one predicts nothing. The rationales of a question share its prompt, so
    prompt lengths differ between questions, around their mean.
    """
    generator = torch.Generator(device).manual_seed(seed)
    sequences = questions * rationales
    ragged = _describe(shape.vocabulary, questions, rationales, tokens, masked, seed)
    vocabulary, width = shape.vocabulary, shape.width

    head = torch.randn(vocabulary, width, device=device, dtype=dtype, generator=generator) / width**0.5
    ids = _zipf(sequences * (tokens + 1), vocabulary, device, generator)
    hidden, facts = _peaked(head, ids, generator)

    rows = ragged.rows.to(device)
    packed_targets = torch.full_like(ids, IGNORE)
    packed_targets[rows] = ids[rows]
    has_next = torch.arange(sequences * (tokens + 1), device=device) % (tokens + 1) != tokens
    alpha = torch.rand(sequences, device=device, generator=generator) + 0.1
    alpha = (alpha.view(questions, rationales) / alpha.view(questions, rationales).sum(1, keepdim=True)).flatten()
    lengths = ragged.cu_rows.diff().to(device)
    row_weights = torch.repeat_interleave(alpha / lengths / questions, lengths)
    return Problem(
        shape=shape,
        ragged=ragged.to(device),
        head=head.requires_grad_(),
        frozen_head=head.detach(),
        packed=hidden.clone().requires_grad_(),
        packed_targets=packed_targets,
        dense=hidden[has_next].requires_grad_(),
        dense_targets=packed_targets[has_next],
        rows=hidden[rows].requires_grad_(),
        row_targets=ids[rows],
        consensus=torch.rand(sequences, device=device, generator=generator),
        weights=alpha,
        row_weights=row_weights,
        facts=facts,
    )


def _describe(vocabulary: int, questions: int, rationales: int, tokens: int, masked: float, seed: int) -> Ragged:
    """Answers of 3 to 5 ids, spans of 4 to 6 tokens near the end, one thinking token in eight."""
    generator = torch.Generator().manual_seed(seed)
    mean_prompt = round(masked * tokens) + 1
    prompts, evidence, spans, thinking = [], [], [], []
    for q in range(questions):
        # Evenly spread over ± 40% of the mean, so that the mean is kept.
        prompt = mean_prompt + round(0.4 * (mean_prompt - 1) * (2 * q - questions + 1) / questions)
        answer = torch.randint(vocabulary, (3 + q % 3,), generator=generator).tolist()
        span = 4 + q % 3
        for _ in range(rationales):
            completion = tokens + 1 - prompt
            prompts.append(prompt)
            evidence.append(answer)
            spans.append((completion - span - 1, span))
            thinking.append((torch.rand(completion, generator=generator) < 0.125).tolist())
    return Ragged.build(
        sequence_lengths=[tokens + 1] * (questions * rationales),
        prompt_lengths=prompts,
        rationales_per_question=[rationales] * questions,
        evidence_ids=evidence,
        answer_spans=spans,
        thinking=thinking,
    )


def _zipf(count: int, vocabulary: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Ids with p ∝ 1/(id + 1): byte-pair vocabularies are sorted by frequency, roughly. (count,) int64"""
    uniform = torch.rand(count, device=device, generator=generator)
    return (float(vocabulary) ** uniform - 1).long().clamp_(0, vocabulary - 1)


def _peaked(head: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """Hidden states (T, D) whose softmax puts `TARGET_PROBABILITY` on the target, in the mean.

    A row is its target's direction and those of four rivals, each with a strength of its own, plus noise that spreads
    what is left over the vocabulary. One offset moves the targets' strengths and is found by bisection on 512 rows:
    the logits are linear in it, so two products with the head are enough.
    """
    device, count = head.device, targets.numel()
    rivals = _zipf(count * 4, head.shape[0], device, generator).view(count, 4)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    def direction(ids: Tensor) -> Tensor:
        return torch.nn.functional.normalize(head[ids].float(), dim=-1)

    # hidden = offset · slope + base
    slope = direction(targets)
    base = 2.0 * normal(count, head.shape[1]) + 5.0 * normal(count, 1) * slope
    usual = math.log(head.shape[0])  # about where a logit outweighs the noise of all others
    for j in range(4):
        met = (rivals[:, j, None] == torch.cat([targets[:, None], rivals[:, :j]], dim=1)).any(1, keepdim=True)
        base += (usual - 2.0 + 3.0 * normal(count, 1)).where(~met, 0.0) * direction(rivals[:, j])
    sample = torch.arange(0, count, max(1, count // 512), device=device)
    target = targets[sample, None]

    def logits(hidden: Tensor) -> Tensor:
        return (hidden[sample].to(head.dtype) @ head.T).float()

    def probability(z: Tensor) -> Tensor:
        return (z.gather(1, target).squeeze(1) - z.logsumexp(-1)).exp()

    z_slope, z_base = logits(slope), logits(base)
    low, high = 0.0, 60.0
    for _ in range(24):
        offset = (low + high) / 2
        if probability(z_base + offset * z_slope).mean() < TARGET_PROBABILITY:
            low = offset
        else:
            high = offset
    hidden = (base + high * slope).to(head.dtype)
    p = probability(logits(hidden))
    facts = {
        "mean_p": round(p.mean().item(), 3),
        "share_p_above_0.99": round((p > 0.99).float().mean().item(), 3),
        "share_p_below_0.05": round((p < 0.05).float().mean().item(), 3),
    }
    return hidden, facts
