"""How a packed batch is cut for the products of per-rationale norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from compact_kernels.dispatch import INTERPRETER
from compact_kernels.ragged import on_device

BLOCK = 32 if INTERPRETER else 64  # tokens on a side of a tile of a Gram matrix
SLICE = 32  # tokens whose share of a vector's gradient one program sums


def runs(offsets: Sequence[int]) -> list[tuple[int, int, int]]:
    """Neighbours of one length among a batch's rationales: the first of them, how many, and their length."""
    found, first = [], 0
    for length, some in groupby(b - a for a, b in zip(offsets, offsets[1:])):
        count = len(list(some))
        found.append((first, count, length))
        first += count
    return found


@dataclass(frozen=True)
class Segments:
    """The rationales of a batch, on its device.

    A Gram matrix over the tokens of a rationale is symmetric: only the tiles on and below its diagonal are computed.
    """

    cu: Tensor  # (S+1,) int32  token offsets
    offsets: Tensor  # the same on the host
    runs: list[tuple[int, int, int]]  # neighbours of one length, see runs()
    tiles: Tensor  # (M, 3) int32  rationale, block of rows, block of columns ≤ it; in the order of the rationales
    cu_tiles: Tensor  # (S+1,) int64  offsets of the rationales' tiles
    first_tiles: list[int]  # the same on the host
    tokens: int
    longest: int
    squares: int  # Σ T_s², which a Gram matrix's cost goes with

    @classmethod
    def of(cls, cu: Tensor, offsets: Sequence[int]) -> Segments:
        """From token offsets on the device, and the same on the host."""
        lengths = [b - a for a, b in zip(offsets, offsets[1:])]
        tiles: list[tuple[int, int, int]] = []
        first_tiles = [0]
        for s, length in enumerate(lengths):
            tiles += [(s, i, j) for i in range(-(-length // BLOCK)) for j in range(i + 1)]
            first_tiles.append(len(tiles))
        return cls(
            cu=cu,
            offsets=torch.tensor(offsets, dtype=torch.int32, device="cpu"),
            runs=runs(offsets),
            tiles=on_device(tiles, torch.int32, cu.device).reshape(-1, 3),
            cu_tiles=on_device(first_tiles, torch.int64, cu.device),
            first_tiles=first_tiles,
            tokens=offsets[-1],
            longest=max(lengths, default=0),
            squares=sum(length * length for length in lengths),
        )

    @property
    def count(self) -> int:
        return self.cu.shape[0] - 1

    @property
    def slices(self) -> int:
        """Slices of the longest rationale."""
        return -(-self.longest // SLICE)
