"""A run's report: report.md, report.json and pictures, from what its folder holds.

python -m compact.analyze RUN                       looks into the student once, writes the report anew
python -m compact.analyze RUN --against RUN …       prints runs side by side, with paired differences from the first
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from compact.comparison import comparison
from compact.errors import UserError
from compact.files import write_atomically
from compact.metrics import EQUAL, INFORMATION, METRICS, NORMS, read_metrics
from compact.report import markdown
from compact.results import TaskResult, check_run, compare, finished, load_results, versions
from compact.statistics import mean


@dataclass
class Run:
    """What a run's folder holds; a piece that is not there is empty."""

    folder: Path
    recipe: dict[str, Any]
    recipe_text: str
    metrics: list[dict[str, Any]]  # one row an optimizer step
    before: dict[str, TaskResult]
    after: dict[str, TaskResult]
    data: dict[str, Any]  # compact.data_report.DataReport
    timing: dict[str, Any]  # {"seconds": {phase: seconds}, "versions"?: {…}}
    traces: dict[str, dict[str, Any]]  # "before", "after": compact.trace.trace_question

    @property
    def teachers(self) -> list[str]:
        """In the data's order, or else by first appearance in the metrics."""
        seen = dict.fromkeys(name for row in self.metrics for name in row["teachers"])
        return self.data.get("teachers") or list(seen)


