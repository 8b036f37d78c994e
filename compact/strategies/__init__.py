"""How α is chosen. A strategy is a class, of this folder by its name or of the user's by MODULE:CLASS."""

from __future__ import annotations

import importlib
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
    if ":" in config.strategy:
        return _own(config.strategy)(config, teachers)
    if config.strategy not in STRATEGIES:
        raise UserError(f"strategy is {config.strategy!r}; it is one of {', '.join(STRATEGIES)}, or MODULE:CLASS")
    return STRATEGIES[config.strategy](config, teachers)


def _own(place: str) -> type[Strategy]:
    module, _, name = place.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # of what the module imports
        raise UserError(
            f"strategy: there is no module {error.name} to import {place} from: start in its folder, or put that "
            "folder into PYTHONPATH"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise UserError(f"strategy: {module} has no class {name} that is a subclass of compact.strategies.Strategy")
    return found


__all__ = ["STRATEGIES", "Context", "Strategy", "build_strategy"]
