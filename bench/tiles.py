"""What the Gram kernel takes by its tile: `python -m bench.tiles`, to choose GRAM, GRAM_PROGRAMS and BLOCK by.

All linear layers of a Qwen2.5 decoder layer, as families with a common input, in each setting in turn; beside them
what reading the operands once takes at the measured copy bandwidth. Of rationales of T tokens, tiles of B × B read
each row ceil(T / B) times out of the L2 cache.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from bench.shapes import Student, device, scale
from bench.timing import Runner, attempt, time_rounds
from compact_kernels.sample_norms import launch, segments
from compact_kernels.sample_norms.launch import GRAM, GRAM_PROGRAMS, GramTile


class Setting(NamedTuple):
    block: int  # tokens on a side of a tile
    tile: GramTile
    programs: int

    @property
    def label(self) -> str:
        k, warps, stages = self.tile
        return f"{self.block} x {self.block} x {k}, {warps} warps, {stages} stages, {self.programs} programs"


SPIN = 2_000_000  # cycles that a GPU waits, a millisecond: by then all launches are queued
CHOSEN = Setting(segments.BLOCK, GRAM, GRAM_PROGRAMS)
SETTINGS = [CHOSEN]
SETTINGS += [
    Setting(64, GramTile(*tile), 396) for tile in ((64, 4, 3), (64, 4, 5), (128, 4, 3), (32, 4, 5), (64, 8, 4))
]
SETTINGS += [Setting(64, GRAM, programs) for programs in (132, 792)]
SETTINGS += [
    Setting(128, GramTile(*tile), programs)
    for tile in ((64, 8, 3), (64, 8, 4), (32, 8, 4), (128, 8, 2), (64, 4, 3))
    for programs in (132, 264, 396)
]


@contextmanager
def using(setting: Setting) -> Iterator[None]:
    kept = segments.BLOCK, launch.BLOCK, launch.GRAM, launch.GRAM_PROGRAMS
    segments.BLOCK = launch.BLOCK = setting.block
    launch.GRAM, launch.GRAM_PROGRAMS = setting.tile, setting.programs
    try:
        yield
    finally:
        segments.BLOCK, launch.BLOCK, launch.GRAM, launch.GRAM_PROGRAMS = kept


def families(student: Student) -> list[tuple[int, list[int], int]]:
    """Width of the input, of the outputs, and how many of them have a bias: q, k, v; o; gate, up; down."""
    wide, inner = student.head.width, student.intermediate
    narrow = wide // student.attention_heads * student.key_value_heads
    return [(wide, [wide, narrow, narrow], 3), (wide, [wide], 0), (wide, [inner] * 2, 0), (inner, [wide], 0)]


def layer(
    student: Student, lengths: list[int], on: torch.device, dtype: torch.dtype
) -> tuple[int, Callable[[Setting], Callable[[], list[Tensor]]]]:
    """Bytes of the operands, and what gives the norms of a decoder layer under a setting."""
    tokens = sum(lengths)

    def draw(width: int) -> Tensor:
        return torch.randn(tokens, width, device=on, dtype=dtype)

    operands = [(draw(width), [draw(out) for out in outs], biased) for width, outs, biased in families(student)]
    offsets = [0, *accumulate(lengths)]
    cu = torch.tensor(offsets, dtype=torch.int32, device=on)

    def under(setting: Setting) -> Callable[[], list[Tensor]]:
        with using(setting):
            tiles = segments.Segments.of(cu, offsets).tiles

        def run() -> list[Tensor]:
            with using(setting):
                return [launch.gram_norms(x, grads, biased, cu, tiles) for x, grads, biased in operands]

        return run

    return sum(x.nbytes + sum(g.nbytes for g in grads) for x, grads, _ in operands), under


def totals(runner: Runner) -> Tensor:
    """Every family's norms, added up."""
    return torch.stack([norms.sum() for norms in runner.run()])


def check(runner: Runner, expected: Tensor) -> None:
    torch.testing.assert_close(totals(runner), expected, rtol=1e-3, atol=0)


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.tiles", description=__doc__)
    parser.add_argument("--students", nargs="+", choices=("0.5b", "1.5b"), default=["0.5b", "1.5b"])
    parser.add_argument("--rounds", type=int, default=20)
    asked, sizes, on = parser.parse_args(), scale(), device()
    source = torch.randn(sizes.copy_mib << 18, device=on)
    copied = torch.empty_like(source)
    for name in asked.students:
        student = sizes.students[name]
        lengths = [sizes.tokens] * sizes.questions * sizes.rationales
        nbytes, under = layer(student, lengths, on, sizes.dtype)
        runners = [Runner(setting.label, under(setting), spin=SPIN) for setting in SETTINGS]
        expected = totals(runners[0])
        for runner in runners:
            attempt(runner, partial(check, runner, expected))
        copy = Runner("copy", lambda: copied.copy_(source))
        time_rounds([*runners, copy], asked.rounds, say=lambda _: None)
        read = nbytes / (2 * source.nbytes / statistics.median(copy.seconds))
        print(f"\n{name}: a layer's Gram norms in ms; to read its operands once takes {1e3 * read:.3f}")
        for runner in sorted(runners, key=lambda r: statistics.median(r.seconds) if r.seconds else float("inf")):
            chosen = " (chosen)" if runner.name == CHOSEN.label else ""
            print(f"{runner.error or format(1e3 * statistics.median(runner.seconds), '8.3f')}  {runner.name}{chosen}")


if __name__ == "__main__":
    main()
