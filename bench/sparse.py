"""What a backward pass of the head that leaves out next to nothing would take: `python -m bench.sparse STUDENT GSM8K`.

A row's gradient is its probabilities times the head, and most of the vocabulary holds little of them. The lightest
blocks of the vocabulary, which together hold at most δ of a row's probability, are left out of both products of the
backward pass here; these become gather products over what is left. The forward pass knows each block's mass, so what
is left out is certified: a row of dX is off by at most δ·max ‖w_v‖ times its weight.

The student is fine-tuned first, since it is a trained softmax that is sparse: the head frozen, on the solutions of
GSM8K's first 800 questions; the rows are of the others'. Everything is timed beside the dense pass in the same rounds.
The library has none of this: bench/results/nvidia-h200-sparse.md says what came out.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

from bench.shapes import device
from bench.timing import Runner, time_rounds
from compact.config import StudentConfig
from compact.student import load_student
from compact_kernels.dot import dot, dot_precision
from compact_kernels.head import triton_rows
from compact_kernels.head.linear import LinearHead
from compact_kernels.head.rows import RowStatistics, product, row_buffer

TRAINING_QUESTIONS = 800
HALVINGS = 14  # of the interval in which a row's threshold is looked for
SPIN = 1_000_000  # cycles that a GPU waits before a round: its launches are then queued


@triton.jit
def select_kernel(
    mass_ptr,  # (n, blocks) float32
    target_ptr,  # (n,) int64
    keep_ptr,  # (blocks, n) int8  out
    kept_ptr,  # (n,) int32  out: how many
    n,
    blocks,
    width,
    delta,
    HALVINGS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The heaviest blocks of a row, so that the others hold at most delta of it, and its target's."""
    row = tl.program_id(0)
    b = tl.arange(0, BLOCKS)
    mass = tl.load(mass_ptr + row.to(tl.int64) * blocks + b, mask=b < blocks, other=0.0)
    total = tl.sum(mass, 0)
    low, high = -60.0, 1.0  # log₂ of the threshold, relative to the total
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = tl.sum(tl.where(mass < total * tl.exp2(middle), mass, 0.0), 0) <= delta * total
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    target = tl.load(target_ptr + row) // width
    kept = ((mass >= total * tl.exp2(low)) | (b == target)) & (b < blocks)
    tl.store(keep_ptr + b.to(tl.int64) * n + row, kept.to(tl.int8), mask=b < blocks)
    tl.store(kept_ptr + row, tl.sum(kept.to(tl.int32), 0))


@triton.jit
def rows_of_blocks_kernel(keep_ptr, rows_ptr, counts_ptr, n, CHUNK: tl.constexpr):
    """For every block the rows that keep it, in their order."""
    block = tl.program_id(0).to(tl.int64)
    found = 0
    for start in range(0, n, CHUNK):
        row = start + tl.arange(0, CHUNK)
        kept = tl.load(keep_ptr + block * n + row, mask=row < n, other=0).to(tl.int32)
        tl.store(rows_ptr + block * n + found + tl.cumsum(kept, 0) - 1, row, mask=kept > 0)
        found += tl.sum(kept, 0)
    tl.store(counts_ptr + block, found)


