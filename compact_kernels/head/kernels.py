"""Triton kernels of the linear head: a matrix product whose epilogue is the softmax.

Logits never reach memory. For a row with hidden state x, z = the head's logits and a *pivot* column (the target), the
product's epilogue turns a tile of accumulators into E = exp(z − z_pivot) at once, because the pivot's logit is one
dot product and known beforehand. bfloat16 has float32's exponents, so E needs no maximum: it is stored as it is, and
whatever depends on the whole row, 1/ΣE and the rationale's weight, becomes one factor a row that the following
products carry (dX = v ⊙ (E W), dW = Eᵀ (v ⊙ X)). Rows whose ΣE leaves the safe range (a target less probable than
e⁻⁴³) are done again, slowly, with their true maximum as pivot; nothing waits for the host to find that out.

Statistics are sums over v ≠ target, so a confident token (p → 1) loses nothing to cancellation:
S = ΣE, Q = ΣE², U = ΣE·(z − z_pivot), from which log p = −log1p(S), the entropy and ‖p − e_y‖ follow.

A logit z is held raw, as h Wᵀ + b, or with a softcap as z·log₂e; u₂ = (z − z_pivot)·log₂e, one fused operation on raw
logits: E is relative to the pivot's logit as it was rounded, and u₂ of the target then is a rounding error, not 0.
Offsets are int64 where rows and columns multiply.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compact_kernels.dot import dot

STATISTICS = tl.constexpr(0)  # sums of every (row, tile); nothing is stored
EXPONENTIALS = tl.constexpr(1)  # the same, and E is stored
GRADIENT = tl.constexpr(2)  # E·(a + b·u₂) is stored

SAFE_SUM = tl.constexpr(1e19)  # ΣE above it: E² could overflow
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _logit(raw, inner, outer, SOFTCAP: tl.constexpr):
    """A logit in the kernels' own unit, and dz/draw without its constant factor."""
    if SOFTCAP:
        t = 2.0 * tl.sigmoid(2.0 * raw * inner) - 1.0  # tanh; libdevice's is missing on some backends
        return t * outer, 1.0 - t * t
    else:
        return raw, 1.0


@triton.jit
def _difference(z, pivot, inner, SOFTCAP: tl.constexpr):
    """u₂ = (z − pivot)·log₂e, rounded once: all of a row share the rounding of pivot·inner."""
    if SOFTCAP:
        return z - pivot
    else:
        return tl.fma(z, inner, -(pivot * inner))


