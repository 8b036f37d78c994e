"""Triton kernels of per-rationale gradient norms.

gram_kernel: ‖GᵀX‖² = Σ_ij (XXᵀ)_ij (GGᵀ)_ij. A program holds one tile of both Gram matrices in registers, multiplies
them entry by entry and writes one number: no T×T matrix reaches memory. Tiles on and below the diagonal suffice;
layers with one input share XXᵀ, and their GGᵀ add up in one accumulator. A bias is a layer whose input is 1, an
embedding one whose input is one-hot: their XXᵀ is 1, or whether two tokens are equal. Where tiles are few, the wider
matrix's columns are split over programs, each of which makes the narrower one's tile again.

product_kernel: a_sᵀb_s rationale by rationale, its square's sum, and Σ_s w_s a_sᵀb_s, from one pass. A rationale's
tokens are never split over programs, because the square is of their sum.

stored_kernel: the same of a_sᵀb_s that are in memory already.

All of it is deterministic: every output element has one writer, and sums have a fixed order. Tiles that reach beyond
a rationale's end read its neighbour's rows; their entries are selected away, so that a NaN there stays there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compact_kernels.dot import dot

PRODUCT = tl.constexpr(0)  # X's Gram matrix is a product
ONES = tl.constexpr(1)  # is 1
TOKENS = tl.constexpr(2)  # is whether two tokens are equal


@triton.jit
def _add_gram(
    acc, desc, row0, column0, diagonal, dim, part,
    PARTS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + A Aᵀ of the rows from row0 and the columns from column0 on, over a part of A's own columns.

    A diagonal tile reads its rows once.
    """
    blocks = tl.cdiv(dim, BLOCK_K)
    first, last = blocks * part // PARTS, blocks * (part + 1) // PARTS
    if diagonal:
        for k in tl.range(first, last):
            a = desc.load([row0, k * BLOCK_K])
            acc = dot(a, a.T, acc, PRECISION)
    else:
        for k in tl.range(first, last):
            a = desc.load([row0, k * BLOCK_K])
            b = desc.load([column0, k * BLOCK_K])
            acc = dot(a, b.T, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["ignored"])
