"""How α is chosen. A strategy is a class in a file of this folder and a line in STRATEGIES."""

from __future__ import annotations

from collections.abc import Sequence

from compact.config import CompactConfig
from compact.errors import UserError
from compact.strategies.base import Context, Strategy
from compact.strategies.baselines import CaMkd, Fixed, LowestLoss, Single, Uniform
from compact.strategies.compact import Compact
from compact.strategies.mind import Mind

STRATEGIES: dict[str, type[Strategy]] = {
    "compact": Compact,
    "mind": Mind,
    "uniform": Uniform,
    "single": Single,
    "lowest_loss": LowestLoss,
    "ca_mkd": CaMkd,
    "fixed": Fixed,
}


def build_strategy(config: CompactConfig, teachers: Sequence[str]) -> Strategy:
    """The strategy that `config.strategy` names, for the teachers of this dataset.

    Raises:
        UserError: an unknown strategy, or a teacher that the dataset does not have.
    """
    if config.strategy not in STRATEGIES:
        raise UserError(f"strategy is {config.strategy!r}; it is one of {', '.join(STRATEGIES)}")
    return STRATEGIES[config.strategy](config, teachers)


__all__ = ["STRATEGIES", "Context", "Strategy", "build_strategy"]
