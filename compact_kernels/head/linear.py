"""The output head of a language model, as the ops see it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from compact_kernels.head.rows import in_rows


@dataclass(frozen=True)
class LinearHead:
    """logits z = softcap·tanh(scale·(h Wᵀ + b) / softcap) / temperature."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, hidden: Tensor) -> Tensor:
        """(…, D) to logits (…, V) in at least float32."""
        return self.of_raw(F.linear(hidden, self.weight, self.bias))

    def of_raw(self, logits: Tensor) -> Tensor:
        """h Wᵀ + b to logits in at least float32."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature

    def in_dtype(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> LinearHead:
        """The same head with these tensors, in the dtype that computes."""
        return replace(self, weight=in_rows(weight, dtype), bias=None if bias is None else bias.to(dtype).contiguous())

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @property
    def slope(self) -> float:
        """dz/draw without the softcap's own factor, 1 − tanh²."""
        return self.logit_scale / self.temperature

    @property
    def numbers(self) -> list[float]:
        """Logit scale, softcap (0: none) and temperature."""
        return [float(self.logit_scale), float(self.softcap or 0.0), float(self.temperature)]

    @property
    def natural(self) -> tuple[float, float]:
        """(inner, outer): z is raw·inner and outer 0, or with a softcap tanh(raw·inner)·outer."""
        if self.softcap is None:
            return self.slope, 0.0
        return self.logit_scale / self.softcap, self.softcap / self.temperature

    @property
    def base2(self) -> tuple[float, float]:
        """(inner, outer): z·log₂e is raw·inner, or with a softcap tanh(raw·inner)·outer."""
        if self.softcap is None:
            return self.slope * math.log2(math.e), 1.0
        return self.logit_scale / self.softcap, self.softcap / self.temperature * math.log2(math.e)
