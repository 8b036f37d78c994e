"""What every backend of the head gives for a chunk of rows, and the products that follow."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compact_kernels.ragged import Ragged
from compact_kernels.rule import TokenStatistics


class Answers(NamedTuple):
    """The gold answers whose evidence is asked for (eq. 2)."""

    ids: Tensor  # (A,) int64
    cu_ids: Tensor  # (S+1,) int32
    cu_rows: Tensor  # (S+1,) int32  offsets of the rationales' scored rows
    most: int  # ids of the longest answer

    @classmethod
    def of_batch(cls, ragged: Ragged) -> Answers | None:
        """Those of a batch; None if it has none."""
        if ragged.evidence_ids.numel() == 0:
            return None
        return cls(ragged.evidence_ids, ragged.cu_evidence, ragged.cu_rows, ragged.sizes.longest_answer)


class RowStatistics(NamedTuple):
    """Statistics of scored rows, each (n,) and at least float32: the rows of one table (10, n)."""

    logprob: Tensor  # nats; 0 where the target is ignored
    entropy: Tensor  # nats
    evidence: Tensor  # nats; 0 where the rationale has no answer
    grad_norm: Tensor  # ‖p − e_target‖; 0 where the target is ignored
    others: Tensor  # 1 − p(target), without cancellation
    inverse_sum: Tensor  # the factor that makes a stored row (p − e_target) ∘ the softcap's slope; 0 where ignored
    pivot: Tensor  # the logit that exponentials are relative to, in the backend's own unit
    total: Tensor  # Σ exp(z − pivot)
    target_mass: Tensor  # exp(z_target − pivot), which the target's column of a stored row does not hold
    target_slope: Tensor  # the softcap's slope at the target; 1 without

    @classmethod
    def table(cls, rows: int, like: Tensor) -> Tensor:
        """Room for the statistics of so many rows."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return like.new_empty((len(cls._fields), rows), dtype=dtype)

    @property
    def tokens(self) -> TokenStatistics:
        return TokenStatistics(*self[:4])


def in_rows(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix in `dtype`, the elements of a row side by side; itself if it is so."""
    matrix = matrix.to(dtype)
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def row_buffer(rows: int, vocabulary: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (rows, V) matrix whose rows start at multiples of 128 bytes.

    On CPUs rows whole pages apart would share their cache sets, which made the products with them 5 to 10 % slower:
    such rows get 64 columns more.
    """
    dtype, stride = dtype or like.dtype, -(-vocabulary // 64) * 64
    if like.device.type == "cpu" and stride * dtype.itemsize % 4096 == 0:
        stride += 64
    return like.new_empty(rows, stride, dtype=dtype)[:, :vocabulary]


CONVERTED = 1 << 23  # numbers that are converted at a time where a product's factors differ in dtype: 32 MiB


def product(a: Tensor, b: Tensor, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """a @ b in float32 (float64 for float64 input), written to or added to `out` if given.

    A float32 `a` may meet a `b` of another dtype, which is converted a part at a time.
    """
    if a.dtype != b.dtype:
        return _converted_product(a, b, out, accumulate)
    if a.dtype in (torch.float32, torch.float64):
        if out is None:
            return a @ b
        return out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
    if a.device.type == "cuda":
        if out is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        if accumulate:
            return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    result = (a @ b).float()  # CPUs have no such product; theirs accumulates in float32 and rounds once
    if out is None:
        return result
    return out.add_(result) if accumulate else out.copy_(result)


def converted_rows(matrix: Tensor) -> int:
    """Rows of the matrix that are converted at a time, at least one."""
    return max(1, CONVERTED // max(1, matrix.shape[1]))


def _converted_product(a: Tensor, b: Tensor, out: Tensor | None, accumulate: bool) -> Tensor:
    result = out if out is not None and out.dtype == a.dtype else a.new_empty(a.shape[0], b.shape[1])
    size = converted_rows(b)
    for first in range(0, max(b.shape[0], 1), size):  # once at least: a product over no rows is 0
        part = slice(first, first + size)
        beta = float(first > 0 or (accumulate and result is out))
        torch.addmm(result, a[:, part], b[part].to(a.dtype), beta=beta, out=result)
    if out is None or result is out:
        return result
    return out.add_(result) if accumulate else out.copy_(result)
