"""The table of a run: one row an optimizer step, kept on the device until somebody reads it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compact.errors import UserError
from compact.files import append_rows, write_atomically
from compact_kernels import CompatibilityOutput, SampleNorms
from compact_kernels.information import noise_scale
from compact_kernels.rule import question_spread, segment_sum

METRICS = ("adaptability", "consensus", "difficulty")
SIGNS = {"adaptability": 1, "consensus": 1, "difficulty": -1}  # of a metric's z-score in eq. 7
PEAK = 0.1  # nats: a jump of the evidence that counts as a peak
_SCALARS = ("loss", "loss_sft", "loss_mcon", "grad_norm", "questions", "alpha_entropy", *METRICS, "squared_norms")
INFORMATION = ("adaptability", "shuffled_mask", "wrong_answer", "phsic_mean")  # of compact.information, by rationale
NORMS = ("influence", "own_norm")  # u_s, and n_s where it was measured apart; known after the backward pass
EQUAL = "equal"  # what α would be if a question's rationales weighed the same: teachers may be missing from some
_PER_TEACHER = ("count", "alpha", EQUAL, *METRICS, *NORMS)


def batch_metrics(result: CompatibilityOutput, teachers: Tensor, num_teachers: int) -> Tensor:
    """What the table keeps of one batch, as sums that add up over batches and ranks: one vector on the device.

    Args:
        teachers: (S,) teacher index of every rationale.
    """
    statistics, ragged = result.statistics, result.statistics.ragged
    values = [getattr(statistics, name) for name in METRICS]
    entropy = segment_sum(torch.special.entr(result.alpha), ragged.cu_questions).sum()
    questions = result.alpha.new_full((), ragged.num_questions)
    spreads = [question_spread(value, ragged)[1].sum() for value in values]
    one_hot = torch.nn.functional.one_hot(teachers, num_teachers).to(result.alpha.dtype)  # (S, teachers)
    later = [torch.zeros_like(result.alpha)] * len(NORMS)
    equal = ragged.cu_questions.diff().to(result.alpha.dtype).reciprocal()[ragged.question_of_sequence]
    columns = torch.stack([torch.ones_like(result.alpha), result.alpha, equal, *values, *later])  # (8, S)
    none = torch.zeros_like(result.sft)
    scalars = [result.loss.detach(), result.sft, result.divergence, none, questions, entropy, *spreads, none]
    return torch.cat([torch.stack(scalars), (columns @ one_hot).flatten()]).double()


def norm_metrics(norms: SampleNorms, teachers: Tensor, num_teachers: int) -> Tensor:
    """The same vector with nothing in it but the rationales' gradient norms, of a micro-batch."""
    one_hot = torch.nn.functional.one_hot(teachers, num_teachers).double()
    flowed = own = norms.norms.double()
    if norms.weights is None:
        own = torch.zeros_like(flowed)
    else:
        flowed = own * norms.weights
    scalars = flowed.new_zeros(len(_SCALARS))
    scalars[_SCALARS.index("squared_norms")] = flowed.square().sum()
    rest = flowed.new_zeros((len(_PER_TEACHER) - len(NORMS)) * num_teachers)
    return torch.cat([scalars, rest, flowed @ one_hot, own @ one_hot])


