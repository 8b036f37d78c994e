"""Which way through the head a batch takes, and in what pieces: decided on the host, from sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from compact_kernels.ragged import Ragged


@dataclass(frozen=True)
class Chunk:
    """Scored rows [first, last) of questions [first_question, last_question)."""

    first: int
    last: int
    first_question: int
    last_question: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)


def rows_that_fit(workspace_mib: float, vocabulary: int, dtype: torch.dtype) -> int:
    """How many rows of logits the workspace holds, one at least."""
    return max(1, int(workspace_mib * 2**20) // (dtype.itemsize * -(-vocabulary // 64) * 64))


def weighted_chunks(
    ragged: Ragged,
    vocabulary: int,
    dtype: torch.dtype,
    workspace_mib: float,
    *,
    given: bool,
    divergence: bool,
    pays_mib: float | None = None,
) -> tuple[Chunk, ...] | None:
    """The chunks of a pass that decides α as it goes; None if it has to see the whole batch before any gradient.

    Args:
        workspace_mib: what the logits of a chunk may take.
        given: α is known beforehand: any rows may share a chunk. Otherwise it takes whole questions.
        divergence: the divergence of a question's answers is taken along, which takes whole questions too.
        pays_mib: what logits need to take for speed; only a question that has more rows makes a larger chunk.
    """
    if (
        dtype == torch.float16
    ):  # cannot hold unnormalised probabilities: gradient rows are made once their sum is known
        return None
    capacity = rows_that_fit(workspace_mib, vocabulary, dtype)
    pays = capacity if pays_mib is None else rows_that_fit(pays_mib, vocabulary, dtype)
    if given and not divergence:
        return row_chunks(ragged.num_rows, min(capacity, pays))
    ends = _question_ends(ragged)
    largest = max((last - first for first, last in zip(ends, ends[1:])), default=0)
    return question_chunks(ragged, min(capacity, max(pays, largest)))


def row_chunks(num_rows: int, capacity: int, multiple: int = 256) -> tuple[Chunk, ...]:
    """Even chunks of at most `capacity` rows, whole tiles where possible."""
    if num_rows == 0:
        return ()
    count = -(-num_rows // capacity)
    size = -(-num_rows // count)
    rounded = -(-size // multiple) * multiple
    size = rounded if rounded <= capacity else min(capacity, max(size, capacity // multiple * multiple))
    return tuple(Chunk(start, min(start + size, num_rows), 0, 0) for start in range(0, num_rows, size))


def question_chunks(ragged: Ragged, capacity: int) -> tuple[Chunk, ...] | None:
    """Even chunks of whole questions with at most `capacity` rows each; None if one question has more."""
    ends = _question_ends(ragged)
    if any(last - first > capacity for first, last in zip(ends, ends[1:])):
        return None
    count = -(-ends[-1] // capacity)
    chunks: list[Chunk] = []
    start = 0  # a question
    for question in range(1, len(ends)):
        rows, following = ends[question] - ends[start], ends[min(question + 1, len(ends) - 1)] - ends[start]
        even = -(-(ends[-1] - ends[start]) // max(count - len(chunks), 1))
        last = question == len(ends) - 1
        # End here if the next question does not fit, or if that comes nearer to an even share.
        if last or following > capacity or following - even > even - rows:
            chunks.append(Chunk(ends[start], ends[question], start, question))
            start = question
    return tuple(chunks)


def _question_ends(ragged: Ragged) -> list[int]:
    """Rows before each question, and all, (Q+1,)."""
    sizes = ragged.sizes
    return [sizes.cu_rows[rationale] for rationale in sizes.cu_questions]


def vocabulary_blocks(
    vocabulary: int, num_rows: int, workspace_mib: float, dtype: torch.dtype
) -> list[tuple[int, int]]:
    """Even ranges of columns such that (num_rows, width) gradient rows fit the workspace, 256 columns at least."""
    most = max(1, int(workspace_mib * 2**20) // (dtype.itemsize * max(num_rows, 1)) // 256)  # tiles of 256 columns
    tiles = math.ceil(vocabulary / 256)
    width = 256 * math.ceil(tiles / math.ceil(tiles / most))
    return [(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]
