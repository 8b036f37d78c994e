"""The head's row pass on a GPU: launches the kernels of its neighbours, `kernels` and `row_kernels`."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from compact_kernels import divergence_triton, native_cuda, rule_triton
from compact_kernels.dispatch import INTERPRETER, native_cuda_applies
from compact_kernels.dot import dot_precision
from compact_kernels.head import kernels, row_kernels
from compact_kernels.head.linear import LinearHead
from compact_kernels.head.planner import Chunk
from compact_kernels.head.rows import Answers, RowStatistics, product
from compact_kernels.head.torch_rows import buffer_dtype, chunk_mib
from compact_kernels.ragged import Ragged
from compact_kernels.rule import TokenStatistics
from compact_kernels.weighting import Decision, Settled

__all__ = ["buffer_dtype", "chunk_mib"]  # as in plain torch

LN2 = math.log(2.0)


class _Tiles(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int
    precision: str  # of the products
    programs: int = 1  # on a multiprocessor


@lru_cache
def _tiles(dtype: torch.dtype, device: torch.device) -> _Tiles:
    """Tile shapes by measurement on an H100 and H200, by what fits the shared memory elsewhere.

    float32 by three products of TF32 takes an eighth of the time on an H200. Where tensor cores are no faster than the
    rest (GeForce), or registers spill (before Hopper), that is not known to pay: there it stays with multiply-adds.
    """
    precision = dot_precision(dtype)
    if INTERPRETER:
        return _Tiles(32, 64, 32, 4, 1, precision)
    if dtype == torch.float32:
        if precision == "tf32x3" and torch.cuda.get_device_capability(device)[0] in (9, 10):
            return _Tiles(128, 64, 32, 4, 3, precision, programs=2)
        return _Tiles(64, 64, 32, 4, 2, "ieee")
    # AMD's devices have no such property: 64 KiB.
    shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 65536)
    return _Tiles(128, 256, 64, 8, 3, precision) if shared >= 200_000 else _Tiles(128, 128, 32, 8, 3, precision)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return 4 if INTERPRETER else torch.cuda.get_device_properties(device).multi_processor_count


def bytes_per_logit(dtype: torch.dtype) -> int:
    """What a logit takes while a chunk is worked on: it is stored once, exponentiated."""
    return dtype.itemsize


def statistics(
    x: Tensor,
    head: LinearHead,
    targets: Tensor,
    answers: Answers | None,
    ignore_index: int,
    table: Tensor,
    first_row: int,
    buffer: Tensor | None = None,
) -> None:
    """Statistics of the rows x (n, D), into the table's columns from `first_row` on.

    With a `buffer` (n, V), also their unscaled gradient rows. Nothing waits for the device. A target out of range
    gives NaN.
    """
    n, vocabulary = x.shape[0], head.vocabulary
    if n == 0:
        return
    targets = targets.contiguous()
    table = table[:, first_row : first_row + n]
    tiles = _tiles(x.dtype, x.device)
    parts = triton.cdiv(vocabulary, tiles.n)
    z, slope, probed = x.new_empty((3, n), dtype=torch.float32)
    columns = torch.empty_like(targets)
    flags = torch.zeros((triton.cdiv(n, tiles.m), parts), dtype=torch.int8, device=x.device)
    inner, outer = head.base2
    softcap, has_bias = head.softcap is not None, head.bias is not None
    ids, cu_ids, cu_rows = answers[:3] if answers is not None else (targets, targets, targets)
    row_kernels.probe_kernel[(n,)](
        x, head.weight, head.bias, targets, cu_rows, ids, cu_ids,
        columns, flags, z, slope, probed, first_row, cu_ids.numel() - 1, vocabulary, x.shape[1], ignore_index,
        x.stride(0), head.weight.stride(0), inner, outer,
        SOFTCAP=softcap, HAS_BIAS=has_bias, HAS_ANSWERS=answers is not None,
        TILE_M=tiles.m, TILE_N=tiles.n, BLOCK_D=min(1024, triton.next_power_of_2(x.shape[1])), num_warps=4,
    )  # fmt: skip
    sums = x.new_empty((parts, n, 4), dtype=torch.float32)
    mode = kernels.STATISTICS if buffer is None else kernels.EXPONENTIALS
    _product(x, head, buffer, columns, flags, z, None, None, sums, 0, vocabulary, mode)
    row_kernels.finish_kernel[(triton.cdiv(n, 16),)](
        sums, targets, columns, z, slope, probed, table, buffer, x, head.weight, head.bias,
        n, parts, table.stride(0), buffer.stride(0) if buffer is not None else 0, ignore_index,
        vocabulary, x.shape[1], x.stride(0), head.weight.stride(0), inner, outer,
        SOFTCAP=softcap, HAS_BIAS=has_bias, STORED=buffer is not None, HAS_ANSWERS=answers is not None,
        PRECISION=tiles.precision, ROWS=16, PARTS=128, num_warps=4,
    )  # fmt: skip


def gradient_block(
    x: Tensor,
    head: LinearHead,
    targets: Tensor,
    rows: RowStatistics,
    slope: Tensor,
    curve: Tensor | None,
    target_gradient: Tensor,
    first_column: int,
    block: Tensor,
) -> None:
    """Fill `block` (n, width), columns first_column …, with exp(u)·(slope + curve·u), u = z − pivot.

    The target's entry is given.

    slope, curve, target_gradient: (n,) float32; a row whose target is ignored has no entry of its own.
    """
    n, width = block.shape
    if n == 0:
        return
    targets = targets.contiguous()
    curve = None if curve is None else curve * LN2
    _product(x, head, block, targets, None, rows.pivot, slope, curve, None, first_column, width, kernels.GRADIENT)
    row_kernels.target_kernel[(triton.cdiv(n, 128),)](
        block, targets, target_gradient, n, first_column, width, block.stride(0), ROWS=128
    )


def last_product(rows: Tensor, x: Tensor, sums: Tensor, dtype: torch.dtype) -> Tensor:
    """sums + rowsᵀ x, rounded once to `dtype`; rows (n, V) lie in a :func:`row_buffer`, x is (n, D), sums (V, D)."""
    vocabulary, dim = sums.shape
    if rows.dtype != dtype or dim * dtype.itemsize % 16:  # tiles cannot be stored to such rows
        return product(rows.t(), x, out=sums, accumulate=True).to(dtype)
    tiles = _tiles(x.dtype, x.device)
    programs = tiles.programs * _multiprocessors(x.device)
    m, n = tiles.m, tiles.n
    if n > m and dim % n and dim % n <= n // 2:  # the last tile would be half empty
        m, n = n, m
    out = sums.new_empty(sums.shape, dtype=dtype)
    kernels.last_product_kernel[(min(programs, triton.cdiv(vocabulary, m) * triton.cdiv(dim, n)),)](
        _tiled(rows, tiles.k, m), _tiled(x, tiles.k, n), sums, _tiled(out, m, n // 4), len(rows), vocabulary, dim,
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=tiles.k, GROUP_M=8, PROGRAMS=programs, PRECISION=tiles.precision,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def scale_rows(
    source: Tensor,
    first: Tensor,
    second: Tensor | None,
    constant: float,
    out: Tensor,
    place: Tensor | None = None,
) -> Tensor:
    """out[place[i]] = source[i]·first[i]·second[i]·constant, rounded once to out's dtype."""
    n, dim = source.shape
    first = first.contiguous()  # the gradient of a sum is one number, expanded
    if n:
        row_kernels.scale_rows_kernel[(n,)](
            source, first, second, place, out, dim, source.stride(0), out.stride(0), constant,
            HAS_SECOND=second is not None, SCATTER=place is not None, BLOCK_D=min(1024, triton.next_power_of_2(dim)),
        )  # fmt: skip
    return out


