"""What every strategy is: from the statistics of a batch to a weight per rationale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from torch import Tensor

from compact.config import CompactConfig
from compact.errors import UserError
from compact.student import StudentOutput
from compact_kernels import Ragged, Statistics
from compact_kernels.weighting import Kind


class Context(NamedTuple):
    """What a strategy may know of a batch besides its statistics."""

    teachers: Tensor  # (S,) int64, indices into the strategy's teacher names
    pooled: Tensor  # (S, D) the student's mean hidden state of each rationale, detached
    ragged: Ragged
    question_ids: Sequence[str]  # Q of them
    embeddings: Tensor | None = None  # (S, E) sentence embeddings, where the configuration asks for them
    output: StudentOutput | None = None  # the whole forward pass, its graph included


class Strategy:
    """Decides α. Subclasses override :meth:`weights` or :meth:`given`; one that learns also the methods below them.

    Args:
        config: the method's configuration.
        teachers: names of the dataset's teachers, in the order of their indices.
    """

    divergence: Kind = "kl"  # the kind of L_MCon that belongs to the method
    warmup_epochs: float = 0.0  # passes over the data that the strategy learns from before the student's first step

    def __init__(self, config: CompactConfig, teachers: Sequence[str]) -> None:
        self.config = config
        self.teachers = list(teachers)

    def given(self, context: Context) -> Tensor | None:
        """α (S,) where it needs no statistics of the batch: then the pass over the head has nothing to wait for."""
        return None

    def weights(self, statistics: Statistics, context: Context) -> Tensor:
        """α (S,), ≥ 0, summing to one over each question. Called without gradient, inside the pass."""
        raise NotImplementedError

    def bind(self, context: Context) -> Callable[[Statistics], Tensor]:
        """The rule of one batch, as :func:`compact_kernels.compatibility_loss` takes it."""
        return lambda statistics: one_a_rationale(self, self.weights(statistics, context), context)

    def uses_teacher(self, index: int) -> bool:
        """Whether this teacher's rationales are trained on; see :meth:`restrict`."""
        return True

    def restrict(self, dataset: Dataset) -> Dataset:
        """The tokenized questions with the rationales that are trained on; those left without any are dropped.

        Raises:
            UserError: no question is left.
        """
        used = [self.uses_teacher(index) for index in range(len(self.teachers))]
        if all(used):
            return dataset

        def keep(item: dict[str, Any]) -> dict[str, Any]:
            return {"rationales": [rationale for rationale in item["rationales"] if used[rationale["teacher"]]]}

        kept = dataset.map(keep).filter(lambda item: len(item["rationales"]) > 0)
        if not len(kept):
            names = ", ".join(name for name, kept in zip(self.teachers, used) if kept)
            raise UserError(
                f"no question to train on has a usable rationale of {names}: all were refused, or dropped by "
                "data.wrong_answers"
            )
        return kept

    def observe(self, statistics: Statistics, context: Context, alpha: Tensor) -> None:
        """Called after every training batch's loss: what a learned strategy keeps of it, until :meth:`step`."""

    def step(self, learning_rate: float | None = None) -> None:
        """Called on every rank after each optimizer step of the student, and in the warm-up after as many batches.

        Args:
            learning_rate: the student's in that step; None in the warm-up, in which the student does not move.
        """

    def logs(self) -> dict[str, float]:
        """What there is to say since the last time, on this rank; the trainer asks whenever it writes its table.

        It is in the log, and what is finite in the table's last row then, under `strategy`.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that must survive a resume; saved in every checkpoint. Called on every rank.

        They are loaded on the CPU.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""


def one_a_rationale(strategy: Strategy, alpha: Tensor, context: Context) -> Tensor:
    """α as a strategy gave it.

    Raises:
        UserError: it is no tensor of one number a rationale.
    """
    wanted = context.teachers.shape
    if not isinstance(alpha, Tensor) or alpha.shape != wanted:
        kind = type(strategy)
        given = f"weights of shape {tuple(alpha.shape)}" if isinstance(alpha, Tensor) else f"a {type(alpha).__name__}"
        raise UserError(
            f"strategy {kind.__module__}:{kind.__qualname__}: it gave {given} for a batch of {wanted[0]} rationales; "
            "they are a tensor, one number a rationale"
        )
    return alpha
