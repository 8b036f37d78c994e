"""The public ops of the head: one signature each, whatever computes them.

The shapes: T packed tokens, N scored rows, S rationales, Q questions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from compact_kernels import arguments, native_cuda, reference
from compact_kernels.dispatch import native_cuda_applies, on_its_device, triton_applies
from compact_kernels.divergence import answer_divergence
from compact_kernels.head.linear import LinearHead
from compact_kernels.head.passes import token_logprobs, weighted_loss
from compact_kernels.ragged import Ragged
from compact_kernels.rule import AdaptabilityOptions, CompatibilityRule, Statistics, TokenStatistics
from compact_kernels.weighting import Kind, Weighting, decide, metrics, settled

DEFAULT_WORKSPACE_MIB = 512
Implementation = Literal["auto", "reference"]


class CompatibilityOutput(NamedTuple):
    """What one weighted pass of the head gives. Everything but `loss` is detached."""

    loss: Tensor  # () the normalised, weighted loss: differentiable
    alpha: Tensor  # (S,) the weights that were applied
    sft: Tensor  # () the share of `loss` that is Σ α L_SFT
    divergence: Tensor  # () Σ_q Σ_k α_k L_MCon,k, normalised like `loss`, without λ
    statistics: Statistics


@on_its_device
def compatibility_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    ragged: Ragged,
    *,
    rule: Callable[[Statistics], Tensor] | None = None,
    weights: Tensor | None = None,
    consensus: Tensor | None = None,
    difficulty_reference: Tensor | None = None,
    adaptability: AdaptabilityOptions = AdaptabilityOptions(),  # noqa: B008  frozen
    divergence: Kind = "kl",
    divergence_weight: float = 0.0,
    sft_reduction: Literal["mean", "sum", "token"] = "mean",
    normalizer: float | Tensor | None = None,
    divergence_normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    workspace_mib: int = DEFAULT_WORKSPACE_MIB,
    implementation: Implementation = "auto",
) -> CompatibilityOutput:
    """The weighted loss of a batch, its weights decided by its own statistics (method eq. 2–11).

    Args:
        hidden: final hidden states of the packed batch. (T, D)
        head_weight: the lm head. (V, D)
        targets: the id that each position is to predict (labels shifted by one), `ignore_index` where none. (T,)
        ragged: the batch's shape; only its scored rows are looked at.
        rule: statistics → α (S,), non-negative; default :class:`CompatibilityRule`. Called without gradient.
        weights: α given beforehand, in place of a rule; constants, of which no gradient is asked. (S,)
        consensus: S_cons from :func:`question_consensus`. (S,) Needed where the rule weighs it.
        difficulty_reference: the loss of each rationale without its question; difficulty becomes the IFD ratio. (S,)
        divergence, divergence_weight: L_MCon's kind and λ (eq. 9–10); 0 leaves it out.
        sft_reduction: what one scored row of rationale k weighs: "mean" α/T_k, "sum" α (both times `normalizer`,
            R/Q), "token" α (times R/N, N = Σ_q (1/K_q) Σ_k T_k).
        normalizer: R/Q (mean, sum) or R/N (token) over the whole accumulation window and all ranks (method §3);
            default: this batch alone.
        divergence_normalizer: R/Q for the divergence; default: `normalizer`, or this batch's 1/Q under "token".
        bias, logit_scale, softcap, temperature: logits are softcap·tanh(scale·(h Wᵀ + b)/softcap)/temperature.
        workspace_mib: size of the logits that may exist at once. A head that trains also needs V·D float32 numbers
            for its gradient unless all rows fit at once.
        implementation: "auto" is Triton on GPUs and C++ or chunked torch on CPUs; "reference" is the definition, for
            tests.

    Returns:
        :class:`CompatibilityOutput`. A batch without a scored row has loss 0 and zero gradients.

    Raises:
        ValueError: naming the argument and the sizes that do not fit. Ids out of range on a device, and numbers that
            are not finite, are looked for only if the environment has COMPACT_KERNELS_DEBUG=1; they give NaN
            otherwise.
        RuntimeError: a second derivative is asked for.
    """
    head = LinearHead(head_weight, bias, logit_scale, softcap, temperature)
    row_targets = _scored(hidden, head, targets, ragged, ignore_index, workspace_mib, implementation)
    if rule is not None and weights is not None:
        raise ValueError("give either `rule` or `weights`: both would decide α")
    weighting = Weighting(
        rule=CompatibilityRule() if rule is None else rule,
        weights=weights,
        consensus=consensus,
        difficulty_reference=difficulty_reference,
        adaptability=adaptability,
        divergence=divergence,
        divergence_weight=divergence_weight,
        sft_reduction=sft_reduction,
        normalizer=normalizer,
        divergence_normalizer=divergence_normalizer,
        ignore_index=ignore_index,
    )
    arguments.check_loss(weighting, ragged, row_targets)
    if implementation == "reference":
        logprob, tokens = reference.token_pass(head, hidden, row_targets, ragged, ignore_index, workspace_mib)
        final = settled(weighting, row_targets, ragged, tokens.logprob.dtype)
        decision, statistics = decide(tokens, row_targets, ragged, final)
        loss, mixed = -(decision.row_weight * logprob).sum(), None
        sft = loss.detach()
    else:
        loss, sft, mixed, decision, tokens, final = weighted_loss(
            hidden, head, row_targets, ragged, weighting, workspace_mib
        )
        statistics = metrics(tokens, ragged, weighting, *decision[1:4])
    if divergence_weight and mixed is None:  # not part of the pass
        divergence_of = reference.answer_divergence if implementation == "reference" else answer_divergence
        per_question = divergence_of(
            hidden,
            head_weight,
            ragged,
            decision.alpha,
            kind=divergence,
            bias=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            workspace_mib=workspace_mib,
        )
        value = per_question.sum() * final.divergence_normalizer
        loss, mixed = loss + divergence_weight * value, value.detach()
    mixed = torch.zeros_like(sft) if mixed is None else mixed
    return CompatibilityOutput(loss, decision.alpha, sft, mixed, statistics)


@on_its_device
@torch.no_grad()
def linear_token_stats(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    ragged: Ragged,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    workspace_mib: int = DEFAULT_WORKSPACE_MIB,
    implementation: Implementation = "auto",
) -> TokenStatistics:
    """Log-prob, entropy, answer evidence (eq. 2) and logit-gradient norm of every scored row, without gradients.

    Arguments as in :func:`compatibility_loss`; each statistic is (N,).
    """
    head = LinearHead(head_weight, bias, logit_scale, softcap, temperature)
    row_targets = _scored(hidden, head, targets, ragged, ignore_index, workspace_mib, implementation)
    if implementation == "reference":
        return reference.token_pass(head, hidden, row_targets, ragged, ignore_index, workspace_mib)[1]
    rows = hidden.index_select(0, ragged.rows)
    return token_logprobs(rows, head, row_targets, ragged, ignore_index, workspace_mib)


@on_its_device
def linear_logprob(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    workspace_mib: int = DEFAULT_WORKSPACE_MIB,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Per-token log-probability and entropy of a linear head, both differentiable.

    Args:
        hidden: (…, D). head_weight: (V, D). targets: (…) ids, `ignore_index` where none.

    Returns:
        log p(target) and entropy, each (…) in nats; both 0 where the target is ignored.
    """
    arguments.check_tensors(hidden=hidden, targets=targets)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets has shape {tuple(targets.shape)}, hidden {tuple(hidden.shape)}: one target a row")
    arguments.check_ids(targets)
    arguments.check_head(hidden, head_weight, bias)
    arguments.check_numbers(logit_scale, softcap, temperature, workspace_mib, implementation)
    head = LinearHead(head_weight, bias, logit_scale, softcap, temperature)
    arguments.check_values(hidden, targets, head.vocabulary, None, ignore_index)
    flat, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if implementation == "reference":
        logprob, entropy = reference.logprob(head, flat, flat_targets, ignore_index, workspace_mib)
    else:
        tokens = token_logprobs(flat, head, flat_targets, None, ignore_index, workspace_mib)
        logprob, entropy = tokens.logprob, tokens.entropy.where(flat_targets != ignore_index, 0.0)
    return logprob.reshape(targets.shape), entropy.reshape(targets.shape)


