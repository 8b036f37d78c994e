"""COMPACT's loss in other people's trainers, from one door: a mixin for transformers' and TRL's, parts for others."""

from compact.adapters.trainer import DistillationMixin
from compact.adapters.windows import WindowLoader
from compact.collate import Collator, to_device
from compact.loss import distillation_loss
from compact.strategies import build_strategy
from compact.student import check, prepare

__all__ = [
    "Collator",
    "DistillationMixin",
    "WindowLoader",
    "build_strategy",
    "check",
    "distillation_loss",
    "prepare",
    "to_device",
]