def read_run(folder: str | Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: it is not a run's folder.
    """
    folder = Path(folder)
    check_run(folder)
    traces = {when: _json(folder / "analysis" / f"{when}.json") for when in ("before", "after")}
    recipe_text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    return Run(
        folder=folder,
        recipe=yaml.safe_load(recipe_text) or {},
        recipe_text=recipe_text,
        metrics=read_metrics(folder / "metrics.jsonl"),
        before=load_results(folder, "before")[0],
        after=load_results(folder, "after")[0],
        data=_json(folder / "data_report.json"),
        timing=_json(folder / "timing.json"),
        traces={when: trace for when, trace in traces.items() if trace},
    )


def write_report(run_dir: str | Path, *, over: bool = False) -> dict[str, Any]:
    """Write pictures/*.png, report.md and report.json into a run's folder; give the content of report.json.

    What was not measured is null in report.json and "not measured" in report.md. Without matplotlib there are no
    pictures, and the report says so.

    Args:
        over: the run has come to its end, which report.json then says; else it is as finished as it was.

    Raises:
        UserError: it is not a run's folder, or it cannot be written.
    """
    run = read_run(run_dir)
    content = summarize(run)
    content["finished"] |= over
    pictures = _draw(run, content)
    write_atomically(run.folder / "report.md", markdown(content, run.recipe_text, pictures))
    write_atomically(run.folder / "report.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")  # the last
    return content


def summarize(run: Run) -> dict[str, Any]:
    """The numbers of a report."""
    rows = run.metrics
    phases = run.timing.get("seconds")
    tenth = max(1, len(rows) // 10)
    report = {
        "run": str(run.folder.name),
        "finished": finished(run.folder) or (run.folder / "cell.json").exists(),  # of a cell whose report was lost
        "strategy": run.recipe.get("strategy", "compact"),
        "student": run.recipe.get("student", {}).get("model"),
        "note": run.recipe.get("evaluation", {}).get("note"),
        "accuracy": {name: _accuracy(run, name) for name in {**run.before, **run.after}},
        "alpha_mean": {name: _tail_mean(rows, name, "alpha") for name in run.teachers},
        "equal": {name: _tail_mean(rows, name, EQUAL) for name in run.teachers},
        "teachers": {name: {m: _tail_mean(rows, name, m) for m in _measured(rows)} for name in run.teachers},
        "drift": _json(run.folder / "evaluation" / "after" / "drift.json") or None,
        "steps_with_norms": len(_with_norm(rows, NORMS[0])),
        "spread": {m: mean([row["spread"][m] for row in _tail(rows)]) for m in METRICS},
        "alpha_entropy": mean([row["alpha_entropy"] for row in _tail(rows)]),
        "effective_teachers": {"first_tenth": _effective(rows[:tenth]), "last_tenth": _effective(rows[-tenth:])},
        "strategy_logs": {name: value for row in rows for name, value in row.get("strategy", {}).items()},  # the last
        "states": _json(run.folder / "analysis" / "states.json") or None,
        "information": _information(run.folder),
        "influence": _json(run.folder / "analysis" / "influence.json") or None,
        "loss": {"first_tenth": _loss(rows[:tenth]), "last_tenth": _loss(rows[-tenth:])},
        "questions": run.data.get("questions") or dict.fromkeys(("used", "refused")),
        "rationales": run.data.get("rationales") or dict.fromkeys(("used", "cut", "refused", "wrong")),
        "refusals": run.data.get("reason_counts"),
        "refusal_examples": run.data.get("reasons"),
        "trained_on": run.data.get("trained_on"),
        "steps": rows[-1]["step"] if rows else None,
        "epochs": rows[-1]["epoch"] if rows else None,
        "seconds": sum(phases.values()) if phases else (rows[-1]["seconds"] if rows else None),
        "seconds_by_phase": phases,
        "tokens_per_second": _median([row["tokens_per_second"] for row in rows]),
        "peak_memory_bytes": max((row["peak_memory_bytes"] for row in rows), default=None),
        "versions": run.timing.get("versions") or versions(),
    }
    return _finite(report)


def _accuracy(run: Run, name: str) -> dict[str, Any]:
    """Before and after (flexible), both summaries whole, and the changes item by item."""
    before, after = run.before.get(name), run.after.get(name)
    known = after or before
    assert known is not None
    out: dict[str, Any] = {
        "before": before.accuracy if before else None,
        "after": after.accuracy if after else None,
        "split": known.split,
        "kind": known.kind,
        "n": len(known.predictions),
        "summary": {"before": before.summary() if before else None, "after": after.summary() if after else None},
    }
    if before and after:
        with suppress(ValueError):  # other questions, or some alone
            out["changes"] = compare(before, after)
    return out


def _draw(run: Run, content: Mapping[str, Any]) -> dict[str, str]:
    """Draw what there is to draw: title → path below the run's folder; {"": why} where nothing can be drawn."""
    try:
        from compact import pictures
        from compact.pictures import influence, question, states
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return {"": "No pictures: matplotlib is not installed (`pip install matplotlib`, or the extra `plot`)."}
    figures = {}
    with pictures.style():
        tasks = {
            name: {**task["summary"], **{k: task[k] for k in ("split", "n")}, **task.get("changes", {})}
            for name, task in content["accuracy"].items()
        }
        if tasks:
            figures["accuracy"] = pictures.accuracies(tasks)
        if run.metrics:
            figures["weights"] = pictures.weights(run.metrics, content["alpha_mean"])
            figures["loss"] = pictures.losses(run.metrics)
            figures["statistics"] = pictures.statistics(run.metrics, run.teachers)
        if run.traces:
            epsilon = run.recipe.get("adaptability", {}).get("epsilon", 0.1)
            figures["trajectory"] = question.trajectory(run.traces, run.teachers, epsilon)
            figures["consensus"] = question.consensus_graph(run.traces, run.teachers)
        inside = run.folder / "analysis" / "states.npz"
        if inside.exists():
            with np.load(inside, allow_pickle=False) as arrays:
                figures |= states.figures(dict(arrays), run.teachers)
        if "influence" in _measured(run.metrics):
            figures["influence"] = influence.influence(run.metrics, run.teachers)
        if rows := read_metrics(run.folder / "information.jsonl"):
            figures["information"] = influence.information(rows, run.teachers)
        norms = run.folder / "analysis" / "influence.npz"
        if norms.exists():
            with np.load(norms, allow_pickle=False) as arrays:
                figures["norms"] = influence.norms(dict(arrays), run.teachers)
        for name, figure in figures.items():
            png = io.BytesIO()
            figure.savefig(png, format="png")
            write_atomically(run.folder / "pictures" / f"{name}.png", png.getvalue())
    return {name: f"pictures/{name}.png" for name in figures}


def _tail(rows: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The last quarter of the steps."""
    return rows[-max(1, len(rows) // 4) :]


def _measured(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The metrics that the table has, with the gradient norms where they were measured."""
    return [*METRICS, *(key for key in NORMS if _with_norm(rows, key))]


def _with_norm(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The steps that measured it: norms need not be measured at every one."""
    return [row for row in rows if any(key in entry for entry in row["teachers"].values())]


def _tail_mean(rows: Sequence[dict[str, Any]], teacher: str, key: str) -> float | None:
    """Mean over the teacher's rationales in the last quarter of the steps, of norms in that of those with norms."""
    tail = _tail(_with_norm(rows, key) if key in NORMS else rows)
    entries = [row["teachers"][teacher] for row in tail if key in row["teachers"].get(teacher, ())]
    count = sum(entry["count"] for entry in entries)
    return sum(entry[key] * entry["count"] for entry in entries) / count if count else None


def _loss(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    return {key: mean([row[key] for row in rows]) for key in ("loss", "loss_sft", "loss_mcon")}


def _information(folder: Path) -> dict[str, Any] | None:
    """Means over the last quarter of the measurements, and what they cost."""
    rows = read_metrics(folder / "information.jsonl")
    if not rows:
        return None
    last = _tail(rows)
    names = dict.fromkeys(name for row in last for name in row["teachers"])
    present = {name: [row["teachers"][name] for row in last if name in row["teachers"]] for name in names}
    return {
        "measurements": len(rows),
        "seconds": sum(row["seconds"] for row in rows),
        "hsic": mean([row["hsic"] for row in last if row["hsic"] is not None]),
        "teachers": {
            name: {key: mean([entry[key] for entry in entries if entry[key] is not None]) for key in INFORMATION}
            for name, entries in present.items()
        },
    }


def _effective(rows: Sequence[dict[str, Any]]) -> float | None:
    """exp of the mean entropy of α: how many teachers of equal weight it is worth. Near 1, the weights collapsed."""
    entropy = mean([row["alpha_entropy"] for row in rows])
    return None if entropy is None else math.exp(entropy)


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _finite(value: Any) -> Any:
    """JSON knows no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _look_inside(folder: Path) -> None:
    """The analysis that needs both students; where one is missing, the report goes without."""
    from compact.states import read_states  # it needs the trainer's parts, and a report does not

    try:
        read_states(folder)
    except UserError as error:
        print(f"compact.analyze: the student's inside is left out: {error}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compact.analyze", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--report_only", action="store_true", help="do not look into the student, where that is due")
    parser.add_argument("--against", type=Path, nargs="+", help="other runs, to be compared with it")
    options = parser.parse_args(arguments)
    try:
        if options.against:
            print(comparison([options.run, *options.against]))
            return 0
        run = read_run(options.run)
        if not options.report_only and run.after and not (options.run / "analysis" / "states.json").exists():
            _look_inside(options.run)
        write_report(options.run)
    except UserError as error:
        print(f"compact.analyze: {error}", file=sys.stderr)
        return 2
    print(options.run / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