def gram_kernel(
    x_desc,  # (T, D); None unless INPUT is PRODUCT
    ids_ptr,  # (T,) int64; where INPUT is TOKENS
    g0_desc,  # (T, D0)
    g1_desc,  # None from LAYERS on
    g2_desc,
    factor_ptr,  # (T,) float32
    cu_ptr,  # (S+1,) int32
    tiles_ptr,  # (M, 3) int32
    out_ptr,  # (PARTS, M) float32
    x_dim,
    g0_dim,
    g1_dim,
    g2_dim,
    ignored,
    INPUT: tl.constexpr,
    LAYERS: tl.constexpr,
    BIASED: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT_INPUT: tl.constexpr,  # X's columns are split over the parts, or the layers'
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    X_PARTS: tl.constexpr = PARTS if SPLIT_INPUT else 1
    G_PARTS: tl.constexpr = 1 if SPLIT_INPUT else PARTS
    x_part = part if SPLIT_INPUT else 0
    g_part = 0 if SPLIT_INPUT else part
    sequence = tl.load(tiles_ptr + tile * 3)
    i = tl.load(tiles_ptr + tile * 3 + 1)
    j = tl.load(tiles_ptr + tile * 3 + 2)
    start = tl.load(cu_ptr + sequence)
    end = tl.load(cu_ptr + sequence + 1)
    row0, column0, diagonal = start + i * BLOCK, start + j * BLOCK, i == j
    rows = row0 + tl.arange(0, BLOCK)
    columns = column0 + tl.arange(0, BLOCK)
    inside = (rows < end)[:, None] & (columns < end)[None, :]

    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    biases = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    acc = _add_gram(acc, g0_desc, row0, column0, diagonal, g0_dim, g_part, G_PARTS, BLOCK_K, PRECISION)
    if BIASED == 1 and LAYERS > 1:
        biases = acc
    if LAYERS > 1:
        acc = _add_gram(acc, g1_desc, row0, column0, diagonal, g1_dim, g_part, G_PARTS, BLOCK_K, PRECISION)
    if BIASED == 2 and LAYERS > 2:
        biases = acc
    if LAYERS > 2:
        acc = _add_gram(acc, g2_desc, row0, column0, diagonal, g2_dim, g_part, G_PARTS, BLOCK_K, PRECISION)
    if HAS_FACTOR:  # one after the other: the product of two may be too small for float32 where G is large
        left = tl.load(factor_ptr + rows, mask=rows < end, other=0.0)[:, None]
        right = tl.load(factor_ptr + columns, mask=columns < end, other=0.0)[None, :]
        acc = acc * left * right
        biases = biases * left * right
    acc = tl.where(inside, acc, 0.0)
    total = 0.0
    if INPUT == PRODUCT:
        if BIASED == LAYERS:
            total += tl.where(x_part == 0, tl.sum(acc), 0.0)
        elif BIASED > 0:
            total += tl.where(x_part == 0, tl.sum(tl.where(inside, biases, 0.0)), 0.0)
        x_acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        x_acc = _add_gram(x_acc, x_desc, row0, column0, diagonal, x_dim, x_part, X_PARTS, BLOCK_K, PRECISION)
        total += tl.sum(tl.where(inside, acc * x_acc, 0.0))
    elif INPUT == TOKENS:
        row_ids = tl.load(ids_ptr + rows, mask=rows < end, other=-1)
        column_ids = tl.load(ids_ptr + columns, mask=columns < end, other=-1)
        same = (row_ids[:, None] == column_ids[None, :]) & (row_ids != ignored)[:, None]
        total += tl.sum(tl.where(same, acc, 0.0))
    else:
        total += tl.sum(acc)
    tl.store(out_ptr + part * tl.num_programs(0) + tile, tl.where(diagonal, total, 2.0 * total))


@triton.jit(do_not_specialize=["sequences"])
def product_kernel(
    a_ptr,  # (T, M), unit stride along M
    b_ptr,  # (T, N), unit stride along N
    cu_ptr,  # (S+1,) int32
    weights_ptr,  # (S,) float32
    sum_ptr,  # (splits, M, N)
    norms_ptr,  # (tiles, S) float32; with COLUMNS (tiles, S, BLOCK_N)
    a_stride,
    b_stride,
    M,
    N,
    sequences,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SUM: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    m = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_in, n_in = m < M, n < N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for s in range(sequences * split // SPLITS, sequences * (split + 1) // SPLITS):
        start = tl.load(cu_ptr + s)
        end = tl.load(cu_ptr + s + 1)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(start, end, BLOCK_K):
            row = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
            row_in = row < end
            a_at = a_ptr + row[:, None] * a_stride + m[None, :]
            b_at = b_ptr + row[:, None] * b_stride + n[None, :]
            a = tl.load(a_at, mask=row_in[:, None] & m_in[None, :], other=0.0)
            b = tl.load(b_at, mask=row_in[:, None] & n_in[None, :], other=0.0)
            acc = dot(a.T, b, acc, PRECISION)
        place = tile.to(tl.int64) * sequences + s
        if COLUMNS:
            tl.store(norms_ptr + place * BLOCK_N + tl.arange(0, BLOCK_N), tl.sum(acc * acc, 0))
        else:
            tl.store(norms_ptr + place, tl.sum(acc * acc))
        if HAS_SUM:
            if HAS_WEIGHTS:
                total += acc * tl.load(weights_ptr + s)
            else:
                total += acc
    if HAS_SUM:
        out = sum_ptr + (split.to(tl.int64) * M + m[:, None]) * N + n[None, :]
        tl.store(out, total.to(sum_ptr.dtype.element_ty), mask=m_in[:, None] & n_in[None, :])


@triton.jit(do_not_specialize=["sequences"])
def stored_kernel(
    products_ptr,  # (S, size) float32
    weights_ptr,  # (S,) float32
    sum_ptr,  # (size,)
    norms_ptr,  # (blocks, S) float32
    size,
    sequences,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    own_at = products_ptr + place
    for s in range(sequences):
        own = tl.load(own_at, mask=inside, other=0.0)
        own_at += size
        tl.store(norms_ptr + block * sequences + s, tl.sum(own * own))
        if HAS_WEIGHTS:
            total += own * tl.load(weights_ptr + s)
        else:
            total += own
    tl.store(sum_ptr + place, total.to(sum_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_kernel(
    x_ptr,  # (T, h, D), unit stride along D
    g_ptr,
    cu_ptr,  # (S+1,) int32
    out_ptr,  # (S, slices, D) float32
    x_token, x_head, g_token, g_head,  # strides
    heads,
    dim,
    slices,
    eps,
    KIND: tl.constexpr,  # 0 x/rms, 1 (x − mean)/std, 2 ones, 3 x
    SLICE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One slice of one rationale: Σ x̂ ∘ g over its rows; with KIND 2 and 3 some of its columns alone."""
    s = tl.program_id(0) // slices
    piece = tl.program_id(0) % slices
    start = tl.load(cu_ptr + s) + piece * SLICE
    end = tl.minimum(start + SLICE, tl.load(cu_ptr + s + 1))
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_in = d < dim
    total = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for k in range(start * heads, end * heads, ROWS):
        row = k + tl.arange(0, ROWS)
        token, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
        mask = (row < end * heads)[:, None] & d_in[None, :]
        g_at = g_ptr + token[:, None] * g_token + head[:, None] * g_head + d[None, :]
        g = tl.load(g_at, mask=mask, other=0.0).to(tl.float32)
        if KIND == 2:
            total += g
        else:
            x_at = x_ptr + token[:, None] * x_token + head[:, None] * x_head + d[None, :]
            x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
            if KIND == 1:
                x = tl.where(d_in[None, :], x - (tl.sum(x, 1) / dim)[:, None], 0.0)
            if KIND != 3:
                inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / dim + eps)
                x = tl.where(mask, x * inverse[:, None], 0.0)  # an eps of 0 makes a row beyond the end NaN
            total += x * g
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * dim + d, tl.sum(total, 0), mask=d_in)


@triton.jit(do_not_specialize=["first", "width"])
def token_rows_kernel(
    g_ptr,  # (N, width)
    factor_ptr,  # (N,) float32
    hidden_ptr,  # (N, D), unit stride along D
    cu_rows_ptr,  # (S+1,) int32
    ids_ptr,  # (T,) int64
    cu_ptr,  # (S+1,) int32
    out_ptr,  # (T, D)
    g_stride,
    hidden_stride,
    dim,
    first,
    width,
    blocks,
    HAS_FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows id_t of the head's gradient by one rationale, for a block of its tokens and a block of D."""
    s = tl.program_id(0) // blocks
    start = tl.load(cu_ptr + s) + (tl.program_id(0) % blocks) * BLOCK_T
    end = tl.load(cu_ptr + s + 1)
    if start >= end:
        return
    token = start + tl.arange(0, BLOCK_T)
    t_in = token < end
    column = tl.load(ids_ptr + token, mask=t_in, other=-1) - first
    known = t_in & (column >= 0) & (column < width)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_in = d < dim
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    last = tl.load(cu_rows_ptr + s + 1)
    for k in range(tl.load(cu_rows_ptr + s), last, BLOCK_R):
        row = (k + tl.arange(0, BLOCK_R)).to(tl.int64)
        r_in = row < last
        g_at = g_ptr + row[None, :] * g_stride + column[:, None]
        g = tl.load(g_at, mask=known[:, None] & r_in[None, :], other=0.0)
        if HAS_FACTOR:
            g = (g.to(tl.float32) * tl.load(factor_ptr + row, mask=r_in, other=0.0)[None, :]).to(
                g_ptr.dtype.element_ty
            )
        h = tl.load(
            hidden_ptr + row[:, None] * hidden_stride + d[None, :], mask=r_in[:, None] & d_in[None, :], other=0.0
        )
        acc = dot(g, h, acc, PRECISION)
    out = out_ptr + token.to(tl.int64)[:, None] * dim + d[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=t_in[:, None] & d_in[None, :])
