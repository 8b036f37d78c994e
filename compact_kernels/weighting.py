"""From a batch's token statistics to what every scored row weighs in the loss (method §3, eq. 3, 6, 7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from compact_kernels.arguments import check_alpha
from compact_kernels.ragged import Ragged
from compact_kernels.rule import (
    AdaptabilityOptions,
    CompatibilityRule,
    Statistics,
    TokenStatistics,
    segment_sum,
    sequence_adaptability,
)

Reduction = Literal["mean", "sum", "token"]
Kind = Literal["kl", "jsd"]


@dataclass(frozen=True)
class Weighting:
    """Everything between the statistics of a batch and the gradient of its rows, but for the batch itself."""

    rule: Callable[[Statistics], Tensor]
    weights: Tensor | None  # (S,) α given beforehand, in place of the rule
    consensus: Tensor | None  # (S,)
    difficulty_reference: Tensor | None  # (S,)
    adaptability: AdaptabilityOptions
    divergence: Kind
    divergence_weight: float  # λ
    sft_reduction: Reduction
    normalizer: float | Tensor | None  # R/Q or R/N; None: from the batch
    divergence_normalizer: float | Tensor | None  # R/Q; None: `normalizer`, or from the batch
    ignore_index: int

    @property
    def divide_by_targets(self) -> bool:
        """Whether a row weighs α·normalizer/T_k, not α·normalizer."""
        return self.sft_reduction == "mean"

    @property
    def by_question(self) -> bool:
        """Whether α is known to read nothing but its own question, in a form that a fused pass understands."""
        return self.weights is not None or type(self.rule) is CompatibilityRule

    def with_normalizers(self, normalizer: Tensor, divergence_normalizer: Tensor) -> Settled:
        return Settled(  # each by its name: torch.compile traces this
            rule=self.rule,
            weights=self.weights,
            consensus=self.consensus,
            difficulty_reference=self.difficulty_reference,
            adaptability=self.adaptability,
            divergence=self.divergence,
            divergence_weight=self.divergence_weight,
            sft_reduction=self.sft_reduction,
            normalizer=normalizer,
            divergence_normalizer=divergence_normalizer,
            ignore_index=self.ignore_index,
        )


@dataclass(frozen=True)
class Settled(Weighting):
    """A weighting whose normalizers are () tensors on the device."""

    normalizer: Tensor
    divergence_normalizer: Tensor

    @property
    def for_one_launch(self) -> dict[str, Any]:
        """The options of the launches that decide (:func:`compact_kernels.rule_triton.decide`)."""
        return {
            "rule": self.rule if isinstance(self.rule, CompatibilityRule) else None,
            "options": self.adaptability,
            "consensus": self.consensus,
            "difficulty_reference": self.difficulty_reference,
            "normalizer": self.normalizer,
            "divide_by_targets": self.divide_by_targets,
            "ignore_index": self.ignore_index,
            "weights": self.weights,
        }


class Decision(NamedTuple):
    """What was decided for a batch. float32 (float64 for float64 statistics)."""

    alpha: Tensor  # (S,)
    adaptability: Tensor  # (S,) S_MI, eq. 3
    difficulty: Tensor  # (S,) S_PPL, eq. 6 (nats a token, or the IFD ratio)
    targets_per_rationale: Tensor  # (S,) T_k
    row_weight: Tensor  # (N,) what a row's −log p weighs in the loss

    @classmethod
    def empty(cls, ragged: Ragged, dtype: torch.dtype = torch.float32) -> Decision:
        """Room for the decision about a batch, on its device."""
        count = ragged.num_sequences
        sizes = (count, count, count, count, ragged.num_rows)
        return cls(*(torch.empty(size, dtype=dtype, device=ragged.device) for size in sizes))


@torch.no_grad()
def decide(
    tokens: TokenStatistics, targets: Tensor, ragged: Ragged, weighting: Settled
) -> tuple[Decision, Statistics]:
    """The decision for a whole batch, in plain torch.

    Args:
        targets: of the scored rows. (N,)
    """
    counted = segment_sum((targets != weighting.ignore_index).to(tokens.logprob.dtype), ragged.cu_rows)
    difficulty = -segment_sum(tokens.logprob, ragged.cu_rows) / counted.clamp_min(1)
    if weighting.difficulty_reference is not None:
        difficulty = difficulty / weighting.difficulty_reference
    adaptability = sequence_adaptability(tokens.evidence, ragged, weighting.adaptability)
    statistics = metrics(tokens, ragged, weighting, adaptability, difficulty, counted)
    with torch.autocast(difficulty.device.type, enabled=False):  # α is compared, and costs nothing
        alpha = weighting.rule(statistics) if weighting.weights is None else weighting.weights
    check_alpha(alpha, ragged)
    alpha = alpha.detach().to(difficulty.dtype, copy=True)  # the caller's own stay the caller's
    row_weight = given_row_weight(alpha, counted, ragged, weighting)
    return Decision(alpha, adaptability, difficulty, counted, row_weight), statistics


def metrics(
    tokens: TokenStatistics,
    ragged: Ragged,
    weighting: Weighting,
    adaptability: Tensor,
    difficulty: Tensor,
    targets_per_rationale: Tensor,
) -> Statistics:
    """A batch as a strategy sees it, the consensus given with the weighting or zeros."""
    consensus = weighting.consensus
    return Statistics(
        ragged=ragged,
        tokens=tokens,
        adaptability=adaptability,
        consensus=torch.zeros_like(difficulty) if consensus is None else consensus.detach().to(difficulty.dtype),
        difficulty=difficulty,
        targets_per_rationale=targets_per_rationale,
    )


def given_row_weight(alpha: Tensor, targets_per_rationale: Tensor, ragged: Ragged, weighting: Settled) -> Tensor:
    """What every scored row weighs, (N,), given α."""
    weight = alpha * weighting.normalizer
    if weighting.divide_by_targets:
        weight = weight / targets_per_rationale.clamp_min(1)
    return weight[ragged.sequence_of_row]


@torch.no_grad()
def settled(weighting: Weighting, targets: Tensor, ragged: Ragged, dtype: torch.dtype) -> Settled:
    """The weighting with both normalizers as () tensors on the device; what is not given comes from this batch.

    Args:
        targets: of the scored rows. (N,)
    """
    normalizer, divergence_normalizer = weighting.normalizer, weighting.divergence_normalizer
    if normalizer is None:
        per_rationale = segment_sum((targets != weighting.ignore_index).to(dtype), ragged.cu_rows)
        per_question = segment_sum(per_rationale, ragged.cu_questions)
        questions = 1 / (per_question > 0).sum().clamp_min(1).to(dtype)
        if divergence_normalizer is None:
            divergence_normalizer = questions
        if weighting.sft_reduction == "token":
            total = (per_question / ragged.cu_questions.diff()).sum()  # N; may be less than 1
            normalizer = 1 / total.where(total > 0, 1.0)
        else:
            normalizer = questions
    if divergence_normalizer is None:
        divergence_normalizer = normalizer
    return weighting.with_normalizers(
        _on_device(normalizer, targets, dtype), _on_device(divergence_normalizer, targets, dtype)
    )


def _on_device(value: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(device=like.device, dtype=dtype).reshape(())
    return torch.full((), value, dtype=dtype, device=like.device)
