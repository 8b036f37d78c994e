"""Eq. 9 and MIND's JSD on rows of unnormalised probabilities: values, and gradients in place.

The launches of :mod:`compact_kernels.divergence_kernels`, which has the mathematics: two for the value, one for the
gradient. Deterministic; nothing is read back and nothing is copied to the device.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from compact_kernels.divergence_kernels import gradient_kernel, reduce_kernel, value_kernel
from compact_kernels.ragged import Ragged
from compact_kernels.weighting import Kind

TILE = 4096  # rationales × vocabulary entries that a program holds at once
SPLITS = 32  # programs that share the vocabulary of one position, at most


def span_divergence(
    buffer: Tensor,
    sums: Tensor,
    pivots: Tensor | None,
    ragged: Ragged,
    alpha: Tensor,
    first_question: int,
    last_question: int,
    first_row: int,
    kind: Kind,
    *,
    masses: Tensor | None = None,
    gathered: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """D_q of the questions `first_question` … `last_question − 1`.

    Args:
        buffer: E, float32, bfloat16 or float16; its rows may be strided. (c, V)
        sums: S. (c,) float32
        pivots: a column of each row where what is stored is not E (a negative one is column 0); None: E is as
            stored. (c,) int64
        masses: E at the pivots; None: 1. (c,) float32
        alpha: (S,) float32
        first_row: the scored row (an index into `ragged.rows`) that is row 0 of `buffer`.
        gathered: the buffer holds answer rows alone, in the order of `ragged.span_rows`; `first_row` indexes those.
        out: where to write; default: fresh tensors, of which other questions' entries stay unwritten.

    Returns:
        D (Q,) nats and C, one for each entry of `ragged.span_rows`, (G,): float32, written for those questions.
    """
    if out is None:
        per_question = torch.empty(ragged.num_questions, dtype=torch.float32, device=buffer.device)
        scores = torch.empty(ragged.span_rows.numel(), dtype=torch.float32, device=buffer.device)
    else:
        per_question, scores = out
    if last_question <= first_question:
        return per_question, scores
    alpha = alpha.contiguous()
    largest, longest, first_span, last_span = _sizes(ragged, first_question, last_question)
    width, splits, tiles = _tiles(buffer, largest)
    questions = last_question - first_question
    partial = torch.empty((splits, last_span - first_span), dtype=torch.float32, device=buffer.device)
    if longest:
        value_kernel[(questions * longest * largest, splits)](
            *_arguments(buffer, sums, pivots, masses, ragged, alpha, first_question, first_row, longest, tiles),
            partial,
            first_span,
            last_span - first_span,
            JSD=kind == "jsd",
            GATHERED=gathered,
            FAST=_fast(buffer),
            K=largest,
            BLOCK=width,
            num_warps=4,
        )
    reduce_kernel[(questions,)](
        partial,
        alpha,
        ragged.cu_questions,
        ragged.cu_span,
        per_question,
        scores,
        first_question,
        first_span,
        last_span - first_span,
        K=largest,
        SPLITS=splits,
        BLOCK=max(min(2048 // (largest * splits), 16), 1),
        num_warps=4,
    )
    return per_question, scores


def add_span_gradient_(
    buffer: Tensor,
    sums: Tensor,
    pivots: Tensor | None,
    ragged: Ragged,
    alpha: Tensor,
    first_question: int,
    last_question: int,
    first_row: int,
    kind: Kind,
    scores: Tensor,
    gain: Tensor | None,
    *,
    masses: Tensor | None = None,
    gathered: bool = False,
    replace: bool = False,
    times_sum: bool = False,
    softcap: float | None = None,
    temperature: float = 1.0,
    shift: Tensor | None = None,
    inverse_sums: Tensor | None = None,
    ignore_index: int = -100,
    ratio: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """Adds gain_k · (∂D_q/∂z_r) / α_k to the answer rows r of rationale k, all V columns, in place.

    The buffer's rows are read as E (see :func:`span_divergence`, whose arguments these are) and written as gradient
    rows; the column of the pivot receives its share on top of whatever is stored there.

    Args:
        scores: C, as :func:`span_divergence` gave it. (G,)
        gain: (S,) float32; None: 1.
        ratio: (a, b, c) makes the gain max(gain, 1)·a·c/b, with a and b () float32 on the device.
        replace: the answer rows are overwritten, not added to. Those of a rationale without a partner become 0.
        times_sum: multiply by S_r as well, for rows that are S_r times a gradient.
        softcap, temperature, shift: with `softcap` the gradient goes on to u, z = softcap·tanh(u/softcap)/temperature,
            times 1 − (z·temperature/softcap)² with z = shift_r + log E; shift (c,) float32. The factor 1/temperature
            belongs into `gain`.
        inverse_sums, ignore_index: the factors that rows are multiplied with later, (c,) float32. Rows whose pivot is
            `ignore_index` have no gradient of their own and a factor of 0: their update replaces what is stored, and
            their factor becomes 1/S.
    """
    if last_question <= first_question:
        return
    alpha = alpha.contiguous()
    largest, longest, first_span, _ = _sizes(ragged, first_question, last_question)
    width, splits, tiles = _tiles(buffer, largest)
    if longest == 0 or (largest == 1 and not replace):
        return
    if softcap is not None and shift is None:
        raise ValueError("softcap needs `shift`: z is shift + log E")
    gradient_kernel[((last_question - first_question) * longest * largest, splits)](
        *_arguments(buffer, sums, pivots, masses, ragged, alpha, first_question, first_row, longest, tiles),
        scores,
        gain,
        shift if softcap is not None else None,
        inverse_sums,
        *(ratio if ratio is not None else (None, None, 1.0)),
        0.0 if softcap is None else float(temperature / softcap),
        ignore_index,
        JSD=kind == "jsd",
        GATHERED=gathered,
        FAST=_fast(buffer),
        REPLACE=replace,
        TIMES_SUM=times_sum,
        K=largest,
        BLOCK=width,
        num_warps=4,
    )


def _sizes(ragged: Ragged, first_question: int, last_question: int) -> tuple[int, int, int, int]:
    """The largest K of the batch as a power of two; of these questions the longest span, and which span rows."""
    sizes = ragged.sizes
    spans = sizes.cu_span[sizes.cu_questions[first_question] : sizes.cu_questions[last_question] + 1]
    longest = max(end - start for start, end in zip(spans, spans[1:]))
    return triton.next_power_of_2(sizes.most_rationales), longest, spans[0], spans[-1]


def _tiles(buffer: Tensor, largest: int) -> tuple[int, int, int]:
    """Columns of a tile, programs that share the vocabulary, and tiles for each of them."""
    width = min(max(TILE // largest, 32), 1024)
    tiles = triton.cdiv(buffer.shape[1], width)
    splits = min(SPLITS, triton.next_power_of_2(tiles))
    return width, splits, triton.cdiv(tiles, splits)


def _fast(buffer: Tensor) -> bool:
    """Whether the logarithm may be NVIDIA's own instruction, which Triton has no portable name for."""
    return buffer.is_cuda and torch.version.cuda is not None


def _arguments(
    buffer: Tensor,
    sums: Tensor,
    pivots: Tensor | None,
    masses: Tensor | None,
    ragged: Ragged,
    alpha: Tensor,
    first_question: int,
    first_row: int,
    longest: int,
    tiles: int,
) -> tuple[object, ...]:
    if buffer.stride(1) != 1:
        raise ValueError(f"buffer has strides {buffer.stride()}; a row must be contiguous")
    shape = (ragged.cu_questions, ragged.cu_span, ragged.span_rows)
    sizes = (buffer.stride(0), buffer.shape[1], tiles, first_question, first_row, longest)
    return buffer, sums, pivots, masses, *shape, alpha, *sizes
