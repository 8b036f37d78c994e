"""Which way through the head a batch takes, and in what pieces: decided on the host, from sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class Plan:
    """How the loss of a batch is computed.

    * ``weighted``: loss and gradients in the forward pass, α decided chunk by chunk. 3 products (2 with a frozen head).
    * ``tokens``: differentiable log-probs, α decided over the whole batch. With a frozen head 2 products, because
      a row's gradient is its weight times a vector that is known before the weight; else 4 (two passes).
    * ``statistics``: no gradients. 1 product.
    """

    mode: Literal["weighted", "tokens", "statistics"]
    chunks: tuple[Chunk, ...]


def rows_that_fit(workspace_mib: int, vocabulary: int, dtype: torch.dtype) -> int:
    """How many rows of logits the workspace holds, one at least."""
    return max(1, (workspace_mib << 20) // (dtype.itemsize * -(-vocabulary // 64) * 64))


def plan(
    ragged: Ragged,
    vocabulary: int,
    dtype: torch.dtype,
    workspace_mib: int,
    *,
    gradients: bool,
    alpha: Literal["given", "by question", "by batch"],
    divergence: bool,
) -> Plan:
    """Choose mode and chunks.

    Args:
        alpha: what the weights may depend on.
        divergence: whether the divergence of a question's answers is part of the loss (needs whole questions).
    """
    capacity = rows_that_fit(workspace_mib, vocabulary, dtype)
    if not gradients:
        return Plan("statistics", row_chunks(ragged.num_rows, capacity))
    # float16 cannot hold unnormalised probabilities: its gradient rows are made once their sum is known.
    if alpha != "by batch" and dtype != torch.float16:
        if alpha == "given" and not divergence:
            return Plan("weighted", row_chunks(ragged.num_rows, capacity))
        if (chunks := question_chunks(ragged, capacity)) is not None:
            return Plan("weighted", chunks)
    return Plan("tokens", row_chunks(ragged.num_rows, capacity))


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
    sizes = ragged.sizes
    ends = [sizes.cu_rows[rationale] for rationale in sizes.cu_questions]  # rows before each question, (Q+1,)
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


def vocabulary_blocks(vocabulary: int, num_rows: int, workspace_mib: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Even ranges of columns such that (num_rows, width) gradient rows fit the workspace, 256 columns at least."""
    width = max(256, (workspace_mib << 20) // (dtype.itemsize * max(num_rows, 1)))
    even = math.ceil(vocabulary / math.ceil(vocabulary / width))
    width = math.ceil(even / 256) * 256
    return [(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]
