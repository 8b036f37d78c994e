"""How α is chosen. A strategy is a class, of this folder by its name or of the user's by MODULE:CLASS."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from torch import Tensor

from compact.config import CompactConfig
from compact.errors import UserError
from compact.files import file_digest
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
        return own_strategy(config.strategy)(config, teachers)
    if config.strategy not in STRATEGIES:
        raise UserError(f"strategy is {config.strategy!r}; it is one of {', '.join(STRATEGIES)}, or MODULE:CLASS")
    return STRATEGIES[config.strategy](config, teachers)


def check_weights(
    name: str, alpha: Tensor, cu_questions: Sequence[int], question_ids: Sequence[str], *, capped: bool = False
) -> None:
    """α (S,) of a batch must be ≥ 0 and add up to one over each question, whose first rationales `cu_questions` names.

    Args:
        capped: by their gradients' norms, so that they may add up to less.

    Raises:
        UserError: they are not so, on which question.
    """
    values = alpha.tolist()
    for question, first, last in zip(question_ids, cu_questions, cu_questions[1:]):
        own = values[first:last]
        if not (all(value >= 0 for value in own) and (0 if capped else 0.99) <= sum(own) <= 1.01):
            shown = ", ".join(f"{value:.3g}" for value in own)
            raise UserError(
                f"strategy {name}: its weights of question {question!r} are {shown}; they must be ≥ 0 and add up to 1"
            )


def own_strategy(place: str) -> type[Strategy]:
    """The class that MODULE:CLASS names.

    Raises:
        UserError: there is none, or it says nothing of weights.
    """
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
    if found.weights is Strategy.weights and found.given is Strategy.given:
        raise UserError(f"strategy: {place} says nothing of weights: it needs a method `weights`, or `given`")
    return found


@cache
def own_source(place: str) -> str | None:
    """A digest of MODULE:CLASS's file as this process first saw it; None for a strategy of this package.

    Raises:
        UserError: as :func:`own_strategy`.
    """
    if ":" not in place:
        return None
    file = getattr(sys.modules[own_strategy(place).__module__], "__file__", None)
    return None if file is None else file_digest(Path(file))


__all__ = ["STRATEGIES", "Context", "Strategy", "build_strategy", "check_weights", "own_source"]
