"""Draws that leave the run's random state as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def random_state_kept(*, seed: int | None = None, device: torch.device | None = None) -> Iterator[None]:
    """Inside, draws on the CPU, and on `device`, change nothing for those that come after.

    Of no other device is the state read: that would start every GPU of the machine, and torch warns of it.

    Args:
        seed: for draws on the CPU. (`torch.manual_seed` would seed all devices.)
    """
    with torch.random.fork_rng(devices=[] if device is None or device.type == "cpu" else [device]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield
