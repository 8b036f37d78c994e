"""COMPACT: compatibility of each rationale with this student now (method eq. 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from compact.config import CompactConfig
from compact.strategies.base import Context, Strategy
from compact_kernels import CompatibilityRule, Statistics


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

    def weights(self, statistics: Statistics, context: Context) -> Tensor:
        return self.rule(statistics)

    def bind(self, context: Context) -> Callable[[Statistics], Tensor]:
        return self.rule  # handed over as it is, so that a fused pass can recognise it
