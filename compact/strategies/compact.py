"""COMPACT: compatibility of each rationale with this student now (method eq. 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from compact.config import CompactConfig
from compact.strategies.base import Context, Strategy
from compact_kernels import CompatibilityRule, Statistics

LEAST_LOSS = 1e-3  # nats a token: below it rationales are known alike, and a logarithm would tell them apart


class Compact(Strategy):
    """α = softmax over the question of β1·z(adaptability) + β2·z(consensus) − β3·z(difficulty), divided by τ."""

    def __init__(self, config: CompactConfig, teachers: Sequence[str]) -> None:
        super().__init__(config, teachers)
        self.rule = CompatibilityRule(
            adaptability=config.adaptability.weight,
            consensus=config.consensus.weight,
            difficulty=config.difficulty.weight,
            temperature=config.weights.temperature,
        )

    def compared(self, statistics: Statistics) -> Statistics:
        """The metrics as the rule compares them within each question."""
        if self.config.difficulty.kind != "log_loss":
            return statistics
        return replace(statistics, difficulty=statistics.difficulty.clamp_min(LEAST_LOSS).log())

    def weights(self, statistics: Statistics, context: Context) -> Tensor:
        return self.rule(self.compared(statistics))

    def bind(self, context: Context) -> Callable[[Statistics], Tensor]:
        if self.config.difficulty.kind == "log_loss":
            return super().bind(context)
        return self.rule  # handed over as it is, so that a fused pass can recognise it
