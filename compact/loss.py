"""The one loss implementation: from a student and a packed batch to the weighted loss, for every host trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from compact.config import CAP_AND_HEAD, CompactConfig
from compact.errors import UserError
from compact.norm_cap import LastNormCap
from compact.strategies.base import Context, Strategy, one_a_rationale
from compact.student import StudentOutput
from compact_kernels import (
    AdaptabilityOptions,
    CompatibilityOutput,
    Ragged,
    Statistics,
    compatibility_loss,
    linear_token_stats,
    question_consensus,
)
from compact_kernels.rule import segment_sum
from compact_kernels.sample_norms.cap import capped

MODEL_INPUTS = ("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Denominators(NamedTuple):
    """What a step's loss is divided by (method §3), over the whole accumulation window and all ranks."""

    questions: Tensor | float  # Q, questions with a scored row
    tokens: Tensor | float  # N = Σ_q (1/K_q) Σ_k T_k

    @classmethod
    def of(cls, ragged: Ragged) -> Denominators:
        """Those of one batch, from its host copy."""
        host = ragged.host
        targets = host.cu_rows[host.cu_questions.long()].diff().double()  # (Q,) Σ_k T_k
        tokens = float((targets / host.cu_questions.diff()).sum())
        return cls(float((targets > 0).sum()), tokens)


def distillation_loss(
    model: torch.nn.Module,
    batch: Mapping[str, Any],
    strategy: Strategy | None,
    config: CompactConfig | None = None,
    *,
    weights: Tensor | None = None,
    denominators: Denominators | None = None,
    replicas: int = 1,
    cap: LastNormCap | None = None,
) -> tuple[CompatibilityOutput, Context]:
    """One forward pass of the student over a packed batch, and the loss of method eq. 11 on it.

    Args:
        model: a student that :func:`compact.student.prepare` has seen, however wrapped.
        batch: what :class:`compact.collate.Collator` makes, on the model's device
            (:func:`compact.collate.to_device`).
        strategy: decides α; None: `weights` are α.
        config: the method; default: COMPACT's.
        weights: α (S,) ≥ 0 given beforehand, in the order of ``batch["teachers"]``, in place of a strategy.
        denominators: Q and N of the step; default: the batch's own entry of that name
            (:class:`compact.adapters.WindowLoader`), else those of this batch alone.
        replicas: R, what the gradient is divided by afterwards (data-parallel ranks, and accumulation steps where
            the host divides by them); the loss is multiplied by it.
        cap: holds α below what the rationales' last norms allow (``gradients.cap_by: last``).
    """
    if (strategy is None) == (weights is None):
        raise UserError("distillation_loss: give either a strategy or weights, and None for the other")
    config = CompactConfig() if config is None else config
    ragged: Ragged = batch["ragged"]
    denominators = batch.get("denominators") if denominators is None else denominators
    if strategy is not None:
        _check_parts(batch, config)
    output = forward(model, batch)
    lm_head = output.head
    with torch.no_grad():
        consensus = None if strategy is None else _consensus(output, batch, config)
        reference = None
        if strategy is not None and config.difficulty.kind == "ifd":
            alone = batch["unconditional"]
            reference = _mean_loss(forward(model, alone), alone, config)
    hidden = output.hidden
    if config.gradients.cap is not None and config.gradients.cap_by == "hidden":
        if lm_head.weight.requires_grad and torch.is_grad_enabled():
            raise UserError(CAP_AND_HEAD)
        # the loss is multiplied by the replicas
        hidden = capped(hidden, ragged, config.gradients.cap * replicas)
    normalizer, per_question = normalizers(config, ragged, denominators, replicas)
    own_kind = Strategy.divergence if strategy is None else strategy.divergence
    context = Context(batch["teachers"], output.pooled, ragged, batch["question_ids"], batch.get("embeddings"), output)
    rule = None
    if strategy is not None:
        weights = strategy.given(context)
        weights = None if weights is None else one_a_rationale(strategy, weights, context)
        rule = strategy.bind(context) if weights is None else None
    if cap is not None:
        weights, rule = _held(weights, rule, cap.most(batch, normalizer))
    with output.precision(config.head_dtype):
        result = compatibility_loss(
            hidden,
            lm_head.weight,
            targets_of(batch),
            ragged,
            rule=rule,
            weights=None if weights is None else weights.to(output.hidden.device),
            consensus=consensus,
            difficulty_reference=reference,
            adaptability=AdaptabilityOptions(
                epsilon=config.adaptability.epsilon,
                span=config.adaptability.span,
                length_norm=config.adaptability.length_norm,
            ),
            divergence=own_kind if config.divergence.kind == "strategy" else config.divergence.kind,
            divergence_weight=config.divergence.weight,
            sft_reduction=config.sft_reduction,
            normalizer=normalizer,
            divergence_normalizer=per_question,
            **lm_head.options,
            workspace_mib=config.workspace_mib,
        )
    return result, context


