"""COMPACT: multi-teacher chain-of-thought distillation, weighted by compatibility with the student.

"method §4" and "eq. 7" in docstrings are sections of docs/method.md and the papers' equations.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compact.config import CompactConfig
    from compact.trainer import CompactTrainer

__all__ = ["CompactConfig", "CompactTrainer"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: reading a recipe's help needs neither torch nor transformers."""
    if name == "CompactConfig":
        from compact.config import CompactConfig

        return CompactConfig
    if name == "CompactTrainer":
        from compact.trainer import CompactTrainer

        return CompactTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