class MetricsTable:
    """Collects the rows of a run and writes them to a JSON Lines file.

    Args:
        path: the file; rows after the step that a run resumes from are cut off.
        teachers: names, in the order of their indices.
    """

    def __init__(self, path: Path, teachers: Sequence[str]) -> None:
        self.path, self.teachers = path, list(teachers)
        self._write = False
        self._open: Tensor | None = None  # the sums of the optimizer step under way
        self._tokens = 0
        self._questions: list[str] = []
        self._pending: list[tuple[dict[str, Any], Tensor, list[str]]] = []
        self._started = time.perf_counter()
        self._elapsed_before = self._last_seconds = 0.0

    def start(self, step: int, *, write: bool) -> None:
        """Begin after optimizer step `step`; only a rank with `write` touches the file."""
        self._write = write
        self._started = time.perf_counter()
        rows = read_metrics(self.path, until=step)
        self._elapsed_before = self._last_seconds = rows[-1]["seconds"] if rows else 0.0
        if write:
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))

    def add(self, sums: Tensor, batch: Mapping[str, Any]) -> None:
        """Add one micro-batch to the optimizer step under way."""
        self._open = sums if self._open is None else self._open + sums
        self._tokens += batch["input_ids"].numel()
        self._questions.extend(batch.get("question_ids", ()))

    def add_norms(self, sums: Tensor) -> None:
        """What :func:`norm_metrics` gave for the micro-batch added last."""
        assert self._open is not None
        self._open = self._open + sums

    def close_step(self, step: int, epoch: float, learning_rate: float, grad_norm: Tensor | float) -> None:
        """The optimizer has stepped: what was added becomes a row."""
        if self._open is None:
            return
        self._open[_SCALARS.index("grad_norm")] = grad_norm
        seconds = self._elapsed_before + time.perf_counter() - self._started
        host = {
            "step": step,
            "epoch": epoch,
            "learning_rate": learning_rate,
            "seconds": seconds,
            "tokens": self._tokens,
        }
        self._pending.append((host, self._open, self._questions))
        self._open, self._tokens, self._questions = None, 0, []

    def flush(self, accelerator: Any, said: Mapping[str, float] | None = None) -> dict[str, float]:
        """Fetch the rows that are waiting, write them, and give their averages for the log.

        Every rank must call it at the same step. One transfer from the device, one all-reduce.

        Args:
            said: by the strategy since the last time: the last row's, and the log's.

        Raises:
            UserError: the loss or the gradient of a step was not finite; says which, and on what questions.
        """
        said = {name: _number(name, value) for name, value in (said or {}).items()}
        if not self._pending:
            return said
        pending, self._pending = self._pending, []
        tokens = torch.tensor([float(host["tokens"]) for host, _, _ in pending], dtype=torch.float64)
        matrix = torch.stack([sums for _, sums, _ in pending])
        own_loss = matrix[:, 0].isfinite().cpu()
        matrix = torch.cat([matrix, tokens.to(matrix.device)[:, None]], dim=1)
        replicas = accelerator.num_processes
        matrix = accelerator.reduce(matrix, "sum").cpu()
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident_bytes()
        rows: list[dict[str, Any]] = []
        for (host, _, questions), values, own_finite in zip(pending, matrix.tolist(), own_loss.tolist()):
            row = self._row(host, values, replicas, peak)
            row["tokens_per_second"] = values[-1] / max(row["seconds"] - self._last_seconds, 1e-9)
            self._last_seconds = row["seconds"]
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                self._append(rows)
                what = "loss" if not math.isfinite(row["loss"]) else "gradient"
                where = f" on questions {', '.join(questions)}" if not own_finite or what == "gradient" else ""
                way_out = "lower training.learning_rate, train in bfloat16 or float32, or look at those questions"
                if row["step"] == 1:
                    way_out = "no step had been taken: look at the student's weights and dtype, and at those questions"
                if not math.isfinite(row["alpha_entropy"]) and all(map(math.isfinite, row["spread"].values())):
                    way_out = (
                        "what the student says is finite, the teachers' weights are not: look at the strategy (if it "
                        "is mind, its assistant has diverged: lower mind.rate and mind.warmup_rate)"
                    )
                raise UserError(
                    f"the {what} is not finite at step {row['step']}{where} "
                    f"(loss {row['loss']}, gradient norm {row['grad_norm']}, "
                    f"learning rate {row['learning_rate']:.3g}). "
                    f"Training stopped; checkpoints, if any, are from before that step. Way out: {way_out}."
                )
            rows.append(row)
        if finite := {name: value for name, value in said.items() if math.isfinite(value)}:
            rows[-1]["strategy"] = finite
        self._append(rows)
        return said | self._averages(rows)

    def _row(self, host: dict[str, Any], values: list[float], replicas: int, peak: int) -> dict[str, Any]:
        scalar = dict(zip(_SCALARS, values))
        count = max(scalar["questions"], 1.0)
        table = torch.tensor(values[len(_SCALARS) : -1]).view(len(_PER_TEACHER), len(self.teachers)).T.tolist()
        teachers = {}
        for name, sums in zip(self.teachers, table):
            entry = dict(zip(_PER_TEACHER, sums))
            if entry["count"]:
                teachers[name] = {k: v if k == "count" else v / entry["count"] for k, v in entry.items()}
                teachers[name]["influence"] /= replicas
                for key in NORMS:
                    if not scalar["squared_norms"] or not teachers[name][key] and key == "own_norm":
                        del teachers[name][key]
        rationales = int(sum(sums[0] for sums in table))
        noise: dict[str, float] = {}
        if scalar["squared_norms"] and rationales > 1:
            squared = torch.tensor(scalar["squared_norms"] / replicas**2, dtype=torch.float64)
            total = torch.tensor((scalar["grad_norm"] / replicas) ** 2, dtype=torch.float64)
            trace, signal = noise_scale(squared, total, rationales)
            noise = {"noise_trace": float(trace), "noise_signal": float(signal)}
        return {
            **noise,
            "step": host["step"],
            "epoch": host["epoch"],
            # each rank's share of the loss carries the factor that data-parallel averaging takes away again
            **{name: scalar[name] / replicas for name in ("loss", "loss_sft", "loss_mcon", "grad_norm")},
            "learning_rate": host["learning_rate"],
            "alpha_entropy": scalar["alpha_entropy"] / count,
            "questions": int(scalar["questions"]),
            "seconds": host["seconds"],
            "peak_memory_bytes": peak,
            "teachers": teachers,
            "spread": {name: scalar[name] / count for name in METRICS},
        }

    def _append(self, rows: list[dict[str, Any]]) -> None:
        if self._write and rows:
            append_rows(self.path, rows)

    @staticmethod
    def _averages(rows: list[dict[str, Any]]) -> dict[str, float]:
        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        logs = {
            "loss/sft": mean([row["loss_sft"] for row in rows]),
            "loss/mcon": mean([row["loss_mcon"] for row in rows]),
            "alpha_entropy": mean([row["alpha_entropy"] for row in rows]),
            "tokens_per_second": mean([row["tokens_per_second"] for row in rows]),
            "peak_memory_bytes": float(rows[-1]["peak_memory_bytes"]),
        }
        if noisy := [row for row in rows if "noise_trace" in row]:
            signal = mean([row["noise_signal"] for row in noisy])
            if signal > 0:  # rationales at which noise and signal are level; both averaged before they are divided
                logs["gradient_noise_scale"] = mean([row["noise_trace"] for row in noisy]) / signal
        for name in METRICS:
            logs[f"spread/{name}"] = mean([row["spread"][name] for row in rows])
        for teacher in sorted({name for row in rows for name in row["teachers"]}):
            present = [row["teachers"][teacher] for row in rows if teacher in row["teachers"]]
            for name in ("alpha", *METRICS, *NORMS):
                if known := [entry[name] for entry in present if name in entry]:
                    logs[f"{name}/{teacher}"] = mean(known)
        return logs


def read_metrics(path: Path, until: int | None = None) -> list[dict[str, Any]]:
    """The rows of a table; a last line that a kill cut short is left out.

    Args:
        until: the last step whose row is wanted; what stands after it may be damaged.

    Raises:
        UserError: another line is damaged.
    """
    lines = path.read_text().splitlines() if path.exists() and until != 0 else []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if until is not None and rows and rows[-1]["step"] >= until:
            break
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise UserError(f"{path}:{number}: a damaged line; bring the file back, or remove that line") from None
    return [row for row in rows if until is None or row["step"] <= until]


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"the strategy's logs() say {name} = {value!r}; each is one number") from None


def _resident_bytes() -> int:
    """Peak resident memory of this process, in bytes, where there is no GPU to ask."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
