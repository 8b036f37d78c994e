"""The head's two passes, each called the way that suits the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from compact_kernels.head.backend import backend_for
from compact_kernels.head.linear import LinearHead
from compact_kernels.head.rows import Answers
from compact_kernels.head.tokens import TokenLogprobs, TokenPass
from compact_kernels.head.weighted import WeightedLoss, WeightedPass
from compact_kernels.ragged import Ragged
from compact_kernels.rule import TokenStatistics
from compact_kernels.weighting import Decision, Settled, Weighting, settled


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
    call = TokenPass(
        head=head,
        targets=targets,
        answers=None if ragged is None else Answers.of_batch(ragged),
        ignore_index=ignore_index,
        workspace_mib=workspace_mib,
        dtype=product_dtype(rows, head.weight),
        trains=torch.is_grad_enabled(),
    )
    return TokenStatistics(*TokenLogprobs.apply(rows, head.weight, head.bias, call))


def weighted_loss(
    hidden: Tensor, head: LinearHead, targets: Tensor, ragged: Ragged, weighting: Weighting, workspace_mib: int
) -> tuple[Tensor, Tensor, Tensor | None, Decision, TokenStatistics, Settled]:
    """Loss, its share of L_SFT, the divergence, decision, statistics and the settled weighting.

    The divergence is None where the pass could not take it along: the caller adds it.
    """
    dtype = product_dtype(hidden, head.weight)
    backend = backend_for(hidden, dtype)
    if weighting.by_question:
        folds = backend.folds_divergence(head)
        trains = torch.is_grad_enabled()
        call = WeightedPass(head, targets, ragged, weighting, folds, workspace_mib, dtype, trains)
        loss, sft, divergence, *rest = WeightedLoss.apply(hidden, head.weight, head.bias, call)
        decision, tokens = Decision(*rest[:5]), TokenStatistics(*rest[5:9])
        both = {"normalizer": rest[9], "divergence_normalizer": rest[10]}
        folded = divergence.numel() > 0
        return loss, sft, divergence if folded else None, decision, tokens, Settled(**{**vars(weighting), **both})
    rows = hidden.index_select(0, ragged.rows)
    tokens = token_logprobs(rows, head, targets, ragged, weighting.ignore_index, workspace_mib)
    detached = TokenStatistics(*(statistic.detach() for statistic in tokens))
    final = settled(weighting, targets, ragged, detached.logprob.dtype)
    decision = backend.decide_batch(detached, targets, ragged, final)
    loss = -(decision.row_weight * tokens.logprob).sum()
    return loss, loss.detach(), None, decision, detached, final
