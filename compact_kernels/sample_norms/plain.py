"""The products of per-rationale gradient norms in plain torch, rationale by rationale: the definition.

Every function takes what a layer's backward pass has: its input and the gradient of its output, packed (T, …).
Where a fast path gives parts of a result (tiles, slices, blocks), these give the whole in the first part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compact_kernels.rule import segment_sum


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _ranges(cu: Tensor) -> list[tuple[int, int]]:
    offsets = cu.tolist()
    return list(zip(offsets, offsets[1:]))


def _places(cu: Tensor, tiles: Tensor) -> list[tuple[int, int, int]]:
    """First tile, first token and end of every rationale that has tiles."""
    offsets, owners = cu.tolist(), tiles[:, 0].tolist()
    return [(i, offsets[s], offsets[s + 1]) for i, s in enumerate(owners) if i == 0 or owners[i - 1] != s]


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """‖aᵀb‖², () of two matrices with T rows, by whichever product is the smaller."""
    rows, width, other = a.shape[0], a.shape[1], b.shape[1]
    if rows * (width + other) < width * other:
        return ((a @ a.t()) * (b @ b.t())).sum()
    return (a.t() @ b).square().sum()


def gram_norms(
    x: Tensor | None,
    grads: list[Tensor],
    biased: int,
    cu: Tensor,
    tiles: Tensor,
    factor: Tensor | None = None,
) -> Tensor:
    """Σ_l ‖G_lᵀX‖² of every rationale, and ‖G_lᵀ1‖² of the first `biased` layers; without x ‖G_lᵀ1‖² of all.

    Args:
        x: input that the layers share. (T, D_in)
        grads: gradients of their outputs. (T, D_out) each
        tiles: see :class:`Segments`. (M, 3)
        factor: every row of every gradient is multiplied with it. (T,)

    Returns:
        (M,) parts whose sums over the tiles of a rationale are the results.
    """
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    out = torch.zeros(tiles.shape[0], dtype=dtype, device=grads[0].device)
    if x is not None:
        x = _wide(x)
    for first, a, b in _places(cu, tiles):
        total = out.new_zeros(())
        for i, gradient in enumerate(grads):
            g = _wide(gradient[a:b])
            if factor is not None:
                g = g * factor[a:b, None]
            if x is not None:
                total = total + _squared(g, x[a:b])
            if i < biased or x is None:
                total = total + g.sum(0).square().sum()
        out[first] = total
    return out


def token_norms(ids: Tensor, gradient: Tensor, cu: Tensor, tiles: Tensor, ignored: int) -> Tensor:
    """‖E_s‖² of an embedding: rows of one token add up. ids (T,), gradient (T, D); (M,) parts.

    Args:
        ignored: the id whose row has no gradient (padding); −1: none.
    """
    g = _wide(gradient)
    out = torch.zeros(tiles.shape[0], dtype=g.dtype, device=g.device)
    for first, a, b in _places(cu, tiles):
        kept = ids[a:b] != ignored
        _, place = ids[a:b].unique(return_inverse=True)
        rows = g.new_zeros(b - a, g.shape[1]).index_add_(0, place, g[a:b] * kept[:, None])
        out[first] = rows.square().sum()
    return out


def product(a: Tensor, b: Tensor, cu: Tensor, weights: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ_s w_s a_sᵀ b_s and ‖a_sᵀ b_s‖², from one pass.

    Args:
        a: (T, M). b: (T, N).
        weights: w; None: ones. (S,)
        offsets: `cu` on the host, where a_sᵀ b_s are to be made by the library's products and stored, all S of them in
            float32, before they are added up; None: by one kernel that stores none. It is all the same here.

    Returns:
        (P, M, N) parts of the sum and (Q, S) parts of the norms.
    """
    a, b = _wide(a), _wide(b)
    total = a.new_zeros(1, a.shape[1], b.shape[1])
    norms = a.new_zeros(1, cu.shape[0] - 1)
    for s, (start, end) in enumerate(_ranges(cu)):
        own = a[start:end].t() @ b[start:end]
        norms[0, s] = own.square().sum()
        total[0] += own if weights is None else own * weights[s]
    return total, norms


def column_norms(a: Tensor, b: Tensor, cu: Tensor) -> Tensor:
    """Σ_m (a_sᵀ b_s)²_mn: (S, N)."""
    a, b = _wide(a), _wide(b)
    return torch.stack([(a[i:j].t() @ b[i:j]).square().sum(0) for i, j in _ranges(cu)])


def normalized(x: Tensor, kind: str, eps: float) -> Tensor:
    """A norm layer's factor of its weight: x/rms (``rms``), (x − mean)/std (``layer``), x (``given``) or 1."""
    x = _wide(x)
    if kind == "given":
        return x
    if kind == "ones":
        return torch.ones_like(x)
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def scale_gradients(x: Tensor, gradient: Tensor, cu: Tensor, slices: int, kind: str, eps: float) -> Tensor:
    """The gradient of a norm layer's weight, rationale by rationale; with kind ``ones`` that of a bias.

    Args:
        x, gradient: input of the layer (``given``: normalised) and gradient of its output, h rows a token. (T, h, D)

    Returns:
        (S, slices, D) parts over slices of the rationale.
    """
    g = _wide(gradient)
    rows = (normalized(x, kind, eps) * g).sum(1)
    out = torch.zeros(cu.shape[0] - 1, slices, g.shape[-1], dtype=g.dtype, device=g.device)
    for s, (a, b) in enumerate(_ranges(cu)):
        out[s, 0] = rows[a:b].sum(0)
    return out


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
    """Rows of a head's own gradient that the rationale's tokens ask for: H_s[id_t] = Σ_τ f_τ g_τ[id_t] h_τ.

    Args:
        gradient: of the logits, columns first … first + width − 1 of the vocabulary. (N, width)
        factor: of every row. (N,)
        hidden: input of the head. (N, D)
        cu_rows: offsets of the rationales' rows. (S+1,)
        ids, cu: all tokens of the rationales, (T,), and their offsets. (S+1,)
        longest: tokens of the longest rationale.

    Returns:
        (T, D); zeros for ids of other columns.
    """
    g, h = _wide(gradient), _wide(hidden)
    out = torch.zeros(ids.shape[0], h.shape[1], dtype=h.dtype, device=h.device)
    inside = (ids >= first) & (ids < first + g.shape[1])
    for (a, b), (i, j) in zip(_ranges(cu_rows), _ranges(cu)):
        entries = g[a:b].index_select(1, (ids[i:j] - first).where(inside[i:j], 0)) * inside[i:j]
        if factor is not None:
            entries = entries * factor[a:b, None]
        out[i:j] = entries.t() @ h[a:b]
    return out


def row_products(a: Tensor, b: Tensor, cu: Tensor) -> Tensor:
    """Σ_t ⟨a_t, b_t⟩ of every rationale, (S,)."""
    return segment_sum((_wide(a) * _wide(b)).sum(-1), cu)
