"""Triton kernels of the linear head that work on rows: what is asked of a row by name, its statistics, its scaling.

See :mod:`compact_kernels.head.kernels` for E, its sums and the units of logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compact_kernels.dot import dot
from compact_kernels.head.kernels import difference, logit

SAFE_SUM = tl.constexpr(1e19)  # ΣE above it: E² could overflow
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["first_row", "num_rationales"])
def probe_kernel(
    x_ptr,  # (num_rows, D), unit stride along D
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,)
    target_ptr,  # (num_rows,) int64
    cu_rows_ptr,  # (S+1,) int32  offsets of the rationales' scored rows
    answer_ptr,  # (A,) int64  ids of the gold answers
    cu_answer_ptr,  # (S+1,) int32
    column_ptr,  # (num_rows,) int64  out: the target, or 0 where there is none
    flags_ptr,  # (tiles of rows, tiles of columns) int8, zeros  out: 1 where one of these columns is
    z_ptr,  # (num_rows,) float32  out: its logit
    slope_ptr,  # (num_rows,) float32  out: dz/draw there, without its constant
    evidence_ptr,  # (num_rows,) float32  out: mean logit of the answer's ids, +∞ where there is none
    first_row,
    num_rationales,
    vocabulary,
    dim,
    ignore_index,
    x_stride,
    weight_stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ANSWERS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The few logits of a row that are asked for by name: its target's (or column 0's) and its answer's."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    # An id out of range must not read foreign memory; what it gives is NaN, as the host cannot be asked to raise.
    known = (target >= 0) & (target < vocabulary)
    column = tl.where(known, target, 0)
    z, slope = _one_logit(
        x_ptr + row * x_stride, weight_ptr, bias_ptr, column,
        dim, weight_stride, inner, outer, SOFTCAP, HAS_BIAS, BLOCK_D,
    )  # fmt: skip
    z = tl.where(known | (target == ignore_index), z, float("nan"))
    tl.store(column_ptr + row, column)
    tl.store(flags_ptr + row // TILE_M * tl.cdiv(vocabulary, TILE_N) + column // TILE_N, 1)
    tl.store(z_ptr + row, z)
    if SOFTCAP:
        tl.store(slope_ptr + row, slope)
    if HAS_ANSWERS:
        low, high = 0, num_rationales  # the row's rationale: the last one that does not start after it
        while high - low > 1:
            middle = (low + high) // 2
            if tl.load(cu_rows_ptr + middle) <= first_row + row:
                low = middle
            else:
                high = middle
        first = tl.load(cu_answer_ptr + low)
        last = tl.load(cu_answer_ptr + low + 1)
        total = 0.0
        for place in range(first, last):
            answer = tl.load(answer_ptr + place)
            known = (answer >= 0) & (answer < vocabulary)
            z, slope = _one_logit(
                x_ptr + row * x_stride, weight_ptr, bias_ptr, tl.where(known, answer, 0),
                dim, weight_stride, inner, outer, SOFTCAP, HAS_BIAS, BLOCK_D,
            )  # fmt: skip
            total += tl.where(known, z, float("nan"))
        tl.store(evidence_ptr + row, tl.where(last > first, total / tl.maximum(last - first, 1), float("inf")))


@triton.jit
def _one_logit(
    x_ptr, weight_ptr, bias_ptr, column, dim, weight_stride, inner, outer,
    SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + d, mask=d < dim, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + column * weight_stride + d, mask=d < dim, other=0.0).to(tl.float32)
        total += x * w
    raw = tl.sum(total, 0)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + column).to(tl.float32)
    return logit(raw, inner, outer, SOFTCAP)


@triton.jit(do_not_specialize=["num_rows", "parts", "table_stride"])
def finish_kernel(
    sums_ptr,  # (parts, num_rows, 4) float32
    target_ptr,  # (num_rows,) int64
    column_ptr,  # (num_rows,) int64
    z_ptr,  # (num_rows,) float32  the logit of the target, which is the pivot
    slope_ptr,  # (num_rows,) float32  softcap's slope at the target
    probe_ptr,  # (num_rows,) float32  mean logit of the answer's ids; +∞ where there is none
    table_ptr,  # (10, table_stride) float32, from the chunk's first column on: the fields of RowStatistics
    rows_ptr,  # the stored rows of E, row stride `stride`
    x_ptr,  # (num_rows, D), unit stride along D
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,)
    num_rows,
    parts,
    table_stride,
    stride,
    ignore_index,
    vocabulary,
    dim,
    x_stride,
    weight_stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORED: tl.constexpr,
    HAS_ANSWERS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """From the sums over tiles to the statistics of a row; sets the target's entry of the stored row."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    s = tl.zeros((ROWS,), dtype=tl.float32)
    q = tl.zeros((ROWS,), dtype=tl.float32)
    t = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        place = sums_ptr + (part.to(tl.int64)[:, None] * num_rows + rows[None, :]) * 4
        mask = (part < parts)[:, None] & inside[None, :]
        s += tl.sum(tl.load(place, mask=mask, other=0.0), 0)
        t += tl.sum(tl.load(place + 1, mask=mask, other=0.0), 0)
        q += tl.sum(tl.load(place + 2, mask=mask, other=0.0), 0)
    target = tl.load(target_ptr + rows, mask=inside, other=0)
    column = tl.load(column_ptr + rows, mask=inside, other=0)
    z = tl.load(z_ptr + rows, mask=inside, other=0.0)
    pivot = z
    unsafe = s > SAFE_SUM
    if tl.max(unsafe.to(tl.int32), 0) > 0:
        top = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
        for start in range(0, vocabulary, 64):
            tile, slope = _few_logits(
                x_ptr, weight_ptr, bias_ptr, rows, start, num_rows, vocabulary, dim, x_stride, weight_stride,
                inner, outer, SOFTCAP, HAS_BIAS, PRECISION,
            )  # fmt: skip
            top = tl.maximum(top, tl.max(tile, 1))
        pivot = tl.where(unsafe, top, pivot)
        s_again = tl.zeros((ROWS,), dtype=tl.float32)
        q_again = tl.zeros((ROWS,), dtype=tl.float32)
        t_again = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, vocabulary, 64):
            tile, slope = _few_logits(
                x_ptr, weight_ptr, bias_ptr, rows, start, num_rows, vocabulary, dim, x_stride, weight_stride,
                inner, outer, SOFTCAP, HAS_BIAS, PRECISION,
            )  # fmt: skip
            v = start + tl.arange(0, 64)
            kept = v[None, :] != column[:, None]
            u = difference(tile, pivot[:, None], inner, SOFTCAP)
            u = tl.where(kept, tl.maximum(u, -1.0e4), -1.0e4)
            e = tl.exp2(u)
            s_again += tl.sum(e, 1)
            q_again += tl.sum(e * e, 1)
            t_again += tl.sum(e * u, 1)
            if STORED:
                place = rows_ptr + rows.to(tl.int64)[:, None] * stride + v[None, :]
                mask = kept & (unsafe & inside)[:, None] & (v < vocabulary)[None, :]
                tl.store(place, (e * slope).to(rows_ptr.dtype.element_ty), mask=mask)
        s = tl.where(unsafe, s_again, s)
        q = tl.where(unsafe, q_again, q)
        t = tl.where(unsafe, t_again, t)

    counted = target != ignore_index
    target_u = difference(z, pivot, inner, SOFTCAP)  # about 0 unless the pivot is the row's maximum
    mass = tl.exp2(target_u)
    own = tl.maximum(target_u, -1.0e4)  # a forbidden target: 0·(−∞) is NaN
    total = s + mass
    others = s / total
    logprob = tl.where(unsafe, target_u * LN2 - tl.log(total), -_log1p(s / mass))
    log_total = tl.where(unsafe, tl.log(total), own * LN2 - logprob)
    # Relative to the pivot, u₂ is 0 at the pivot and `own` at the target.
    entropy = log_total - (t + mass * own) * LN2 / total
    norm = tl.sqrt(others * others + q / total / total)
    evidence = tl.zeros((ROWS,), dtype=tl.float32)
    if HAS_ANSWERS:
        probe = tl.load(probe_ptr + rows, mask=inside, other=0.0)
        gap = difference(probe, pivot, inner, SOFTCAP)
        evidence = tl.where(probe == float("inf"), 0.0, gap * LN2 - log_total)
    slope_at_target = tl.full((ROWS,), 1.0, dtype=tl.float32)
    if SOFTCAP:
        slope_at_target = tl.load(slope_ptr + rows, mask=inside, other=0.0)
    place = table_ptr + rows
    tl.store(place, tl.where(counted, logprob, 0.0), mask=inside)
    tl.store(place + table_stride, entropy, mask=inside)
    tl.store(place + 2 * table_stride, evidence, mask=inside)
    tl.store(place + 3 * table_stride, tl.where(counted, norm, 0.0), mask=inside)
    tl.store(place + 4 * table_stride, others, mask=inside)
    tl.store(place + 5 * table_stride, tl.where(counted, 1.0 / total, 0.0), mask=inside)
    tl.store(place + 6 * table_stride, pivot, mask=inside)
    tl.store(place + 7 * table_stride, total, mask=inside)
    tl.store(place + 8 * table_stride, mass, mask=inside)
    tl.store(place + 9 * table_stride, slope_at_target, mask=inside)
    if STORED:
        place = rows_ptr + rows.to(tl.int64) * stride + column
        tl.store(place, (-s * slope_at_target).to(rows_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _few_logits(
    x_ptr, weight_ptr, bias_ptr, rows, first, num_rows, vocabulary, dim, x_stride, weight_stride, inner, outer,
    SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of 64 columns of a few rows, −∞ beyond the vocabulary, and the softcap's slope: slow, seldom needed."""
    v = first + tl.arange(0, 64)
    in_rows = rows < num_rows
    in_columns = v < vocabulary
    acc = tl.zeros((rows.shape[0], 64), dtype=tl.float32)
    for start in range(0, dim, 64):
        d = start + tl.arange(0, 64)
        x_place = x_ptr + rows.to(tl.int64)[:, None] * x_stride + d[None, :]
        w_place = weight_ptr + v.to(tl.int64)[None, :] * weight_stride + d[:, None]
        x = tl.load(x_place, mask=in_rows[:, None] & (d < dim)[None, :], other=0.0)
        w = tl.load(w_place, mask=(d < dim)[:, None] & in_columns[None, :], other=0.0)
        acc = dot(x, w, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + v, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    z, slope = logit(acc, inner, outer, SOFTCAP)
    return tl.where(in_columns[None, :], z, -float("inf")), slope


@triton.jit
def _log1p(x):
    """log(1 + x) with a small relative error for small x too, where the hardware's logarithm has an absolute one."""
    r = x / (2.0 + x)
    r2 = r * r
    series = 2.0 * r * (1.0 + r2 * (1 / 3 + r2 * (1 / 5 + r2 * (1 / 7 + r2 * (1 / 9)))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit(do_not_specialize=["num_rows", "first_column", "width"])
def target_kernel(
    rows_ptr,  # (num_rows, width), row stride `stride`
    target_ptr,  # (num_rows,) int64
    value_ptr,  # (num_rows,) float32
    num_rows,
    first_column,
    width,
    stride,
    ROWS: tl.constexpr,
):
    """Write one value a row, into its target's column where this block holds it."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.load(target_ptr + rows, mask=rows < num_rows, other=-1) - first_column
    here = (rows < num_rows) & (column >= 0) & (column < width)
    value = tl.load(value_ptr + rows, mask=here, other=0.0)
    tl.store(rows_ptr + rows.to(tl.int64) * stride + column, value.to(rows_ptr.dtype.element_ty), mask=here)


@triton.jit
def scale_rows_kernel(
    source_ptr,  # (n, D) row stride `source_stride`
    first_ptr,  # (n,) float32
    second_ptr,  # (n,) float32
    place_ptr,  # (n,) int64  the row of `out` that each row goes to
    out_ptr,  # (m, D) row stride `out_stride`
    dim,
    source_stride,
    out_stride,
    constant,
    HAS_SECOND: tl.constexpr,
    SCATTER: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[place[i]] = source[i]·first[i]·second[i]·constant, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(first_ptr + row) * constant
    if HAS_SECOND:
        factor *= tl.load(second_ptr + row)
    to = row
    if SCATTER:
        to = tl.load(place_ptr + row)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(source_ptr + row * source_stride + d, mask=d < dim, other=0.0).to(tl.float32)
        tl.store(out_ptr + to * out_stride + d, (x * factor).to(out_ptr.dtype.element_ty), mask=d < dim)


@triton.jit
def rescale_kernel(source_ptr, factor_ptr, out_ptr, count, SAME: tl.constexpr, BLOCK: tl.constexpr):
    """out = source·factor over flat memory; nothing is read or written where out is source and the factor is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if SAME:
        if factor == 1.0:
            return
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source_ptr + place, mask=place < count).to(tl.float32) * factor
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=place < count)
