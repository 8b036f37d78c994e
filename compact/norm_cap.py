"""A cap on every rationale's whole gradient, by what its norm was when the student met it last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compact_kernels.ragged import on_device


class LastNormCap:
    """Holds α_s at cap / ((R/Q)·n_s), n_s the norm of the unweighted loss when the rationale was seen last.

    Unlike a cap at the last hidden state it bounds the gradient of every parameter, the head's too, but by a norm that
    is as old as the rationale's last visit; at its first one a rationale is free.

    Args:
        questions: how many the run has at most. teachers: how many.
    """

    def __init__(self, cap: float, questions: int, teachers: int, device: torch.device) -> None:
        self.cap, self.teachers = cap, teachers
        self._rows: dict[str, int] = {}
        self._norms = torch.zeros(questions * teachers, dtype=torch.float32, device=device)  # 0: not seen yet

    def most(self, batch: Mapping[str, Any], normalizer: Tensor | float) -> Tensor:
        """(S,) what α may be at most; infinite where the rationale has not been met.

        Args:
            normalizer: c_s/α_s, R/Q (method §3).
        """
        known = self._norms[self._places(batch)]
        return torch.where(known > 0, self.cap / (known * normalizer), float("inf"))

    def remember(self, batch: Mapping[str, Any], norms: Tensor) -> None:
        """n_s (S,) of a batch, NaN where it was not measured. Of two rationales of one teacher the larger counts."""
        places = self._places(batch)
        norms = torch.where(norms.isfinite(), norms.to(self._norms.dtype), self._norms[places])
        self._norms.scatter_reduce_(0, places, norms, "amax", include_self=False)

    def _places(self, batch: Mapping[str, Any]) -> Tensor:
        rows = [self._rows.setdefault(name, len(self._rows)) for name in batch["question_ids"]]
        places = on_device(rows, torch.int64, self._norms.device)
        return places[batch["ragged"].question_of_sequence] * self.teachers + batch["teachers"]

    def state_dict(self) -> dict[str, Any]:
        return {"questions": list(self._rows), "norms": self._norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows = {name: row for row, name in enumerate(state["questions"])}
        self._norms.copy_(state["norms"])