@triton.jit
def blocks_of_tiles_kernel(
    keep_ptr, order_ptr, blocks_ptr, counts_ptr, n, blocks, ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    """For every tile of rows, taken in `order`, the blocks that any of them keeps."""
    tile = tl.program_id(0).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    row = tl.load(order_ptr + rows, mask=rows < n, other=0)
    found = 0
    for start in range(0, blocks, CHUNK):
        b = start + tl.arange(0, CHUNK)
        mask = (b < blocks)[:, None] & (rows < n)[None, :]
        keep = tl.load(keep_ptr + b.to(tl.int64)[:, None] * n + row[None, :], mask=mask, other=0)
        kept = tl.max(keep.to(tl.int32), 1)
        tl.store(blocks_ptr + tile * blocks + found + tl.cumsum(kept, 0) - 1, b, mask=kept > 0)
        found += tl.sum(kept, 0)
    tl.store(counts_ptr + tile, found)


@triton.jit
def weight_kernel(
    e_ptr, x_ptr, rows_ptr, counts_ptr, out_ptr, n, vocabulary, dim, e_stride,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW of a block: the product over the rows that keep it."""
    block = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    v = block * WIDTH + tl.arange(0, WIDTH)
    count = tl.load(counts_ptr + block)
    acc = tl.zeros((WIDTH, BLOCK_D), dtype=tl.float32)
    for start in tl.range(0, count, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        row = tl.load(rows_ptr + block * n + k, mask=k < count, other=0).to(tl.int64)
        mask = (k < count)[:, None]
        e = tl.load(e_ptr + row[:, None] * e_stride + v[None, :], mask=mask & (v < vocabulary)[None, :], other=0.0)
        x = tl.load(x_ptr + row[:, None] * dim + d[None, :], mask=mask & (d < dim)[None, :], other=0.0)
        acc = dot(e.T, x, acc, PRECISION)
    place = out_ptr + v[:, None] * dim + d[None, :]
    tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=(v < vocabulary)[:, None] & (d < dim)[None, :])


@triton.jit
def hidden_kernel(
    e_ptr, w_ptr, order_ptr, blocks_ptr, counts_ptr, out_ptr, n, blocks, vocabulary, dim, e_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX of a tile of rows: the product over the blocks that any of them keeps. The fullest tiles come first."""
    tile = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tile * ROWS + tl.arange(0, ROWS)
    row = tl.load(order_ptr + rows, mask=rows < n, other=0).to(tl.int64)
    count = tl.load(counts_ptr + tile)
    acc = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    for step in tl.range(0, count * (WIDTH // BLOCK_K)):
        block = tl.load(blocks_ptr + tile * blocks + step // (WIDTH // BLOCK_K)).to(tl.int64)
        v = block * WIDTH + step % (WIDTH // BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = v < vocabulary
        e = tl.load(e_ptr + row[:, None] * e_stride + v[None, :], mask=inside[None, :], other=0.0)
        w = tl.load(w_ptr + v[:, None] * dim + d[None, :], mask=inside[:, None] & (d < dim)[None, :], other=0.0)
        acc = dot(e, w, acc, PRECISION)
    place = out_ptr + row[:, None] * dim + d[None, :]
    tl.store(place, acc, mask=(rows < n)[:, None] & (d < dim)[None, :])


@dataclass
class Tile:
    d: int
    k: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"BLOCK_D": self.d, "BLOCK_K": self.k, "num_warps": self.warps, "num_stages": self.stages}


class GatherProducts:
    """Both products of a backward pass over what is kept of E (n, V), with all the room that they need."""

    def __init__(self, e: Tensor, weight: Tensor, width: int, rows: int, hidden: Tile, weights: Tile) -> None:
        (n, vocabulary), on = e.shape, e.device
        self.e, self.weight, self.width, self.tile_rows, self.tiles = e, weight, width, rows, (hidden, weights)
        self.blocks, tiles = triton.cdiv(vocabulary, width), triton.cdiv(n, rows)
        self.keep = torch.empty(self.blocks, n, dtype=torch.int8, device=on)
        self.kept = torch.empty(n, dtype=torch.int32, device=on)
        self.order: Tensor  # of the rows, by how much they keep
        self.rows = torch.empty(self.blocks, n, dtype=torch.int32, device=on)
        self.row_counts = torch.empty(self.blocks, dtype=torch.int32, device=on)
        self.tile_blocks = torch.empty(tiles, self.blocks, dtype=torch.int32, device=on)
        self.tile_counts = torch.empty(tiles, dtype=torch.int32, device=on)

    def select(self, mass: Tensor, targets: Tensor, delta: float) -> None:
        """What to keep: by block for dW; by tile for dX, whose rows are ordered by how much they keep."""
        n = len(mass)
        select_kernel[(n,)](
            mass, targets, self.keep, self.kept, n, self.blocks, self.width, delta,
            HALVINGS=HALVINGS, BLOCKS=triton.next_power_of_2(self.blocks), num_warps=4,
        )  # fmt: skip
        self.order = torch.argsort(self.kept)
        rows_of_blocks_kernel[(self.blocks,)](self.keep, self.rows, self.row_counts, n, CHUNK=1024)
        blocks_of_tiles_kernel[(len(self.tile_counts),)](
            self.keep, self.order, self.tile_blocks, self.tile_counts, n, self.blocks, ROWS=self.tile_rows, CHUNK=64
        )

    def hidden(self) -> Tensor:
        """E W over what is kept, (n, D) float32."""
        (n, vocabulary), dim, tile = self.e.shape, self.weight.shape[1], self.tiles[0]
        out = self.weight.new_empty(n, dim, dtype=torch.float32)
        hidden_kernel[(triton.cdiv(dim, tile.d), len(self.tile_counts))](
            self.e, self.weight, self.order, self.tile_blocks, self.tile_counts, out, n, self.blocks, vocabulary, dim,
            self.e.stride(0), ROWS=self.tile_rows, WIDTH=self.width, PRECISION=dot_precision(self.e.dtype),
            **tile.options,
        )  # fmt: skip
        return out

    def weights(self, x: Tensor) -> Tensor:
        """Eᵀ x over what is kept, (V, D) in the head's dtype."""
        (n, vocabulary), dim, tile = self.e.shape, self.weight.shape[1], self.tiles[1]
        out = torch.empty_like(self.weight)
        weight_kernel[(triton.cdiv(dim, tile.d), self.blocks)](
            self.e, x, self.rows, self.row_counts, out, n, vocabulary, dim, self.e.stride(0),
            WIDTH=self.width, PRECISION=dot_precision(self.e.dtype), **tile.options,
        )  # fmt: skip
        return out


def block_mass(e: Tensor, targets: Tensor, width: int) -> Tensor:
    """(n, blocks) ΣE, what the forward pass's epilogue would leave: E is stored relative to the target, which is 1."""
    n, vocabulary = e.shape
    blocks = triton.cdiv(vocabulary, width)
    mass = torch.empty(n, blocks, device=e.device)
    for part in torch.arange(n, device=e.device).split(1024):
        whole = e[part].float().scatter_(1, targets[part, None], 1.0)
        mass[part] = F.pad(whole, (0, blocks * width - vocabulary)).view(len(part), blocks, width).sum(-1)
    return mass


def states(student: str, questions: Path, steps: int, count: int, on: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (n, D) that predict held-out solutions, their targets, and the head (V, D) in bfloat16."""
    torch.manual_seed(0)
    model, tokenizer = load_student(StudentConfig(model=student, lora=None, attention="sdpa"), seed=0)
    model.to(on).train()
    head: nn.Module = model.get_output_embeddings()
    head.weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def tokens(row: dict[str, Any]) -> tuple[list[int], list[int]]:
        texts = row["question"] + "\n", row["paragraph"]
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)

    def last_states(prompt: list[int], solution: list[int]) -> Tensor:
        ids = torch.tensor([prompt + solution], device=on)
        return model.base_model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]

    rows = [tokens(json.loads(line)) for line in questions.read_text().splitlines()]
    training, held_out = rows[:TRAINING_QUESTIONS], rows[TRAINING_QUESTIONS:]
    for step in range(steps):
        batch = [training[i] for i in torch.randint(len(training), (6,)).tolist()]
        scored = torch.cat([last_states(*pair) for pair in batch])
        targets = torch.tensor([token for _, solution in batch for token in solution], device=on)
        loss = F.cross_entropy(scored @ head.weight.t(), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"\rstep {step + 1} of {steps}, loss {loss.item():.3f}", end="", flush=True)
    print()
    with torch.no_grad():
        found = torch.cat([last_states(*pair) for pair in held_out])[:count].bfloat16()
    targets = torch.tensor([token for _, solution in held_out for token in solution], device=on)[:count]
    return found, targets, head.weight.detach().bfloat16()


class Dense:
    """The pass as it is: E and statistics of the rows, then both products."""

    def __init__(self, x: Tensor, targets: Tensor, weight: Tensor) -> None:
        self.x, self.targets, self.weight = x, targets, weight
        self.table = RowStatistics.table(len(x), weight)
        self.e = row_buffer(len(x), len(weight), weight)
        self.forward()
        self.rows = RowStatistics(*self.table.unbind())
        self.scale = self.rows.inverse_sum[:, None] / len(x)
        self.scaled = (x.float() * self.scale).to(x.dtype)

    def forward(self) -> None:
        head = LinearHead(self.weight, None)
        triton_rows.statistics(self.x, head, self.targets, None, -100, self.table, 0, self.e)

    def hidden(self) -> Tensor:
        return product(self.e, self.weight)

    def weights(self) -> Tensor:
        return torch.mm(self.e.t(), self.scaled)


def compare(dense: Dense, mass: Tensor, width: int, bits: int, rounds: int) -> str:
    """Both passes at δ = 2^-bits: what is kept, how far off that is, and times."""
    delta = 2.0**-bits
    sparse = GatherProducts(dense.e, dense.weight, width, 64, Tile(64, 64, 4, 4), Tile(128, 64, 4, 3))
    sparse.select(mass, dense.targets, delta)
    expected, found = dense.hidden() * dense.scale, sparse.hidden() * dense.scale
    off_x = (found - expected).norm() / expected.norm()
    expected, found = dense.weights().float(), sparse.weights(dense.scaled).float()
    off_w = (found - expected).norm() / expected.norm()
    runs: dict[str, Callable[[], object]] = {
        "forward": dense.forward,
        "dense dX": dense.hidden,
        "dense dW": dense.weights,
        "select": lambda: sparse.select(mass, dense.targets, delta),
        "dX": sparse.hidden,
        "dW": lambda: sparse.weights(dense.scaled),
    }
    runners = [Runner(name, run, spin=SPIN) for name, run in runs.items()]
    time_rounds(runners, rounds, say=lambda _: None)
    ms = [1e3 * statistics.median(runner.seconds) if runner.seconds else float("nan") for runner in runners]
    kept, together = (counts.float().mean() / sparse.blocks for counts in (sparse.kept, sparse.tile_counts))
    return (
        f"\nblocks of {width}, δ = 2^-{bits}: {kept:.1%} of (row, block) pairs kept, {together:.1%} of (tile, block) "
        f"pairs; dX off by {off_x:.1e}, dW by {off_w:.1e}\n"
        + ", ".join(f"{name} {time:.3f} ms" for name, time in zip(runs, ms))
        + f": {(ms[0] + sum(ms[3:])) / sum(ms[:3]):.2f} of dense"
    )


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.sparse", description=__doc__.splitlines()[0])
    parser.add_argument("student", help="a folder or a .gguf file, such as SmolLM2-135M-Instruct's")
    parser.add_argument("questions", type=Path, help="JSON lines with question and paragraph")
    parser.add_argument("--steps", type=int, default=36, help="of fine-tuning, 6 solutions each")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128], help="columns of a block")
    asked = parser.parse_args()
    x, targets, weight = states(asked.student, asked.questions, asked.steps, asked.rows, device())
    dense = Dense(x, targets, weight)
    print(f"{len(x)} rows, {len(weight)} x {x.shape[1]}, mean p(target) {dense.rows.logprob.exp().mean():.2f}")
    for width in asked.widths:
        mass = block_mass(dense.e, targets, width)
        for bits in (8, 6):
            print(compare(dense, mass, width, bits, asked.rounds), flush=True)


if __name__ == "__main__":
    main()