def normalizers(
    config: CompactConfig, ragged: Ragged, denominators: Denominators | None, replicas: int
) -> tuple[Tensor | float, Tensor | float]:
    """c_s/α_s, what a rationale's loss is multiplied with besides α, and R/Q (method §3)."""
    questions, tokens = Denominators.of(ragged) if denominators is None else denominators
    per_question = replicas / _at_least_one(questions)
    return (replicas / _at_least_one(tokens) if config.sft_reduction == "token" else per_question), per_question


def _held(
    weights: Tensor | None, rule: Callable[[Statistics], Tensor] | None, most: Tensor
) -> tuple[Tensor | None, Callable[[Statistics], Tensor] | None]:
    """The weights or the rule, nowhere above `most` (S,)."""
    if weights is not None:
        return torch.minimum(weights.to(most.device), most.to(weights.dtype)), None
    assert rule is not None
    return None, lambda statistics: torch.minimum(rule(statistics), most)


def consensus_vectors(output: StudentOutput, batch: Mapping[str, Any], config: CompactConfig) -> tuple[Tensor, Tensor]:
    """Queries and keys whose scaled product is the affinity that `consensus.affinity` asks for (eq. 4)."""
    affinity = config.consensus.affinity
    if affinity == "attention":
        if output.query is None or output.key is None:
            raise UserError(
                "this architecture's last-layer query and key projections were not found: "
                "set consensus.affinity to cosine (of the final hidden states)"
            )
        return output.query, output.key
    vectors = batch["embeddings"] if affinity == "sentence" else output.eos_hidden
    unit = F.normalize(vectors.float(), dim=-1)
    return unit * math.sqrt(unit.shape[-1]), unit  # the op divides by √d: what is left is the cosine


def forward(model: torch.nn.Module, batch: Mapping[str, Any]) -> StudentOutput:
    """The student's one forward pass over a packed batch, through whatever wraps it."""
    output = model(**{name: batch[name] for name in MODEL_INPUTS}, compact=batch["ragged"])
    if not isinstance(output, StudentOutput):
        raise UserError(f"{type(model).__name__} was not prepared: call compact.student.prepare(model) first")
    return output


def _check_parts(batch: Mapping[str, Any], config: CompactConfig) -> None:
    """What a configuration asks of a batch beyond what every batch has."""
    if config.difficulty.kind == "ifd" and "unconditional" not in batch:
        raise UserError(
            "difficulty.kind is ifd, and the batch has no unconditional completions: make it by Collator(tokenizer, "
            "ifd=True)"
        )
    if config.consensus.affinity == "sentence" and "embeddings" not in batch:
        raise UserError(
            "consensus.affinity is sentence, and the batch has no embeddings: compact.embed.with_embeddings adds them "
            "to the tokenized questions"
        )


def _consensus(output: StudentOutput, batch: Mapping[str, Any], config: CompactConfig) -> Tensor:
    query, key = consensus_vectors(output, batch, config)
    return question_consensus(
        query,
        key,
        batch["ragged"],
        temperature=config.consensus.temperature,
        centrality=config.consensus.centrality,
    )


def targets_of(batch: Mapping[str, Any]) -> Tensor:
    """(T,) the next token of every position; the first label of each sequence is −100, so none crosses over."""
    return F.pad(batch["labels"][0, 1:], (0, 1), value=-100)


def _mean_loss(output: StudentOutput, batch: Mapping[str, Any], config: CompactConfig) -> Tensor:
    """(S,) mean negative log-likelihood a token."""
    ragged: Ragged = batch["ragged"]
    lm_head = output.head
    with output.precision(config.head_dtype):
        tokens = linear_token_stats(
            output.hidden,
            lm_head.weight,
            targets_of(batch),
            ragged,
            **lm_head.options,
            workspace_mib=config.workspace_mib,
        )
    return -segment_sum(tokens.logprob, ragged.cu_rows) / ragged.cu_rows.diff().clamp_min(1)


def _at_least_one(value: Tensor | float) -> Tensor | float:
    return value.clamp_min(1) if isinstance(value, Tensor) else max(value, 1.0)
