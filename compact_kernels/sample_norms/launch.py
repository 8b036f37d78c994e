"""The functions of :mod:`compact_kernels.sample_norms.plain` by Triton: launches its neighbour's kernels."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from compact_kernels.dispatch import INTERPRETER
from compact_kernels.dot import dot_precision
from compact_kernels.sample_norms import kernels
from compact_kernels.sample_norms.segments import BLOCK, SLICE, runs


class GramTile(NamedTuple):
    """How a Gram tile is computed: by measurement on an H100."""

    block_k: int = 64
    warps: int = 4
    stages: int = 4


class ProductTile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int


GRAM = GramTile()
GRAM_FLOAT32 = GramTile(block_k=32, warps=4, stages=2)
# Programs at least, where there is work enough for as many: what an H100's 132 multiprocessors hold at once.
GRAM_PROGRAMS = 396
PROGRAMS = 264  # of a product
NARROW_PROGRAMS = 528  # of one that is bound by what it reads
KINDS = "rms", "layer", "ones", "given"  # of the scale kernel
STORED_BLOCK = 512 if INTERPRETER else 4096  # entries of stored products that one program adds up


@functools.cache
def product_tile(m: int, n: int, dtype: torch.dtype = torch.bfloat16) -> ProductTile:
    """A product's tile by its shape and, in depth, its dtype; LoRA's narrow side is one tile."""
    if INTERPRETER:
        return ProductTile(32, max(16, triton.next_power_of_2(n)) if n <= 64 else 32, 16, 4, 1)
    if n <= 64:
        return ProductTile(128, max(16, triton.next_power_of_2(n)), 64, 4, 3)
    if m <= 64:
        return ProductTile(max(16, triton.next_power_of_2(m)), 128, 64, 4, 3)
    if dtype.itemsize == 2:
        return ProductTile(128, 128, 64, 8, 3)
    return ProductTile(128, 128, 32 if torch.version.cuda is not None else 16, 8, 2)  # AMD's GPUs have 64 KiB


@functools.cache
def product_parts(m: int, n: int) -> int:
    """Blocks of an (m, n) product, each of which has a part in its norm."""
    tile = product_tile(m, n)
    return triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)


class _Descriptor(TensorDescriptor):
    def __post_init__(self) -> None:
        """Nothing to check: :func:`_tiled` makes what Triton asks for."""


def _tiled(matrix: Tensor, rows: int, columns: int) -> _Descriptor:
    size, dim = matrix.element_size(), matrix.shape[1]
    stride, unit = matrix.stride()
    if unit != 1 or stride < dim or stride * size % 16 or matrix.data_ptr() % 16:
        copy = matrix.new_empty(matrix.shape[0], -(-dim * size // 16) * 16 // size)[:, :dim]
        matrix = copy.copy_(matrix)
        stride = matrix.stride(0)
    return _Descriptor(matrix, list(matrix.shape), [stride, 1], [rows, columns])


# Whether compiled kernels are kept: elsewhere Triton looks at more of a tensor (AMD: its size), or compiles nothing.
_KEPT = torch.version.cuda is not None and not INTERPRETER
_compiled: dict[tuple, Any] = {}
MOST_KEPT = 4096  # launches: strides and counts may go with a batch's length


def _launch(
    kernel: Any, grid: tuple[int, int, int], tensors: tuple[Any, ...], scalars: tuple[Any, ...], **options: int
) -> None:
    """A kernel of `tensors` (the last is written to) and then `scalars`, constexprs among them.

    Triton finds what it has compiled by binding every argument, which is half of a launch's time on the host. What it
    compiles anew for is known here: a tensor's dtype and alignment, a scalar's value, options.
    """
    kinds = [
        None if t is None else t.base.dtype if isinstance(t, _Descriptor) else (t.dtype, t.data_ptr() % 16 == 0)
        for t in tensors
    ]
    key = kernel, tensors[-1].get_device(), *kinds, *scalars, *options.values()
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](*tensors, *scalars)
        return
    compiled = kernel[grid](*tensors, *scalars, **options)
    if _KEPT:
        if len(_compiled) >= MOST_KEPT:
            _compiled.clear()
        _compiled[key] = compiled


def _unit(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def gram_norms(
    x: Tensor | None,
    grads: list[Tensor],
    biased: int,
    cu: Tensor,
    tiles: Tensor,
    factor: Tensor | None = None,
) -> Tensor:
    return _gram(x, None, grads, biased, cu, tiles, factor, 0)


def token_norms(ids: Tensor, gradient: Tensor, cu: Tensor, tiles: Tensor, ignored: int) -> Tensor:
    return _gram(None, ids.contiguous(), [gradient], 0, cu, tiles, None, ignored)


def _gram(
    x: Tensor | None,
    ids: Tensor | None,
    grads: list[Tensor],
    biased: int,
    cu: Tensor,
    tiles: Tensor,
    factor: Tensor | None,
    ignored: int,
) -> Tensor:
    count = tiles.shape[0]
    if count == 0:
        return torch.empty(0, dtype=torch.float32, device=grads[0].device)
    dtype = grads[0].dtype
    shape = GRAM_FLOAT32 if dtype == torch.float32 else GRAM
    block_k = 32 if INTERPRETER else shape.block_k
    mode = kernels.PRODUCT if x is not None else kernels.TOKENS if ids is not None else kernels.ONES
    descriptors = [_tiled(g if g.dtype == dtype else g.to(dtype), BLOCK, block_k) for g in grads]
    padded = [*descriptors, *[None] * (3 - len(grads))]
    dims = [0 if descriptor is None else descriptor.shape[1] for descriptor in padded]
    given = None if x is None else _tiled(x.to(dtype), BLOCK, block_k)
    widths = 0 if x is None else x.shape[1], sum(gradient.shape[1] for gradient in grads)
    parts = gram_parts(count, *widths)
    out = torch.empty(parts, count, dtype=torch.float32, device=grads[0].device)
    constants = mode.value, len(grads), biased, factor is not None, parts, widths[0] > widths[1], BLOCK, block_k
    _launch(
        kernels.gram_kernel,
        (count, parts, 1),
        (given, ids if ids is not None else cu, *padded, factor if factor is not None else out, cu, tiles, out),
        (widths[0], *dims, ignored, *constants, dot_precision(dtype)),
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    return out[0] if parts == 1 else out.sum(0)


def gram_parts(tiles: int, x_width: int, g_width: int) -> int:
    """Over how many programs a tile's wider matrix is split: the narrower one's tile is made by each of them."""
    narrow, wide = sorted((x_width, g_width))
    return max(1, min(GRAM_PROGRAMS // tiles, wide // max(narrow, 1), 16))


def product(a: Tensor, b: Tensor, cu: Tensor, weights: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    if offsets is not None:
        return _stored_product(a, b, weights, offsets.tolist())
    splits, tile = product_splits(a.shape[1], b.shape[1]), product_tile(a.shape[1], b.shape[1], a.dtype)
    # Parts that are yet to be added up are float32; a sum that is whole is rounded once.
    total = a.new_empty(splits, a.shape[1], b.shape[1], dtype=torch.float32 if splits > 1 else a.dtype)
    parts = product_parts(a.shape[1], b.shape[1])
    norms = torch.empty(parts, cu.shape[0] - 1, dtype=torch.float32, device=a.device)
    _product(a, b, cu, weights, total, norms, splits, tile, False)
    return total, norms


def _stored_product(a: Tensor, b: Tensor, weights: Tensor | None, offsets: list[int]) -> tuple[Tensor, Tensor]:
    """Rationales of one length are one product; the buffer is freed when it has been read."""
    (m, n), rationales = (a.shape[1], b.shape[1]), len(offsets) - 1
    total = a.new_empty(1, m, n)
    if a.device.type != "cuda":  # others have no product of narrower factors in float32
        a, b = a.float(), b.float()
    given = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
    b = b.to(a.dtype)
    products = a.new_empty(rationales, m, n, dtype=torch.float32)
    for first, count, length in runs(offsets):
        left, right = (x[offsets[first] : offsets[first + count]].unflatten(0, (count, length)) for x in (a, b))
        torch.bmm(left.transpose(1, 2), right, **given, out=products[first : first + count])
    parts = stored_parts(m, n)
    norms = torch.empty(parts, rationales, dtype=torch.float32, device=a.device)
    _launch(
        kernels.stored_kernel,
        (parts, 1, 1),
        (products, weights if weights is not None else norms, total, norms),
        (m * n, rationales, weights is not None, STORED_BLOCK),
        num_warps=4,
    )
    return total, norms


def stored_parts(m: int, n: int) -> int:
    """Blocks of a stored (m, n) product, each of which has a part in its norm."""
    return triton.cdiv(m * n, STORED_BLOCK)


@functools.cache
def product_splits(m: int, n: int) -> int:
    """Over how many programs the rationales are split; one without a rationale gives zeros."""
    programs = NARROW_PROGRAMS if min(m, n) <= 64 else PROGRAMS
    return max(1, min(32, programs // product_parts(m, n)))


def column_norms(a: Tensor, b: Tensor, cu: Tensor) -> Tensor:
    tile = product_tile(a.shape[1], b.shape[1], a.dtype)
    if b.shape[1] > tile.n:
        raise ValueError(f"column_norms takes at most {tile.n} columns, got {b.shape[1]}")
    norms = torch.empty(
        product_parts(a.shape[1], b.shape[1]), cu.shape[0] - 1, tile.n, dtype=torch.float32, device=a.device
    )
    _product(a, b, cu, None, None, norms, product_splits(a.shape[1], b.shape[1]), tile, True)
    return norms.sum(0)[:, : b.shape[1]]


def _product(
    a: Tensor,
    b: Tensor,
    cu: Tensor,
    weights: Tensor | None,
    total: Tensor | None,
    norms: Tensor,
    splits: int,
    tile: ProductTile,
    columns: bool,
) -> None:
    a, b = _unit(a), _unit(b.to(a.dtype))
    m, n = a.shape[1], b.shape[1]
    constants = weights is not None, total is not None, columns, splits, tile.m, tile.n, tile.k
    _launch(
        kernels.product_kernel,
        (product_parts(m, n), splits, 1),
        (a, b, cu, weights if weights is not None else norms, total if total is not None else norms, norms),
        (a.stride(0), b.stride(0), m, n, cu.shape[0] - 1, *constants, dot_precision(a.dtype)),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def scale_gradients(x: Tensor, gradient: Tensor, cu: Tensor, slices: int, kind: str, eps: float) -> Tensor:
    x, gradient = _unit(x), _unit(gradient)
    tokens, heads, dim = gradient.shape
    out = torch.empty(cu.shape[0] - 1, slices, dim, dtype=torch.float32, device=x.device)
    block, rows, warps = _scale_tile(dim, kind)
    _launch(
        kernels.scale_kernel,
        (out.shape[0] * slices, triton.cdiv(dim, block), 1),
        (x, gradient, cu, out),
        (*x.stride()[:2], *gradient.stride()[:2], heads, dim, slices, eps, KINDS.index(kind), SLICE, rows, block),
        num_warps=warps,
    )
    return out


@functools.cache
def _scale_tile(dim: int, kind: str) -> tuple[int, int, int]:
    """Its width, rows and warps.

    Rows that are normalised are read whole, others up to 4096 columns at once: on an H200 blocks of 256 of 896 columns
    took twice as long.
    """
    block = triton.next_power_of_2(dim)
    if kind in ("ones", "given"):
        block = min(block, 4096)
    rows = max(1, min(16, 8192 // block))
    return block, rows, max(4, min(16, rows * block // 2048))


def token_rows(
    gradient: Tensor,
    factor: Tensor | None,
    hidden: Tensor,
    cu_rows: Tensor,
    ids: Tensor,
    cu: Tensor,
    first: int,
    longest: int,
) -> Tensor:
    hidden, ids = _unit(hidden), ids.contiguous()
    dim = hidden.shape[1]
    out = torch.zeros(ids.shape[0], dim, dtype=torch.float32, device=hidden.device)
    block_t, block_d = (16, 32) if INTERPRETER else (64, 128)
    blocks = triton.cdiv(longest, block_t)
    constants = factor is not None, block_t, 32, block_d, dot_precision(hidden.dtype)
    _launch(
        kernels.token_rows_kernel,
        ((cu.shape[0] - 1) * blocks, triton.cdiv(dim, block_d), 1),
        (gradient, factor if factor is not None else hidden, hidden, cu_rows, ids, cu, out),
        (gradient.stride(0), hidden.stride(0), dim, first, gradient.shape[1], blocks, *constants),
        num_warps=4,
        num_stages=2,
    )
    return out
