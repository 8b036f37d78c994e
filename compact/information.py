"""Mutual information along the rationales while a student trains: a file of curves beside the run's table."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compact.config import CompactConfig
from compact.files import append_rows, write_atomically
from compact.loss import targets_of
from compact.metrics import INFORMATION, read_metrics
from compact.student import StudentOutput
from compact_kernels import AdaptabilityOptions, CompatibilityOutput, Ragged
from compact_kernels.information import InformationQueue, answer_embeddings, proxy_controls
from compact_kernels.ragged import on_device

BINS = 20  # parts of a rationale's body, whatever its length, that a curve has points for
CURVES = ("proxy", "phsic")


class InformationLog:
    """Measures every so many steps, on the device, and writes a row a measurement.

    A row: ``step``, ``hsic`` (unbiased, over batch and queue; null below four questions), ``seconds`` that the
    measurement took, and per teacher ``count``, the curves ``proxy`` (eq. 2, nats) and ``phsic`` over the body, first
    to last token in :data:`BINS` parts (null where no rationale reached one), S_MI and its two controls, and the mean
    of PHSIC over the scored rows. The queue is not part of a checkpoint: a run that goes on fills it anew.

    Args:
        path: information.jsonl. teachers: names, in the order of their indices.
    """

    def __init__(self, path: Path, teachers: Sequence[str], config: CompactConfig) -> None:
        self.path, self.teachers, self.config = path, list(teachers), config
        self.queue = InformationQueue(config.information.queue)
        self._ids: dict[str, int] = {}
        self._pending: list[tuple[int, _Clock, Tensor]] = []
        self._write = False

    def start(self, step: int, *, write: bool) -> None:
        """Begin after optimizer step `step`: rows beyond it are cut off."""
        self._write = write
        if write and self.path.exists():
            kept = read_metrics(self.path, until=step)
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    @torch.no_grad()
    def measure(self, step: int, output: StudentOutput, result: CompatibilityOutput, batch: Mapping[str, Any]) -> None:
        """Of one batch, after its forward pass."""
        device = output.hidden.device
        clock = _Clock(device)
        ragged: Ragged = batch["ragged"]
        head, options = output.head, self.config.adaptability
        evidence = result.statistics.tokens.evidence
        with output.precision(self.config.head_dtype):
            controls = proxy_controls(
                output.hidden,
                head.weight,
                targets_of(batch),
                ragged,
                AdaptabilityOptions(options.epsilon, options.span, options.length_norm),
                evidence=evidence,
                **head.options,
                workspace_mib=self.config.workspace_mib,
            )
        numbers = [self._ids.setdefault(name, len(self._ids)) for name in batch["question_ids"]]
        embedded = answer_embeddings(head.weight, ragged)
        found = self.queue.measure(output.hidden, embedded, on_device(numbers, torch.int64, device), ragged)
        curves = torch.stack([evidence, found.curve[ragged.rows], torch.ones_like(evidence)])  # (3, N)
        scalars = torch.stack([*controls, found.scalar])  # (4, S)
        total = torch.cat([*self._sums(curves, scalars, ragged, batch["teachers"]), *_known(found.hsic[None])])
        self._pending.append((step, clock.stop(), total))

    def _sums(self, curves: Tensor, scalars: Tensor, ragged: Ragged, teachers: Tensor) -> tuple[Tensor, Tensor]:
        """What adds up over ranks: by teacher and part of the body, the last being beyond it, and by teacher."""
        owner, count = ragged.sequence_of_row, len(self.teachers)
        steps = (ragged.body_lengths + 1)[owner]  # r_0 … r_B
        part = (ragged.step_of_row * BINS // steps).clamp_max(BINS)
        place = teachers[owner] * (BINS + 1) + part
        by_part = curves.new_zeros(3, count * (BINS + 1), dtype=torch.float64).index_add_(1, place, curves.double())
        both = torch.cat(_known(scalars))  # (8, S)
        by_teacher = both.new_zeros(len(both), count).index_add_(1, teachers, both)
        return by_part.flatten(), by_teacher.flatten()

    def flush(self, accelerator: Any) -> dict[str, float]:
        """Write what is waiting, and give the last measurement's scalars for the log. Every rank calls it."""
        if not self._pending:
            return {}
        pending, self._pending = self._pending, []
        matrix = accelerator.reduce(torch.stack([sums for _, _, sums in pending]), "sum").cpu()
        rows = [self._row(step, clock.seconds, sums) for (step, clock, _), sums in zip(pending, matrix)]
        if self._write:
            append_rows(self.path, rows)
        logs = {} if rows[-1]["hsic"] is None else {"information/hsic": rows[-1]["hsic"]}
        for name, entry in rows[-1]["teachers"].items():
            logs |= {f"information/{key}/{name}": entry[key] for key in INFORMATION if entry[key] is not None}
        return logs

    def _row(self, step: int, seconds: float, sums: Tensor) -> dict[str, Any]:
        count = len(self.teachers)
        parts, scalars, hsic = sums.split([3 * count * (BINS + 1), 2 * len(INFORMATION) * count, 2])
        parts = parts.view(3, count, BINS + 1)[..., :BINS]
        scalars = scalars.view(2, len(INFORMATION), count)
        teachers = {}
        for i, name in enumerate(self.teachers):
            if not scalars[1, 0, i]:
                continue
            teachers[name] = {
                "count": int(scalars[1, 0, i]),
                **{curve: _means(parts[j, i], parts[2, i]) for j, curve in enumerate(CURVES)},
                **dict(zip(INFORMATION, _means(scalars[0, :, i], scalars[1, :, i]))),
            }
        return {"step": step, "hsic": _means(hsic[:1], hsic[1:])[0], "seconds": seconds, "teachers": teachers}


def _known(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values, 0 where they are not finite, and whether they are, for sums; float64."""
    known = values.abs() < math.inf
    return values.where(known, 0.0).double(), known.double()


def _means(sums: Tensor, counts: Tensor) -> list[float | None]:
    means = (sums / counts).tolist()
    return [value if math.isfinite(value) else None for value in means]


class _Clock:
    """What a measurement takes of its device's time, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = self._now()

    def stop(self) -> _Clock:
        self._stopped = self._now()
        return self

    @property
    def seconds(self) -> float:
        if isinstance(self._started, float):
            return self._stopped - self._started
        return self._started.elapsed_time(self._stopped) / 1e3

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
