"""How Triton kernels multiply two tiles: as they are stored, or float32 as float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from compact_kernels.dispatch import INTERPRETER


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, in float32."""
    if PRECISION == "stored":
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


def dot_precision(dtype: torch.dtype) -> str:
    """The `PRECISION` of :func:`dot` for tiles of `dtype`.

    NVIDIA's tensor cores make a float32 product of three of TF32, as exact as multiply-adds (log-probs on an H200: at
    most 9.2e-7 off, by multiply-adds 1.0e-6); GPUs before Ampere multiply and add. Others have no such product. The
    interpreter multiplies bfloat16 wrongly.
    """
    if INTERPRETER:
        return "ieee"
    if dtype != torch.float32:
        return "stored"
    return "tf32x3" if torch.version.cuda is not None else "ieee"
