"""The exponentiated logits of answers, which the divergence is made of, and its gradient in the head's stored rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compact_kernels import divergence_torch
from compact_kernels.dispatch import native_applies, triton_applies
from compact_kernels.head import native_rows
from compact_kernels.head.linear import LinearHead
from compact_kernels.head.planner import Chunk
from compact_kernels.head.rows import RowStatistics, row_buffer
from compact_kernels.head.torch_rows import capped_slope
from compact_kernels.ragged import Ragged
from compact_kernels.weighting import Decision, Settled


class Exponentials(NamedTuple):
    """A chunk of rows as :func:`compact_kernels.divergence_triton.span_divergence` takes them."""

    buffer: Tensor  # (n, V) E = exp(z − shift), float32 or bfloat16
    sums: Tensor  # (n,) float32  Σ_v E
    shift: Tensor | None  # (n,) float32; only a softcap asks for it
    pivots: Tensor | None = None  # (n,) int64  columns where what is stored is not E; a negative one is column 0
    masses: Tensor | None = None  # (n,) float32  E at those; None: 1
    slope: Tensor | None = None  # (n, V) the softcap's own part of dz/draw, if it was asked for


def exponentials(x: Tensor, head: LinearHead, slope: bool = False) -> Exponentials:
    """The exponentiated logits of the rows x (n, D): in the product's epilogue where the head's kernels store them.

    They store no E under a softcap (but its slope times E), and float16 has no room for an E that has not met its
    maximum: there plain torch computes, relative to the row's maximum.

    Args:
        slope: a gradient follows in plain torch: keep the softcap's slope, of logits whose E may be 0.
    """
    if head.softcap is not None or x.dtype == torch.float16 or not triton_applies(x):
        logits = native_rows.logits(x, head) if native_applies(x) else head(x)
        slopes = capped_slope(logits, head) if slope and head.softcap is not None else None
        shift = logits.amax(-1)
        buffer = logits.sub_(shift[:, None]).exp_()
        return Exponentials(buffer, buffer.sum(-1), shift, slope=slopes)
    from compact_kernels.head import triton_rows

    none = torch.full((x.shape[0],), -1, dtype=torch.int64, device=x.device)  # no targets: the pivot is column 0
    buffer, table = row_buffer(x.shape[0], head.vocabulary, x), RowStatistics.table(x.shape[0], x)
    triton_rows.statistics(x, head, none, None, -1, table, 0, buffer)
    rows = RowStatistics(*table)
    return Exponentials(buffer, rows.total, None, none, rows.target_mass)


def add_to_rows(
    chunk: Chunk,
    x: Tensor,
    head: LinearHead,
    stored: Tensor,
    rows: RowStatistics,
    ragged: Ragged,
    weighting: Settled,
    decision: Decision,
    divergence: Tensor,
) -> None:
    """Write D_q of the chunk's questions, and add λ ∂D_q to the stored gradient rows (n, V) of their answers.

    What Triton's rows do by themselves but for a softcap; asked for where the head's gradient rows have to be whole.
    A stored row is multiplied with α·normalizer/T·inverse_sum later: what is added is without them.
    """
    questions, spans = ragged.sizes.cu_questions, ragged.sizes.cu_span
    first, last = spans[questions[chunk.first_question]], spans[questions[chunk.last_question]]
    divergence[chunk.first_question : chunk.last_question] = 0
    if first == last:
        return
    own = ragged.span_rows[first:last] - chunk.first
    e = exponentials(x[own], head, slope=True)
    place = (ragged, decision.alpha, chunk.first_question, chunk.last_question, first, weighting.divergence)
    scores = torch.empty(ragged.span_rows.numel(), dtype=e.sums.dtype, device=x.device)
    divergence_torch.span_divergence(e.buffer, e.sums, *place, (divergence, scores))
    counted = torch.ones_like(decision.alpha)
    if weighting.divide_by_targets:
        counted = decision.targets_per_rationale.clamp_min(1)  # as a row's weight is divided
    ratio = weighting.divergence_weight * weighting.divergence_normalizer / weighting.normalizer
    divergence_torch.replace_by_gradient_(e.buffer, e.sums, *place, scores, counted * ratio)
    if e.slope is not None:
        e.buffer.mul_(e.slope)
    inverse = rows.inverse_sum[chunk.rows][own]
    ignored = inverse == 0  # no target: the divergence is the row's only gradient
    inverse = inverse.where(~ignored, 1.0)
    rows.inverse_sum[chunk.rows][own] = inverse
    before = torch.where(ignored[:, None], 0.0, stored[own].to(e.buffer.dtype))
    stored[own] = (before + e.buffer / inverse[:, None]).to(stored.dtype)
