"""Who does the row passes: Triton where it runs, C++ on CPUs, plain torch elsewhere; one surface for all."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from compact_kernels.dispatch import native_applies, triton_applies
from compact_kernels.head import torch_rows


def backend_for(tensor: Tensor, dtype: torch.dtype | None = None) -> ModuleType:
    """The module that does the row passes on a tensor's device; all have the same functions."""
    if triton_applies(tensor, dtype):
        from compact_kernels.head import triton_rows

        return triton_rows
    if native_applies(tensor, dtype):
        from compact_kernels.head import native_rows

        return native_rows
    return torch_rows


def logits_mib(backend: ModuleType, workspace_mib: int, dtype: torch.dtype) -> float:
    """The part of the workspace that logits of the dtype may take, where a backend works on copies of them."""
    return workspace_mib * dtype.itemsize / backend.bytes_per_logit(dtype)


def paying_mib(backend: ModuleType, workspace_mib: int, dtype: torch.dtype, *, sums: bool = False) -> float:
    """The same, but no more than makes a backend faster; `sums`: the head's gradient is added up over chunks."""
    return logits_mib(backend, min(workspace_mib, backend.chunk_mib(dtype, sums)), dtype)
