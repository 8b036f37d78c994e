"""What the tests of the plain definitions share: questions, packed, and a head; their loss and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compact_kernels import compatibility_loss
from tests import brute_force as loops
from tests.brute_force import Batch, Head, Question

COUNTS = (3, 1, 5, 2, 4)


def close(actual: Any, expected: Any, atol: float = 1e-10, rtol: float = 1e-9) -> None:
    """Compares in float64; a list or a number is one of Python's floats."""
    actual, expected = (
        x.detach() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in (actual, expected)
    )
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=rtol)


def run(batch: Batch, head: Head, **options: Any) -> Any:
    options.setdefault("consensus", batch.consensus)
    return compatibility_loss(batch.hidden, head.weight, batch.targets, batch.ragged, **head.options, **options)


def gradients(loss: Tensor, batch: Batch, head: Head) -> list[Tensor]:
    """Of hidden, weight and, if there is one, bias; an unconnected one is an error."""
    return list(torch.autograd.grad(loss, [batch.hidden, *head.leaves()], retain_graph=True))


def make(seed: int = 0, kind: str = "bias", counts: tuple[int, ...] = COUNTS) -> tuple[list[Question], Batch, Head]:
    questions = loops.random_questions(seed, counts)
    return questions, loops.pack(questions), loops.random_head(torch.Generator().manual_seed(seed), kind)
