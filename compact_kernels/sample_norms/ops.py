"""The products of per-rationale norms, by whoever computes them: Triton where it runs, plain torch elsewhere.

Eager calls go straight there; a graph holds them as ops of torch.library.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from compact_kernels.dispatch import triton_applies
from compact_kernels.sample_norms import plain

LAYERS = 3  # that a launch of the Gram kernel takes at once


def backend_for(tensor: Tensor) -> ModuleType:
    if triton_applies(tensor):
        from compact_kernels.sample_norms import launch

        return launch
    return plain


def product_parts(m: int, n: int, like: Tensor, stored: bool) -> int:
    """Parts of the norms that :func:`product` gives on the device of `like`, with its products `stored` or not."""
    if triton_applies(like):
        from compact_kernels.sample_norms import launch

        return launch.stored_parts(m, n) if stored else launch.product_parts(m, n)
    return 1


def gram_norms(
    x: Tensor | None, grads: list[Tensor], biased: int, cu: Tensor, tiles: Tensor, factor: Tensor | None = None
) -> Tensor:
    """See :func:`compact_kernels.sample_norms.plain.gram_norms`."""
    if torch.compiler.is_compiling():
        return torch.ops.compact_kernels.sample_gram_norms(x, grads, biased, cu, tiles, factor)
    return _gram_norms(x, grads, biased, cu, tiles, factor)


def _gram_norms(
    x: Tensor | None, grads: list[Tensor], biased: int, cu: Tensor, tiles: Tensor, factor: Tensor | None
) -> Tensor:
    backend = backend_for(grads[0])
    parts: list[Tensor] = []
    for first in range(0, len(grads), LAYERS):
        some = grads[first : first + LAYERS]
        parts.append(backend.gram_norms(x, some, min(max(biased - first, 0), len(some)), cu, tiles, factor))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def token_norms(ids: Tensor, gradient: Tensor, cu: Tensor, tiles: Tensor, ignored: int) -> Tensor:
    """See :func:`compact_kernels.sample_norms.plain.token_norms`."""
    if torch.compiler.is_compiling():
        return torch.ops.compact_kernels.sample_token_norms(ids, gradient, cu, tiles, ignored)
    return backend_for(gradient).token_norms(ids, gradient, cu, tiles, ignored)


def product(a: Tensor, b: Tensor, cu: Tensor, weights: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`compact_kernels.sample_norms.plain.product`."""
    if torch.compiler.is_compiling():
        return torch.ops.compact_kernels.sample_product(a, b, cu, weights, offsets)
    return backend_for(a).product(a, b, cu, weights, offsets)


def column_norms(a: Tensor, b: Tensor, cu: Tensor) -> Tensor:
    """See :func:`compact_kernels.sample_norms.plain.column_norms`."""
    if torch.compiler.is_compiling():
        return torch.ops.compact_kernels.sample_column_norms(a, b, cu)
    return backend_for(a).column_norms(a, b, cu)


def scale_gradients(x: Tensor, gradient: Tensor, cu: Tensor, slices: int, kind: str, eps: float) -> Tensor:
    """See :func:`compact_kernels.sample_norms.plain.scale_gradients`."""
    if torch.compiler.is_compiling():
        return torch.ops.compact_kernels.sample_scale_gradients(x, gradient, cu, slices, kind, eps)
    return backend_for(gradient).scale_gradients(x, gradient, cu, slices, kind, eps)


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
    """See :func:`compact_kernels.sample_norms.plain.token_rows`."""
    if torch.compiler.is_compiling():
        return torch.ops.compact_kernels.sample_token_rows(gradient, factor, hidden, cu_rows, ids, cu, first, longest)
    return backend_for(gradient).token_rows(gradient, factor, hidden, cu_rows, ids, cu, first, longest)


def _sums(like: Tensor, *sizes: int) -> Tensor:
    return like.new_empty(sizes, dtype=torch.promote_types(like.dtype, torch.float32))


@torch.library.custom_op("compact_kernels::sample_gram_norms", mutates_args=())
def _gram_op(
    x: Tensor | None, grads: list[Tensor], biased: int, cu: Tensor, tiles: Tensor, factor: Tensor | None
) -> Tensor:
    return _gram_norms(x, grads, biased, cu, tiles, factor)


@_gram_op.register_fake
def _(x, grads, biased, cu, tiles, factor):
    return _sums(grads[0], tiles.shape[0])


@torch.library.custom_op("compact_kernels::sample_token_norms", mutates_args=())
def _token_op(ids: Tensor, gradient: Tensor, cu: Tensor, tiles: Tensor, ignored: int) -> Tensor:
    return token_norms(ids, gradient, cu, tiles, ignored)


@_token_op.register_fake
def _(ids, gradient, cu, tiles, ignored):
    return _sums(gradient, tiles.shape[0])


@torch.library.custom_op("compact_kernels::sample_product", mutates_args=())
def _product_op(
    a: Tensor, b: Tensor, cu: Tensor, weights: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor]:
    return product(a, b, cu, weights, offsets)


@_product_op.register_fake
def _(a, b, cu, weights, offsets):
    m, n, count = a.shape[1], b.shape[1], cu.shape[0] - 1
    norms = _sums(a, product_parts(m, n, a, offsets is not None), count)
    if not triton_applies(a):
        return _sums(a, 1, m, n), norms
    from compact_kernels.sample_norms import launch

    splits = 1 if offsets is not None else launch.product_splits(m, n)
    return a.new_empty((splits, m, n), dtype=torch.float32 if splits > 1 else a.dtype), norms


@torch.library.custom_op("compact_kernels::sample_column_norms", mutates_args=())
def _column_op(a: Tensor, b: Tensor, cu: Tensor) -> Tensor:
    return column_norms(a, b, cu)


@_column_op.register_fake
def _(a, b, cu):
    return _sums(a, cu.shape[0] - 1, b.shape[1])


@torch.library.custom_op("compact_kernels::sample_scale_gradients", mutates_args=())
def _scale_op(x: Tensor, gradient: Tensor, cu: Tensor, slices: int, kind: str, eps: float) -> Tensor:
    return scale_gradients(x, gradient, cu, slices, kind, eps)


@_scale_op.register_fake
def _(x, gradient, cu, slices, kind, eps):
    return _sums(gradient, cu.shape[0] - 1, slices, gradient.shape[-1])


@torch.library.custom_op("compact_kernels::sample_token_rows", mutates_args=())
def _rows_op(
    gradient: Tensor,
    factor: Tensor | None,
    hidden: Tensor,
    cu_rows: Tensor,
    ids: Tensor,
    cu: Tensor,
    first: int,
    longest: int,
) -> Tensor:
    return token_rows(gradient, factor, hidden, cu_rows, ids, cu, first, longest)


@_rows_op.register_fake
def _(gradient, factor, hidden, cu_rows, ids, cu, first, longest):
    return _sums(hidden, ids.shape[0], hidden.shape[1])
