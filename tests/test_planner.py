"""The planner: in what pieces a batch goes through the head."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch

from compact_kernels import Ragged, compatibility_loss
from compact_kernels.head import planner, torch_rows
from compact_kernels.head.backend import logits_mib
from compact_kernels.head.planner import Chunk
from compact_kernels.head.rows import row_buffer
from tests.head_cases import without_library

LAYOUTS = [(1,), (7,), (3, 3, 3, 3), (1, 9, 1, 1, 9, 2), (40, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 40), ()]


def ragged_of(question_rows: tuple[int, ...], seed: int = 0) -> Ragged:
    """Questions with so many scored rows, cut into rationales at random."""
    rng = random.Random(seed)
    completions: list[int] = []
    counts: list[int] = []
    for rows in question_rows:
        cuts = sorted(rng.sample(range(1, rows), min(rng.randint(0, 3), rows - 1)))
        pieces = [last - first for first, last in pairwise([0, *cuts, rows])]
        completions += pieces
        counts.append(len(pieces))
    return Ragged.build(
        sequence_lengths=[2 + rows for rows in completions],
        prompt_lengths=[2] * len(completions),
        rationales_per_question=counts,
    )


def assert_covers(pieces: list[tuple[int, int]], total: int) -> None:
    assert all(first < last for first, last in pieces)
    assert [index for first, last in pieces for index in range(first, last)] == list(range(total))


@pytest.mark.parametrize("capacity", [1, 2, 7, 255, 256, 257, 512, 700, 10_000])
@pytest.mark.parametrize("rows", [0, 1, 5, 255, 256, 257, 1000, 1030])
def test_chunks_of_rows_cover_every_row_once_and_fit(rows, capacity):
    chunks = planner.row_chunks(rows, capacity)
    assert_covers([(chunk.first, chunk.last) for chunk in chunks], rows)
    assert all(chunk.last - chunk.first <= capacity for chunk in chunks)
    assert not any(chunk.last_question for chunk in chunks)  # they end anywhere


def test_chunks_of_rows_are_as_few_as_can_be_and_whole_tiles():
    assert [chunk.rows for chunk in planner.row_chunks(1000, 700)] == [slice(0, 512), slice(512, 1000)]
    assert [chunk.rows for chunk in planner.row_chunks(8192, 4096)] == [slice(0, 4096), slice(4096, 8192)]
    assert [chunk.rows for chunk in planner.row_chunks(21, 10)] == [slice(0, 7), slice(7, 14), slice(14, 21)]


@pytest.mark.parametrize("spare", [0, 1, 3, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_of_questions_end_where_questions_end_and_fit(layout, spare):
    ragged = ragged_of(layout)
    capacity = max(layout, default=0) + spare
    chunks = planner.question_chunks(ragged, max(capacity, 1))
    assert chunks is not None
    assert_covers([(chunk.first, chunk.last) for chunk in chunks], ragged.num_rows)
    assert_covers([(chunk.first_question, chunk.last_question) for chunk in chunks], len(layout))
    for chunk in chunks:
        assert chunk.last - chunk.first == sum(layout[chunk.first_question : chunk.last_question]) <= capacity


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout and max(layout) > 1])
def test_a_question_that_does_not_fit_has_no_chunks(layout):
    assert planner.question_chunks(ragged_of(layout), max(layout) - 1) is None


def test_chunks_of_questions_are_even():
    def sizes(layout: tuple[int, ...], capacity: int) -> list[int]:
        chunks = planner.question_chunks(ragged_of(layout), capacity)
        assert chunks is not None
        return [chunk.last - chunk.first for chunk in chunks]

    assert sizes((10,) * 8, 80) == [80]
    assert sizes((10,) * 8, 79) == [40, 40]  # not 70 and 10
    assert sizes((10,) * 9, 40) == [30, 30, 30]
    assert sizes((10, 10, 10, 30), 40) == [30, 30]


def test_the_workspace_is_counted_in_rows_of_logits_padded_to_128_bytes():
    assert planner.rows_that_fit(1, 1 << 18, torch.float32) == 1
    assert planner.rows_that_fit(4, 1 << 18, torch.bfloat16) == 8
    assert planner.rows_that_fit(1, (1 << 16) + 1, torch.float32) == 3  # four rows without the padding
    assert planner.rows_that_fit(0, 100, torch.float32) == 1
    third = logits_mib(torch_rows, 1, torch.float32)  # plain torch works on copies of the logits
    assert planner.rows_that_fit(third, 64, torch.float32) == 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 1000, 1024, 2048, 4095, 49152, 151936])
def test_rows_of_logits_start_at_whole_lines_and_on_cpus_never_whole_pages_apart(vocabulary, dtype):
    buffer = row_buffer(3, vocabulary, torch.empty(0), dtype)
    step = buffer.stride(0) * dtype.itemsize
    assert buffer.shape == (3, vocabulary) and buffer.dtype == dtype
    assert step % 128 == 0 and step % 4096 != 0 and 0 <= buffer.stride(0) - vocabulary < 128


ROW_MIB: dict[str, Any] = {"vocabulary": 1 << 19, "dtype": torch.bfloat16}  # one row of logits takes one MiB


def test_weights_given_beforehand_let_rows_share_a_chunk_and_a_rule_or_a_divergence_keeps_questions_whole():
    ragged = ragged_of((4, 2, 5))

    def bounds(**options: Any) -> list[tuple[int, int]] | None:
        chunks = planner.weighted_chunks(ragged, **ROW_MIB, **options)
        return None if chunks is None else [(chunk.first, chunk.last) for chunk in chunks]

    assert bounds(workspace_mib=6, given=True, divergence=False) == [(0, 6), (6, 11)]
    assert bounds(workspace_mib=4, given=True, divergence=False) == [(0, 4), (4, 8), (8, 11)]
    assert bounds(workspace_mib=4, given=True, divergence=True) is None
    assert bounds(workspace_mib=4, given=False, divergence=False) is None
    for given, divergence in ((True, True), (False, False), (False, True)):
        assert bounds(workspace_mib=7, given=given, divergence=divergence) == [(0, 6), (6, 11)]
        assert bounds(workspace_mib=11, given=given, divergence=divergence) == [(0, 11)]


@pytest.mark.parametrize("given", [True, False])
def test_float16_takes_two_passes_whatever_fits(given):
    arguments = (ragged_of((4, 2, 5)), 100, torch.float16, 1000)
    assert planner.weighted_chunks(*arguments, given=given, divergence=False) is None


def test_a_batch_without_rows_has_no_chunks():
    ragged = Ragged.from_labels(torch.full((6,), -100), torch.tensor([0, 2, 6]), torch.tensor([0, 2]))
    assert planner.row_chunks(0, 5) == ()
    assert planner.question_chunks(ragged, 5) == (Chunk(0, 0, 0, 1),)


@pytest.mark.parametrize("workspace_mib", [0, 1, 64])
@pytest.mark.parametrize("rows", [0, 1, 900, 1024, 9000])
@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 600, 5003, 49152, 151936])
def test_blocks_of_the_vocabulary_cover_every_column_once_and_fit(vocabulary, rows, workspace_mib):
    blocks = planner.vocabulary_blocks(vocabulary, rows, workspace_mib, torch.bfloat16)
    assert_covers(blocks, vocabulary)
    widest = max(last - first for first, last in blocks)
    assert widest <= 256 or widest * rows * 2 <= workspace_mib << 20
    assert all(first % 256 == 0 for first, _ in blocks)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("wants", ["hw", "h", ""])
@pytest.mark.parametrize("layout", [(3, 1, 2, 3), (7, 2)], ids=["questions_fit", "a_question_does_not"])
def test_no_more_logits_exist_than_the_workspace_holds(layout, wants, given, monkeypatch):
    from compact_kernels.head import tokens, torch_rows, weighted

    vocabulary, mib = 1 << 16, 4  # room for four rows, which plain torch works on in four copies
    seen = []

    def measured(function: Any) -> Any:
        def buffer(rows: int, columns: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            seen.append(rows * columns * dtype.itemsize)
            return function(rows, columns, like, dtype)

        return buffer

    def statistics(x: torch.Tensor, *arguments: Any) -> None:
        seen.append(x.shape[0] * vocabulary * x.element_size())
        plain(x, *arguments)

    without_library(monkeypatch)
    plain = torch_rows.statistics
    monkeypatch.setattr(torch_rows, "statistics", statistics)
    for module in (tokens, weighted):
        monkeypatch.setattr(module, "row_buffer", measured(module.row_buffer))
    ragged = ragged_of(layout)
    hidden = torch.randn(int(ragged.cu_seqlens[-1]), 3).requires_grad_("h" in wants)
    weight = torch.randn(vocabulary, 3).requires_grad_("w" in wants)
    weights = torch.ones(ragged.num_sequences) if given else None
    consensus = torch.zeros(ragged.num_sequences)
    targets = torch.randint(vocabulary, (hidden.shape[0],))
    loss = compatibility_loss(
        hidden, weight, targets, ragged, weights=weights, consensus=consensus, workspace_mib=mib
    ).loss
    if wants:
        loss.backward()
    assert 3 * vocabulary * 4 <= max(seen) <= (mib << 20) // 4