@triton.jit(do_not_specialize=["num_rows", "first_column"])
def logits_kernel(
    x_desc,  # (num_rows, D)
    w_desc,  # (V, D)
    out_desc,  # (num_rows, width)
    bias_ptr,  # (V,)
    column_ptr,  # (num_rows,) int64  the target's column, left out of the sums
    flags_ptr,  # (tiles_m, tiles_n) int8  whether a tile holds such a column
    pivot_ptr,  # (num_rows,) float32  the pivot's logit
    slope_ptr,  # (num_rows,) float32  a    (GRADIENT)
    curve_ptr,  # (num_rows,) float32  b    (GRADIENT)
    sums_ptr,  # (tiles_n, num_rows, 4) float32  ΣE, ΣE·u₂, ΣE², and nothing
    num_rows,
    dim,
    first_column,  # of the head: the stored columns are first_column … first_column + width − 1
    width,
    inner,
    outer,
    MODE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CURVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(width, BLOCK_N)
    group_size = GROUP_M * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        # Row tiles of a group are neighbours, so that they share a tile of the weight in the L2 cache.
        group = tile // group_size
        rows_in_group = min(tiles_m - group * GROUP_M, GROUP_M)
        tile_m = group * GROUP_M + (tile % group_size) % rows_in_group
        tile_n = (tile % group_size) // rows_in_group
        row0 = tile_m * BLOCK_M
        column0 = tile_n * BLOCK_N
        # What the epilogue needs is fetched before the product, which hides the way.
        rows = row0 + tl.arange(0, BLOCK_M)
        in_rows = rows < num_rows
        pivot = tl.load(pivot_ptr + rows, mask=in_rows, other=0.0)
        special = column0 + BLOCK_N > width
        if MODE != GRADIENT:
            special |= tl.load(flags_ptr + tile_m * tiles_n + tile_n) != 0

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(0, tl.cdiv(dim, BLOCK_K)):
            x = x_desc.load([row0, k * BLOCK_K])
            w = w_desc.load([first_column + column0, k * BLOCK_K])
            acc = dot(x, w.T, acc, PRECISION)

        # Half a tile at a time: its temporaries fit the registers, and its way to memory half the room.
        left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        s, q, t = _epilogue(
            left, rows, in_rows, pivot, special, row0, column0,
            out_desc, bias_ptr, column_ptr, slope_ptr, curve_ptr,
            first_column, width, inner, outer,
            MODE, SOFTCAP, HAS_BIAS, HAS_CURVE, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        s2, q2, t2 = _epilogue(
            right, rows, in_rows, pivot, special, row0, column0 + BLOCK_N // 2,
            out_desc, bias_ptr, column_ptr, slope_ptr, curve_ptr,
            first_column, width, inner, outer,
            MODE, SOFTCAP, HAS_BIAS, HAS_CURVE, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        if MODE != GRADIENT:
            # Side by side, so that they change threads once: (s, t), (q, –) of a row.
            sums = tl.join(tl.join(s + s2, q + q2), tl.join(t + t2, t + t2)).reshape(BLOCK_M, 4)
            place = (tile_n.to(tl.int64) * num_rows + rows)[:, None] * 4 + tl.arange(0, 4)[None, :]
            tl.store(sums_ptr + place, sums, mask=in_rows[:, None])


@triton.jit
def _epilogue(
    acc, rows, in_rows, pivot, special, row0, column0,
    out_desc, bias_ptr, column_ptr, slope_ptr, curve_ptr,
    first_column, width, inner, outer,
    MODE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CURVE: tl.constexpr,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Stores what `MODE` asks for; returns ΣE, ΣE² and ΣE·u₂ of each row over these columns."""
    columns = column0 + tl.arange(0, COLUMNS)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first_column + columns, mask=columns < width, other=0.0).to(tl.float32)
        acc += bias[None, :]
    z, slope = _logit(acc, inner, outer, SOFTCAP)
    u = _difference(z, pivot[:, None], inner, SOFTCAP)
    if MODE == GRADIENT:
        factor = tl.load(slope_ptr + rows, mask=in_rows, other=0.0)[:, None]
        if HAS_CURVE:  # E·u is 0 for a forbidden token, whose logit is −∞
            factor += tl.load(curve_ptr + rows, mask=in_rows, other=0.0)[:, None] * tl.maximum(u, -1.0e4)
        out_desc.store([row0, column0], (tl.exp2(u) * factor * slope).to(out_desc.dtype))
        return pivot, pivot, pivot
    if HAS_BIAS:
        u = tl.maximum(u, -1.0e4)  # a forbidden token: E = 0, and 0·(−∞) is NaN
    if special:
        target = (tl.load(column_ptr + rows, mask=in_rows, other=-1) - column0).to(tl.int32)
        kept = (tl.arange(0, COLUMNS)[None, :] != target[:, None]) & (columns < width)[None, :]
        u = tl.where(kept, u, -1.0e4)
    e = tl.exp2(u)
    if MODE == EXPONENTIALS:
        out_desc.store([row0, column0], (e * slope).to(out_desc.dtype))
    return tl.sum(e, 1), tl.sum(e * e, 1), tl.sum(e * u, 1)


@triton.jit(do_not_specialize=["num_rows"])
def last_product_kernel(
    e_desc,  # (num_rows, V)
    x_desc,  # (num_rows, D)
    sums_ptr,  # (V, D) float32
    out_desc,  # (V, D)
    num_rows,
    vocabulary,
    dim,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = sums + Eᵀ X, rounded once: the last of the products that add up, which need not be read again."""
    tiles_m = tl.cdiv(vocabulary, BLOCK_M)
    tiles_n = tl.cdiv(dim, BLOCK_N)
    group_size = GROUP_M * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        group = tile // group_size
        rows_in_group = min(tiles_m - group * GROUP_M, GROUP_M)
        row0 = (group * GROUP_M + (tile % group_size) % rows_in_group) * BLOCK_M
        column0 = ((tile % group_size) // rows_in_group) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(0, tl.cdiv(num_rows, BLOCK_K)):
            e = e_desc.load([k * BLOCK_K, row0])
            x = x_desc.load([k * BLOCK_K, column0])
            acc = dot(e.T, x, acc, PRECISION)
        # A quarter at a time: the sums change threads on their way in, and the room for that is small.
        left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        first, second = left.reshape(BLOCK_M, 2, BLOCK_N // 4).permute(0, 2, 1).split()
        third, fourth = right.reshape(BLOCK_M, 2, BLOCK_N // 4).permute(0, 2, 1).split()
        _add_and_store(first, sums_ptr, out_desc, row0, column0, vocabulary, dim)
        _add_and_store(second, sums_ptr, out_desc, row0, column0 + BLOCK_N // 4, vocabulary, dim)
        _add_and_store(third, sums_ptr, out_desc, row0, column0 + BLOCK_N // 2, vocabulary, dim)
        _add_and_store(fourth, sums_ptr, out_desc, row0, column0 + 3 * (BLOCK_N // 4), vocabulary, dim)


@triton.jit
def _add_and_store(acc, sums_ptr, out_desc, row0, column0, num_rows, num_columns):
    rows = row0 + tl.arange(0, acc.shape[0])
    columns = column0 + tl.arange(0, acc.shape[1])
    place = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    acc += tl.load(sums_ptr + place, mask=mask, other=0.0)
    out_desc.store([row0, column0], acc.to(out_desc.dtype))


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
    return _logit(raw, inner, outer, SOFTCAP)


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
            u = _difference(tile, pivot[:, None], inner, SOFTCAP)
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
    target_u = _difference(z, pivot, inner, SOFTCAP)  # about 0 unless the pivot is the row's maximum
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
        gap = _difference(probe, pivot, inner, SOFTCAP)
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
    z, slope = _logit(acc, inner, outer, SOFTCAP)
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
