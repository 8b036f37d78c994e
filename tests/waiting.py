"""A CPU's view of what would wait for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _NothingRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in ("_local_scalar_dense", "nonzero", "lift_fresh"), name
        if name in ("index", "index_put", "index_put_"):
            assert all(index is None or index.dtype is not torch.bool for index in args[1]), name
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_read(*modules: str) -> Iterator[None]:
    """Fails where a GPU would be waited for: numbers read from tensors, or tensors made of the host's numbers.

    Args:
        modules: those that bring numbers to the device by `on_device`, which does not wait but looks as if it did.
    """

    def filled(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.cat([torch.full((1,), value, dtype=dtype, device=device) for value in values])

    with pytest.MonkeyPatch.context() as patch, _NothingRead():
        for module in modules:
            patch.setattr(f"{module}.on_device", filled)
        for name in ("tolist", "new_tensor"):
            patch.setattr(Tensor, name, lambda *_, what=name: pytest.fail(f"{what} waits"))
        yield
