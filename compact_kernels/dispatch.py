"""Whether an op's kernels can run on a tensor: one predicate a kind, for the ops and their tests; and on which GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from compact_kernels.native import LIBRARY, cuda_trouble

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

P = ParamSpec("P")
R = TypeVar("R")

TRITON_FOUND = importlib.util.find_spec("triton") is not None
# Whether Triton interprets its kernels, slowly, on CPUs: it has to be asked for before Triton is imported.
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED = INTERPRETER  # whether CPU tensors take the kernels; tests choose


def triton_applies(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """True for float32, bfloat16 and float16 on a GPU, or on a CPU under Triton's interpreter.

    `dtype`: what is computed in, where that is not the tensor's (autocast).
    """
    if (dtype or tensor.dtype) not in DTYPES:
        return False
    device = tensor.device.type
    return (device == "cuda" or (device == "cpu" and INTERPRETED)) and TRITON_FOUND


def native_applies(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """True for float32 and bfloat16 on a CPU, where the native library is loaded."""
    computes = dtype or tensor.dtype
    return LIBRARY.loaded and tensor.device.type == "cpu" and computes in (torch.float32, torch.bfloat16)


def native_cuda_applies(tensor: Tensor) -> bool:
    """True for float32, bfloat16 and float16 on a GPU that the native library has code for."""
    return tensor.is_cuda and tensor.dtype in DTYPES and not cuda_trouble(tensor.get_device())


def on_its_device(op: Callable[P, R]) -> Callable[P, R]:
    """The op with the GPU of its first tensor as the current one, on which Triton launches wherever tensors are.

    A backward pass needs no such care: autograd sees to it. Nor does a compiled graph.
    """

    @functools.wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return op(*args, **kwargs)
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if first is None or not first.is_cuda:
            return op(*args, **kwargs)
        with torch.cuda.device_of(first):
            return op(*args, **kwargs)

    return run
