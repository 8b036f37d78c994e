"""The head's two passes, each called the way that suits the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compact_kernels.head.linear import LinearHead
from compact_kernels.head.rows import Answers
from compact_kernels.head.tokens import TokenLogprobs, TokenPass
from compact_kernels.head.weighted import WeightedLoss, WeightedPass
from compact_kernels.ragged import Ragged
from compact_kernels.rule import CompatibilityRule, TokenStatistics
from compact_kernels.sample_norms.head import HeadNorms
from compact_kernels.sample_norms.recorder import active
from compact_kernels.weighting import Decision, Settled, Weighting, decide, given_row_weight, settled


def product_dtype(hidden: Tensor, head_weight: Tensor) -> torch.dtype:
    """What the products are computed in: autocast's dtype, or the tensors' own."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, head_weight.dtype):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def token_logprobs(
    rows: Tensor, head: LinearHead, targets: Tensor, ragged: Ragged | None, ignore_index: int, workspace_mib: int
) -> TokenStatistics:
    """Statistics of the rows (n, D); log-prob and entropy are differentiable. Evidence needs `ragged`."""
    dtype, trains = product_dtype(rows, head.weight), torch.is_grad_enabled()
    if ragged is None and trains and rows.requires_grad:
        refuse_beside_unweighted("linear_logprob")
    if torch.compiler.is_compiling():
        frozen = not (head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad))
        keep = trains and rows.requires_grad and frozen and ragged is not None and dtype != torch.float16
        shape, host = ([], []) if ragged is None else (ragged.tensors(), ragged.host.tensors())
        logprob, entropy, rest, _ = torch.ops.compact_kernels.token_logprobs(
            rows, head.weight, head.bias, targets, shape, host, head.numbers, ignore_index, workspace_mib, dtype, keep
        )
        return TokenStatistics(logprob, entropy, rest[0], rest[1])
    norms, inputs = recorded(head, ragged)
    call = TokenPass(
        head=head,
        targets=targets,
        answers=None if ragged is None else Answers.of_batch(ragged),
        ignore_index=ignore_index,
        workspace_mib=workspace_mib,
        dtype=dtype,
        trains=trains,
        norms=norms,
    )
    return TokenStatistics(*TokenLogprobs.apply(rows, head.weight, head.bias, call, *inputs))


def weighted_loss(
    hidden: Tensor, head: LinearHead, targets: Tensor, ragged: Ragged, weighting: Weighting, workspace_mib: int
) -> tuple[Tensor, Tensor, Tensor | None, Decision, TokenStatistics, Settled]:
    """Loss, its share of L_SFT, the divergence, decision, statistics and the settled weighting.

    The divergence is None where the pass could not take it along: the caller adds it.
    """
    if weighting.divergence_weight and weighting.ignore_index >= head.vocabulary:
        raise ValueError(
            f"ignore_index is {weighting.ignore_index}, beyond the vocabulary of {head.vocabulary}: with a divergence "
            "it is negative or a token's id"
        )
    dtype, recorder = product_dtype(hidden, head.weight), active()
    unweighted = recorder is not None and recorder.unweighted and torch.is_grad_enabled()
    if unweighted:
        if weighting.divergence_weight:
            raise ValueError(
                "unweighted norms: the divergence mixes rationales, so that no loss is one rationale's own; "
                'set divergence_weight to 0, or take norms="weighted"'
            )
        ours, theirs = ragged.sizes, recorder.ragged.sizes  # type: ignore[union-attr]
        if ours.cu_seqlens != theirs.cu_seqlens or ours.cu_rows != theirs.cu_rows:
            raise ValueError("the loss is of another batch than the one being recorded")
        if recorder.scales._version and torch._C._current_graph_task_id() == -1:  # type: ignore[union-attr]
            refuse_beside_unweighted("a second compatibility_loss")
    trains = torch.is_grad_enabled() and (
        head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    )
    if recorder is not None and torch.compiler.is_compiling() and (trains or unweighted):
        # Norms are collected beside the pass, which a graph cannot hold: it is left here.
        return _eager_loss(hidden, head, targets, ragged, weighting, workspace_mib)
    # Gradients that a forward pass makes in float16 vanish before the loss's scale is known: they wait for it.
    late = dtype == torch.float16 and not (recorder is not None and trains and weighting.divergence_weight)
    if weighting.by_question and not late and torch.compiler.is_compiling():
        return _compiled_loss(hidden, head, targets, ragged, weighting, workspace_mib, dtype)
    if recorder is not None and trains and weighting.divergence_weight and not weighting.by_question:
        with torch.no_grad():  # α first: the head's gradient rows then hold the divergence too
            tokens = token_logprobs(hidden[ragged.rows], head, targets, ragged, weighting.ignore_index, workspace_mib)
            final = settled(weighting, targets, ragged, tokens.logprob.dtype)
            weighting = replace(weighting, weights=decide(tokens, targets, ragged, final)[0].alpha)
    if weighting.by_question and not unweighted and not late:
        norms, inputs = recorded(head, ragged)
        call = WeightedPass(head, targets, ragged, weighting, workspace_mib, dtype, torch.is_grad_enabled(), norms)
        loss, sft, divergence, *rest = WeightedLoss.apply(hidden, head.weight, head.bias, call, *inputs)
        decision, tokens = Decision(*rest[:5]), TokenStatistics(*rest[5:9])
        final = weighting.with_normalizers(rest[9], rest[10])
        folded = divergence.numel() > 0
        return loss, sft, divergence if folded else None, decision, tokens, final
    rows = hidden.index_select(0, ragged.rows)
    tokens = token_logprobs(rows, head, targets, ragged, weighting.ignore_index, workspace_mib)
    detached = TokenStatistics(*(statistic.detach() for statistic in tokens))
    final = settled(weighting, targets, ragged, detached.logprob.dtype)
    decision, _ = decide(detached, targets, ragged, final)
    loss = -(decision.row_weight * tokens.logprob).sum()
    if unweighted:  # the layers weigh their gradients by c_s themselves
        assert recorder is not None and recorder.scales is not None
        recorder.scales.copy_(decision.alpha * final.normalizer)
        alone = replace(final, normalizer=torch.ones_like(final.normalizer))
        weight = given_row_weight(torch.ones_like(decision.alpha), decision.targets_per_rationale, ragged, alone)
        flows = -(weight * tokens.logprob).sum()
        loss = flows + (loss - flows).detach()
    return loss, loss.detach(), None, decision, detached, final


