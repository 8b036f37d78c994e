"""The head's row pass on CPUs, in C++ (csrc/cpu/rows.cpp): one pass over each row, in place, vectorised and threaded.

A row is stored unnormalised, as exp(z − max); 1/Σ is the factor that the following products carry. Where a CPU has no
instructions for products in bfloat16 (torch's own take a thousand times float32's time there), logits are float32
and the weight is converted a block at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compact_kernels.head.linear import LinearHead
from compact_kernels.head.rows import Answers, RowStatistics, converted_rows, row_buffer
from compact_kernels.head.torch_rows import decide, folds_divergence, last_product, scale_rows
from compact_kernels.native import run

__all__ = ["decide", "folds_divergence", "last_product", "scale_rows"]  # as in plain torch


def buffer_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits and gradient rows are held in, where the head computes in `dtype`."""
    fast = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if fast else torch.float32


def chunk_mib(dtype: torch.dtype, sums: bool) -> int:
    """Logits at once that pay: fewer read the head, and add to its gradient, more often.

    A product in float32 adds to what is there. One in bfloat16 is made apart and converted for every chunk, which
    takes V·D·6 bytes more than one chunk does: as much as 3·D rows of logits.
    """
    return 512 if sums and buffer_dtype(dtype) == torch.bfloat16 else 100


def bytes_per_logit(dtype: torch.dtype) -> int:
    """What a logit takes while a chunk is worked on."""
    return buffer_dtype(dtype).itemsize


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

    With a `buffer` (n, V), also their gradient rows, exp(z − pivot)∘slope, the target's entry −Σ of the others.
    """
    z = row_buffer(x.shape[0], head.vocabulary, x, buffer_dtype(x.dtype)) if buffer is None else buffer
    _raw_logits(x, head.weight, z)
    asked = (None, None, None) if answers is None else (answers.ids, answers.cu_ids, answers.cu_rows)
    op, place = torch.ops.compact_native.row_statistics, (table, first_row, buffer is not None)
    run(op, z, targets.contiguous(), _bias(head), *asked, *head.natural, ignore_index, *place)


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
    """
    columns = slice(first_column, first_column + block.shape[1])
    bias = _bias(head)
    _raw_logits(x, head.weight[columns], block)
    run(
        torch.ops.compact_native.gradient_block,
        block,
        targets.contiguous(),
        None if bias is None else bias[columns],
        *head.natural,
        rows.pivot.contiguous(),
        slope.contiguous(),
        None if curve is None else curve.contiguous(),
        target_gradient.contiguous(),
        first_column,
    )


def logits(x: Tensor, head: LinearHead) -> Tensor:
    """Logits (n, V) in float32."""
    if buffer_dtype(x.dtype) == x.dtype:
        return head(x)
    raw = row_buffer(x.shape[0], head.vocabulary, x, torch.float32)
    _raw_logits(x, head.weight, raw)
    return head.of_raw(raw if head.bias is None else raw.add_(head.bias))


def rescale(source: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """source·factor in `dtype`; in place if source has it."""
    if factor == 1:  # nothing waits for a CPU's numbers
        return source.to(dtype)
    return source.mul_(factor).to(dtype)


def _raw_logits(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """x Wᵀ, in the dtype of `out`."""
    if x.dtype == out.dtype:
        torch.mm(x, weight.t(), out=out)
        return
    x, size = x.to(out.dtype), converted_rows(weight)
    for first in range(0, weight.shape[0], size):
        part = slice(first, first + size)
        torch.mm(x, weight[part].to(out.dtype).t(), out=out[:, part])


def _bias(head: LinearHead) -> Tensor | None:
    return None if head.bias is None else head.bias.float().contiguous()
