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


@triton.jit
def logit(raw, inner, outer, SOFTCAP: tl.constexpr):
    """A logit in the kernels' own unit, and dz/draw without its constant factor."""
    if SOFTCAP:
        t = 2.0 * tl.sigmoid(2.0 * raw * inner) - 1.0  # tanh; libdevice's is missing on some backends
        return t * outer, 1.0 - t * t
    else:
        return raw, 1.0


@triton.jit
def difference(z, pivot, inner, SOFTCAP: tl.constexpr):
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
            MODE, SOFTCAP, HAS_BIAS, HAS_CURVE, BLOCK_N // 2,
        )  # fmt: skip
        s2, q2, t2 = _epilogue(
            right, rows, in_rows, pivot, special, row0, column0 + BLOCK_N // 2,
            out_desc, bias_ptr, column_ptr, slope_ptr, curve_ptr,
            first_column, width, inner, outer,
            MODE, SOFTCAP, HAS_BIAS, HAS_CURVE, BLOCK_N // 2,
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
    MODE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CURVE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Stores what `MODE` asks for; returns ΣE, ΣE² and ΣE·u₂ of each row over these columns."""
    columns = column0 + tl.arange(0, COLUMNS)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first_column + columns, mask=columns < width, other=0.0).to(tl.float32)
        acc += bias[None, :]
    z, slope = logit(acc, inner, outer, SOFTCAP)
    u = difference(z, pivot[:, None], inner, SOFTCAP)
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