def rescale(source: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """source·factor in `dtype`; in place, and for nothing where the factor is 1, if source has that dtype."""
    out = source if source.dtype == dtype else torch.empty_like(source, dtype=dtype)
    count = source.numel()
    if count:
        row_kernels.rescale_kernel[(triton.cdiv(count, 4096),)](
            source, factor, out, count, SAME=out is source, BLOCK=4096, num_warps=8
        )
    return out


def _aligned(matrix: Tensor) -> Tensor:
    """The matrix itself, or a copy that tile loads can address: rows start at multiples of 16 bytes."""
    size = matrix.element_size()
    apart = matrix.stride(0) >= matrix.shape[1] and matrix.stride(0) * size % 16 == 0
    if matrix.stride(1) == 1 and apart and matrix.data_ptr() % 16 == 0:
        return matrix
    rows, dim = matrix.shape
    copy = matrix.new_zeros(rows, -(-dim * size // 16) * 16 // size)[:, :dim]
    return copy.copy_(matrix)


def _product(
    x: Tensor,
    head: LinearHead,
    out: Tensor | None,
    columns: Tensor,
    flags: Tensor | None,
    pivot: Tensor,
    slope: Tensor | None,
    curve: Tensor | None,
    sums: Tensor | None,
    first_column: int,
    width: int,
    mode: Any,
) -> None:
    tiles = _tiles(x.dtype, x.device)
    programs = tiles.programs * _multiprocessors(x.device)
    n, dim = x.shape
    left = _tiled(x, tiles.m, tiles.k)
    count = triton.cdiv(n, tiles.m) * triton.cdiv(width, tiles.n)
    inner, outer = head.base2
    kernels.logits_kernel[(min(programs, count),)](
        left, _tiled(head.weight, tiles.n, tiles.k), left if out is None else _tiled(out, tiles.m, tiles.n // 2),
        head.bias, columns, flags, pivot, slope, curve, sums, n, dim, first_column, width, inner, outer,
        MODE=mode.value, SOFTCAP=head.softcap is not None, HAS_BIAS=head.bias is not None,
        HAS_CURVE=curve is not None, BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, GROUP_M=16,
        PROGRAMS=programs, PRECISION=tiles.precision, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _tiled(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    matrix = _aligned(matrix)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def decide(
    chunk: Chunk, tokens: TokenStatistics, targets: Tensor, ragged: Ragged, weighting: Settled, out: Decision
) -> None:
    """Write the decision about the chunk's questions into that of the batch, in one launch."""
    launch = native_cuda.decide if native_cuda_applies(tokens.logprob) else rule_triton.decide
    first, last, options = chunk.first_question, chunk.last_question, weighting.for_one_launch
    launch(first, last, ragged, tokens.logprob, tokens.evidence, targets, **options, out=out)


def folds_divergence(head: LinearHead) -> bool:
    """Whether the weighted pass can take the answers' divergence along: if what it stores are probabilities."""
    return head.softcap is None


def add_divergence(
    chunk: Chunk,
    buffer: Tensor,
    rows: RowStatistics,
    targets: Tensor,
    ragged: Ragged,
    weighting: Settled,
    decision: Decision,
    divergence: Tensor,
) -> None:
    """Write D_q of the chunk's questions, and add λ ∂D_q to the stored gradient rows of their answers."""
    place = (chunk.first_question, chunk.last_question, chunk.first, weighting.divergence)
    stored = (buffer, rows.total[chunk.rows], targets[chunk.rows], ragged, decision.alpha)
    masses = rows.target_mass[chunk.rows]
    scores = torch.empty(ragged.span_rows.numel(), dtype=torch.float32, device=buffer.device)
    divergence_triton.span_divergence(*stored, *place, masses=masses, out=(divergence, scores))
    # A stored row is multiplied with α·normalizer/T/S later: what is added must be without them.
    divergence_triton.add_span_gradient_(
        *stored,
        *place,
        scores,
        decision.targets_per_rationale if weighting.divide_by_targets else None,
        ratio=(weighting.divergence_normalizer, weighting.normalizer, weighting.divergence_weight),
        masses=masses,
        times_sum=True,
        inverse_sums=rows.inverse_sum[chunk.rows],
        ignore_index=weighting.ignore_index,
    )