@torch.compiler.disable
def _eager_loss(*inputs: Any) -> tuple[Tensor, Tensor, Tensor | None, Decision, TokenStatistics, Settled]:
    return weighted_loss(*inputs)


def refuse_beside_unweighted(what: str) -> None:
    """Where norms are unweighted, layers weigh all that flows back through them by what one loss weighs.

    Raises:
        ValueError: a recorder of unweighted norms is under way.
    """
    recorder = active()
    if recorder is not None and recorder.unweighted:
        raise ValueError(
            f"unweighted norms: {what} in the same record() would be weighed by the first loss's c_s too: leave it "
            'out, or take norms="weighted"'
        )


def recorded(head: LinearHead, ragged: Ragged | None) -> tuple[HeadNorms | None, list[Tensor | None]]:
    """Where a recorder of the rationales' gradient norms is under way: what collects the head's, and its inputs.

    Raises:
        ValueError: the head trains, but is not the one that the recorder knows, or not on the recorder's batch.
    """
    recorder = active()
    trains = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    if recorder is None or not (trains and torch.is_grad_enabled()):
        return None, [None, None]
    return recorder.head_norms(head.weight, head.bias, ragged)


def _compiled_loss(
    hidden: Tensor,
    head: LinearHead,
    targets: Tensor,
    ragged: Ragged,
    weighting: Weighting,
    workspace_mib: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Decision, TokenStatistics, Settled]:
    """The weighted loss as one node of a graph."""

    def scalar(value: float | Tensor | None) -> Tensor | None:
        if not isinstance(value, float | int):
            return value
        return torch.full((), value, dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)

    rule = weighting.rule if isinstance(weighting.rule, CompatibilityRule) else CompatibilityRule()
    betas, options = (rule.adaptability, rule.consensus, rule.difficulty, rule.temperature), weighting.adaptability
    trains = torch.is_grad_enabled()
    wanted = [trains and leaf is not None and leaf.requires_grad for leaf in (hidden, head.weight, head.bias)]
    loss, scalars, rationales, row_weight, tokens, *_ = torch.ops.compact_kernels.weighted_loss(
        hidden,
        head.weight,
        head.bias,
        targets,
        ragged.tensors(),
        ragged.host.tensors(),
        weighting.weights,
        weighting.consensus,
        weighting.difficulty_reference,
        scalar(weighting.normalizer),
        scalar(weighting.divergence_normalizer),
        head.numbers,
        [float(number) for number in (*betas, options.epsilon, weighting.divergence_weight)],
        f"{options.span} {options.length_norm} {weighting.divergence} {weighting.sft_reduction}",
        weighting.ignore_index,
        workspace_mib,
        dtype,
        wanted,
    )
    final = weighting.with_normalizers(scalars[2], scalars[3])
    alpha, adaptability, difficulty, counted = rationales.unbind()
    decision = Decision(alpha, adaptability, difficulty, counted, row_weight)
    return loss, scalars[0], scalars[1], decision, TokenStatistics(*tokens.unbind()), final
