"""A cap on a rationale's gradient, inside the backward pass that makes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from compact_kernels.ragged import Ragged
from compact_kernels.rule import segment_sum


class _Capped(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, cu: Tensor, cap: float) -> Tensor:
        ctx.save_for_backward(cu)
        ctx.cap = cap
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (cu,) = ctx.saved_tensors
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        norms = segment_sum(wide.square().sum(-1), cu).sqrt()
        factor = (ctx.cap / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)
        by_token = factor.repeat_interleave(cu.diff(), output_size=gradient.shape[0])
        return (wide * by_token[:, None]).to(gradient.dtype), None, None


def capped(hidden: Tensor, ragged: Ragged, cap: float) -> Tensor:
    """`hidden` itself (T, D), through which no rationale passes on a gradient longer than `cap`.

    The norm is that of the weighted loss at the last hidden state; what lies behind it, the whole backbone, gets the
    capped gradient. A head that trains does not: its gradient is made from the loss, not from this.
    """
    if not 0 < cap < float("inf"):
        raise ValueError(f"cap is {cap}; it must be above 0")
    return _Capped.apply(hidden, ragged.cu_seqlens, cap)
