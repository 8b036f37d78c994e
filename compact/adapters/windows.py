"""Gradient accumulation where the host trainer shows one batch at a time: Lightning, plain loops."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from compact.errors import UserError
from compact.loss import Denominators


class WindowLoader(DataLoader):
    """A DataLoader that looks ahead over the optimizer step's batches and gives each the step's denominators.

    Every batch gets ``denominators``, Q and N of method §3 over the accumulation window and all ranks, which
    :func:`compact.loss.distillation_loss` takes: the loss is then the same however a step is split into batches.

    Args:
        args, kwargs: DataLoader's own, ``collate_fn`` a :class:`compact.collate.Collator`.
        accumulate: batches an optimizer step. An epoch's last window may be shorter.
    """

    def __init__(self, *args: Any, accumulate: int = 1, **kwargs: Any) -> None:
        if accumulate < 1:
            raise UserError(f"accumulate is {accumulate}: an optimizer step has at least one batch")
        self.accumulate = accumulate
        super().__init__(*args, **kwargs)

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        batches = super().__iter__()
        while window := list(islice(batches, self.accumulate)):
            denominators = _summed([Denominators.of(batch["ragged"]) for batch in window])
            for batch in window:
                yield {**batch, "denominators": denominators}


def _summed(counts: list[Denominators]) -> Denominators:
    """Over the batches and all ranks; on a device only where ranks add up there."""
    total = torch.tensor(counts, dtype=torch.float64).sum(0)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        device = torch.accelerator.current_accelerator() if "nccl" in dist.get_backend() else torch.device("cpu")
        total = total.to(device)
        dist.all_reduce(total)
        return Denominators(*total.float())
    return Denominators(*total.tolist())
