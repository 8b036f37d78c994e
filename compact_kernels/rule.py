"""From the statistics of a batch to a weight per rationale (method eq. 3, 6, 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from compact_kernels.ragged import Ragged


class TokenStatistics(NamedTuple):
    """What the logits of every scored row tell; all detached, (N,) float32 (float64 for float64 input)."""

    logprob: Tensor  # log p(target)                     nats; 0 where the target is ignored
    entropy: Tensor  # −Σ p log p                         nats
    evidence: Tensor  # I_t, mean log p of the gold answer's ids (eq. 2)   nats; 0 where the rationale has none
    grad_norm: Tensor  # ‖p − e_target‖, the norm of ∂(−logprob)/∂logits


@dataclass(frozen=True)
class Statistics:
    """A batch as a strategy sees it: per token, and the three metrics of every rationale. All detached."""

    ragged: Ragged
    tokens: TokenStatistics  # each (N,)
    adaptability: Tensor  # (S,) S_MI, eq. 3
    consensus: Tensor  # (S,) S_cons, eq. 5; zeros where not given
    difficulty: Tensor  # (S,) S_PPL, eq. 6 (nats a token, or the IFD ratio)
    targets_per_rationale: Tensor  # (S,) T_k, the targets that count


@dataclass(frozen=True)
class AdaptabilityOptions:
    """How eq. 3 sums the jumps of the evidence."""

    epsilon: float = 0.1  # M where the token just read is not a thinking token
    span: Literal["body", "all"] = "body"  # rows r_0 … r_B, or all scored rows
    length_norm: Literal["none", "mean"] = "none"  # the paper's sum, or divided by B_k

    def __post_init__(self) -> None:
        if self.span not in ("body", "all"):
            raise ValueError(f"adaptability span is {self.span!r}; it is body or all")
        if self.length_norm not in ("none", "mean"):
            raise ValueError(f"adaptability length_norm is {self.length_norm!r}; it is none or mean")
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"adaptability epsilon is {self.epsilon}; it is 0 … 1")


@dataclass(frozen=True)
class CompatibilityRule:
    """COMPACT's rule, eq. 7: α = softmax_k(Score_k / τ), Score = β1·N(S_MI) + β2·N(S_cons) − β3·N(S_PPL).

    N is a z-score over the rationales of one question (population standard deviation). A metric whose spread is
    nothing but rounding (std ≤ 1e-6·max(1, |mean|)) says nothing: its z is 0. One rationale alone has α = 1.
    """

    adaptability: float = 1.0  # β1
    consensus: float = 1.0  # β2
    difficulty: float = 1.0  # β3
    temperature: float = 1.0  # τ

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"the rule's temperature is {self.temperature}; it must be above 0")
        for name in ("adaptability", "consensus", "difficulty"):
            if not -float("inf") < getattr(self, name) < float("inf"):
                raise ValueError(f"the rule's {name} is {getattr(self, name)}; it is a finite number")

    def __call__(self, statistics: Statistics) -> Tensor:
        """α, (S,), summing to one over each question."""
        ragged = statistics.ragged
        score = torch.zeros_like(statistics.difficulty)
        for beta, metric in (
            (self.adaptability, statistics.adaptability),
            (self.consensus, statistics.consensus),
            (-self.difficulty, statistics.difficulty),
        ):
            if beta:  # a metric that nobody weighs may be infinite
                score = score + beta * question_zscore(metric, ragged)
        return question_softmax(score / self.temperature, ragged)


def sequence_adaptability(
    evidence: Tensor, ragged: Ragged, options: AdaptabilityOptions, thinking: Tensor | None = None
) -> Tensor:
    """S_MI of every rationale: Σ_t ReLU(I_t − I_{t−1}) · M_t (eq. 3).

    Args:
        evidence: I_t of every scored row. (N,), or (C, N) for C kinds of it
        thinking: M's flags, where not the batch's own. As `evidence`

    Returns:
        (S,), or (C, S), nats; nats a body token under ``length_norm="mean"``.
    """
    if ragged.num_rows == 0:
        return evidence.new_zeros(*evidence.shape[:-1], ragged.num_sequences)
    jump = torch.relu(evidence - evidence.roll(1, -1))
    jump = jump.where(ragged.thinking if thinking is None else thinking, jump * options.epsilon)
    counted = ragged.in_body if options.span == "body" else ragged.step_of_row >= 1
    total = segment_sum(jump.where(counted, 0.0), ragged.cu_rows)
    if options.length_norm == "mean":
        total = total / ragged.body_lengths.clamp_min(1)
    return total


def question_slots(ragged: Ragged) -> tuple[Tensor, Tensor]:
    """The rationales of every question, padded to the largest K, made on the device of `ragged` without a copy.

    Returns:
        index (Q, K) int64, 0 where there is no rationale, and whether there is one (Q, K) bool.
    """
    slot = torch.arange(ragged.sizes.most_rationales, device=ragged.device)
    present = slot < ragged.cu_questions.diff()[:, None]
    return (ragged.cu_questions[:-1, None] + slot) * present, present


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums of consecutive segments, deterministic; an empty one sums to 0. (N,) or (C, N) gives (M,) or (C, M)."""
    if values.dim() == 2:  # one by one: of a single row a GPU sums a segment by many threads, of several by one
        return torch.stack([segment_sum(row, offsets) for row in values])
    return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True, initial=0.0)


def question_spread(values: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of a metric over the rationales of each question, (Q,) each."""
    return _centre(values, ragged)[1:]


def question_zscore(values: Tensor, ragged: Ragged) -> Tensor:
    """z-score of a metric over the rationales of each question, (S,); 0 where the spread is rounding."""
    question = ragged.question_of_sequence
    centred, mean, std = _centre(values, ragged)
    flat = std <= 1e-6 * mean.abs().clamp_min(1.0)
    return torch.where(flat[question], 0.0, centred / std.where(~flat, 1.0)[question])


def question_softmax(scores: Tensor, ragged: Ragged) -> Tensor:
    """softmax over the rationales of each question, (S,)."""
    question = ragged.question_of_sequence
    top = torch.segment_reduce(scores, "max", offsets=ragged.cu_questions, unsafe=True)
    weight = (scores - top[question]).exp()
    return weight / segment_sum(weight, ragged.cu_questions)[question]


def _centre(values: Tensor, ragged: Ragged) -> tuple[Tensor, Tensor, Tensor]:
    """Values without their question's mean (S,), the means (Q,) and the population standard deviations (Q,)."""
    question, count = ragged.question_of_sequence, ragged.cu_questions.diff()
    mean = segment_sum(values, ragged.cu_questions) / count
    centred = values - mean[question]
    # The mean rounds at the size of the values, which may be far more than their spread: take away what is left.
    centred = centred - (segment_sum(centred, ragged.cu_questions) / count)[question]
    return centred, mean, (segment_sum(centred.square(), ragged.cu_questions) / count).sqrt()
