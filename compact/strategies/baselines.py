"""Weightings to compare with (method §5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compact.config import CompactConfig
from compact.errors import UserError
from compact.strategies.base import Context, Strategy
from compact_kernels import CompatibilityRule, Statistics
from compact_kernels.ragged import on_device
from compact_kernels.rule import question_softmax, segment_sum


class Uniform(Strategy):
    """Every rationale of a question weighs the same: COMPACT's rule with no metric weighed."""

    rule = CompatibilityRule(adaptability=0, consensus=0, difficulty=0)

    def weights(self, statistics: Statistics, context: Context) -> Tensor:
        return self.rule(statistics)

    def bind(self, context: Context) -> CompatibilityRule:
        return self.rule


class LowestLoss(Strategy):
    """All weight to the rationale that the student finds easiest; ties share it."""

    def weights(self, statistics: Statistics, context: Context) -> Tensor:
        ragged = statistics.ragged
        lowest = torch.segment_reduce(statistics.difficulty, "min", offsets=ragged.cu_questions, unsafe=True)
        best = (statistics.difficulty == lowest[ragged.question_of_sequence]).to(statistics.difficulty.dtype)
        return best / segment_sum(best, ragged.cu_questions)[ragged.question_of_sequence]


class CaMkd(Strategy):
    """CA-MKD: w_k = (1 − softmax_k CE_k)/(K − 1): what the student finds hard weighs less. 1 for K = 1."""

    def weights(self, statistics: Statistics, context: Context) -> Tensor:
        ragged = statistics.ragged
        question = ragged.question_of_sequence
        others = (ragged.cu_questions.diff() - 1)[question]
        hardness = question_softmax(statistics.difficulty, ragged)
        return ((1 - hardness) / others.clamp_min(1)).where(others > 0, 1.0)


class Fixed(Strategy):
    """A weight per teacher, given (TinyLLM); normalised over the teachers that a question has."""

    def __init__(self, config: CompactConfig, teachers: Sequence[str]) -> None:
        super().__init__(config, teachers)
        fixed = config.weights.fixed or {}
        _check_known("weights.fixed", fixed, teachers)
        self.table = [float(fixed.get(name, 0.0)) for name in teachers]
        if any(weight < 0 for weight in self.table) or not any(weight > 0 for weight in self.table):
            raise UserError(f"weights.fixed is {fixed}: weights are not negative and at least one is positive")

    def given(self, context: Context) -> Tensor:
        ragged = context.ragged
        weight = on_device(self.table, torch.float32, ragged.device)[context.teachers]
        total = segment_sum(weight, ragged.cu_questions)[ragged.question_of_sequence]
        return torch.where(total > 0, weight / total, 0.0)  # 0: a question of none of these teachers

    def uses_teacher(self, index: int) -> bool:
        return self.table[index] > 0


class Single(Strategy):
    """One teacher alone: ordinary fine-tuning on its rationales. Others', where a batch has any, weigh nothing."""

    def __init__(self, config: CompactConfig, teachers: Sequence[str]) -> None:
        super().__init__(config, teachers)
        name = config.weights.teacher
        if name is None:
            raise UserError("strategy is single: name the teacher with weights.teacher")
        _check_known("weights.teacher", [name], teachers)
        self.teacher = self.teachers.index(name)

    def given(self, context: Context) -> Tensor:
        return (context.teachers == self.teacher).float()

    def uses_teacher(self, index: int) -> bool:
        return index == self.teacher


def _check_known(key: str, names: Sequence[str] | dict[str, float], teachers: Sequence[str]) -> None:
    for name in names:
        if name not in teachers:
            raise UserError(f"{key} names {name!r}, but the dataset's teachers are: {', '.join(teachers)}")
