"""What a recorded batch gives: norms by rationale, by group of parameters, and how sure they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compact_kernels.rule import segment_sum
from compact_kernels.sample_norms.segments import Segments

if TYPE_CHECKING:
    from compact_kernels.sample_norms.recorder import SampleGradNorms


@dataclass(eq=False)
class Slots:
    """Leaves whose gradients become norms, for batches of one shape: one at a time."""

    shape: object
    leaves: list[tuple[str, str, Tensor]]  # (group, kind, leaf)
    names: dict[int, list[str]]  # parameters behind each leaf, by its id
    batch: SampleNorms | None = None  # whose they are now

    def awaited(self) -> bool:
        """Whether a forward pass has taken them, and no backward pass has come to them yet."""
        return self.batch is not None and all(leaf.grad is None for _, _, leaf in self.leaves)


@dataclass(frozen=True, eq=False)
class SampleNorms:
    """Norms of a batch of S rationales. Read them after its backward pass, before gradients are clipped or used."""

    recorder: SampleGradNorms
    segments: Segments
    slots: Slots
    before: dict[str, tuple[int, int]]  # each parameter's gradient when the batch began: its id and version
    weights: Tensor | None  # (S,) c_s, where norms are unweighted

    @property
    def squared(self) -> Tensor:
        """(S,) ‖gradient of the loss through rationale s‖² over all trainable parameters. float32, or float64."""
        return torch.stack(list(self.by_group.values())).sum(0)

    @property
    def norms(self) -> Tensor:
        """(S,) u_s, the norm of what flowed through each rationale; n_s where norms are unweighted (method §6)."""
        return self.squared.clamp_min(0).sqrt()

    def per_weight(self, weights: Tensor) -> Tensor:
        """n_s = u_s / c_s, (S,): the norm of the unweighted loss; NaN, not measured, where c_s is 0.

        Args:
            weights: c_s, what rationale s weighed in the loss: α_s R/Q, by tokens α_s R/N (method §6). (S,)
        """
        return torch.where(weights > 0, self.norms / weights, float("nan"))

    @property
    def by_group(self) -> dict[str, Tensor]:
        """The same (S,) for every group of parameters.

        Raises:
            RuntimeError: a parameter has a gradient of this batch and no norm: its layer was not called as a module.
                Or two backward passes came to it; or the recorder has gone on to another batch; or there was no pass.
        """
        self._check()
        sums: dict[str, Tensor] = {}
        bundles: dict[tuple[str, str, tuple], list[Tensor]] = {}
        for group, kind, slot in self.slots.leaves:
            if slot.grad is not None:
                bundles.setdefault((group, kind, tuple(slot.shape)), []).append(slot.grad)
        for (group, kind, _), grads in bundles.items():
            part = self._reduced(kind, torch.stack(grads))
            sums[group] = part if group not in sums else sums[group] + part
        if not sums:
            raise RuntimeError("no norms yet: run loss.backward() before reading them")
        return sums

    @property
    def standard_error(self) -> Tensor:
        """(S,) of `squared`, where it is an estimate; zeros where it is exact."""
        self._check()
        variances = [
            slot.grad[1] for _, kind, slot in self.slots.leaves if kind == "estimate" and slot.grad is not None
        ]
        return torch.stack(variances).sum(0).sqrt() if variances else torch.zeros_like(self.squared)

    def _reduced(self, kind: str, grads: Tensor) -> Tensor:
        """Stacked parts of one kind → (S,)."""
        if kind == "tiles":  # (n, M)
            return segment_sum(grads.sum(0), self.segments.cu_tiles)
        if kind == "vectors":  # (n, S, slices, D)
            return grads.sum(2).square().sum((0, 2))
        if kind == "estimate":  # (n, 2, S)
            return grads[:, 0].sum(0)
        return grads.sum((0, 1))  # (n, P, S)

    def _check(self) -> None:
        if self.slots.batch is not self:
            raise RuntimeError("norms of an earlier batch: read them before the recorder's next batch begins")
        if self.weights is not None and not self.weights._version:  # nobody has written c_s; its values are not asked
            raise RuntimeError(
                "unweighted norms: the loss has to be compact_kernels.compatibility_loss, which knows c_s"
            )
        again = [slot for _, _, slot in self.slots.leaves if slot.again]  # type: ignore[attr-defined]
        if again:
            name = self.slots.names[id(again[0])][0]
            raise RuntimeError(
                f"two backward passes came to {name}: the norms of two gradients do not add up to their sum's. Add "
                "losses up for one pass, or give each a forward pass in a record() of its own"
            )
        missing: list[str] = []
        measured: set[str] = set()
        for _, _, slot in self.slots.leaves:
            names = self.slots.names[id(slot)]
            if slot.grad is None:
                missing += names
            else:
                measured.update(names)
        parameters = self.recorder.parameters
        for name in dict.fromkeys(missing):
            gradient = parameters[name].grad
            if name in measured or gradient is None or self.before.get(name) == (id(gradient), gradient._version):
                continue
            raise RuntimeError(
                f"{name} has a gradient but no norm: its layer was not called as a module, so nothing saw its input. "
                "A head that a loss takes as a weight is covered by compact_kernels.compatibility_loss"
            )