@on_its_device
@torch.no_grad()
def question_consensus(
    query: Tensor,
    key: Tensor,
    ragged: Ragged,
    *,
    temperature: float = 1.0,
    centrality: Literal["in_degree", "pagerank", "eigenvector"] = "in_degree",
) -> Tensor:
    """S_cons: how central each rationale is in the graph of its question (eq. 4–5).

    Args:
        query, key: W_Q v and W_K v of every rationale's EOS state, keys repeated under grouped-query attention.
            (S, H, d) or (S, d)
        temperature: divides the scores, for rows that saturate.
        centrality: "in_degree" Σ_{i≠k} A_ik (paper), or PageRank (damping 0.85) or eigenvector centrality of the
            same weighted digraph without self-loops, as networkx defines them.

    Returns:
        (S,) float32 (float64 for float64 input), without a gradient; 0 for a rationale alone.
    """
    arguments.check_query_key(query, key, ragged, temperature)
    if torch.compiler.is_compiling():
        shape, host = ragged.tensors(), ragged.host.tensors()
        return torch.ops.compact_kernels.question_consensus(query, key, shape, host, temperature, centrality)
    if centrality == "in_degree" and (native_cuda_applies(query) or triton_applies(query)):
        if native_cuda_applies(query) and query.dtype == key.dtype:
            return native_cuda.in_degree(query, key, ragged, temperature)
        if triton_applies(query):
            from compact_kernels.consensus import in_degree

            return in_degree(query, key, ragged, temperature)
    return reference.question_consensus(query, key, ragged, temperature=temperature, centrality=centrality)


def _scored(
    hidden: Tensor,
    head: LinearHead,
    targets: Tensor,
    ragged: Ragged,
    ignore_index: int,
    workspace_mib: int,
    implementation: Implementation,
) -> Tensor:
    """The scored rows' targets (N,) of a packed batch whose arguments fit each other."""
    arguments.check_packed(hidden, ragged)
    arguments.check_head(hidden, head.weight, head.bias)
    arguments.check_numbers(head.logit_scale, head.softcap, head.temperature, workspace_mib, implementation)
    arguments.check_targets(targets, hidden, ragged)
    arguments.check_values(hidden, targets, head.vocabulary, ragged, ignore_index)
    return targets.reshape(-1).index_select(0, ragged.rows)
