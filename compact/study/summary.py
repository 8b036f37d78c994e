"""What came out of a study: study.json, study.md and pictures, from what its cells' folders hold.

python -m compact.study.summary STUDY        writes study.md and the pictures anew, from study.json alone
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compact.comparison import MEASURES
from compact.errors import UserError
from compact.files import write_atomically
from compact.report import table
from compact.results import TaskResult, finished, load_results
from compact.statistics import Estimate, clustered, crossed
from compact.study.grid import Cell, Grid

Key = tuple[str, str, str]  # task, split, measure
Values = dict[Key, dict[str, float]]  # question → value, of one seed
NAMES = dict(zip(MEASURES, ("accuracy", "answer_logprob", "solution_logprob")))
UNITS = {"accuracy": "%", "answer_logprob": "nats a token", "solution_logprob": "nats a token", "kl": "nats a token"}
BEFORE = "before training"
NAMED = 8  # of the cells that failed alike
NOTES = {
    "answer_logprob": "of the gold answer put right after the prompt, without a rationale: a place in which training "
    "never showed an answer, so it tells how far the student moved rather than what it can"
}


def write_summary(grid: Grid, cells: Sequence[Cell]) -> dict[str, str]:
    """Write study.json, study.md and pictures; give the failed cells with their reasons."""
    study = Path(grid.study)
    failed = {}
    for cell in cells:
        error = study / "cells" / cell.name / "failed.txt"
        if error.exists():
            failed[cell.name] = error.read_text(encoding="utf-8").strip()
    records = [record for setting in grid.settings for record in _setting(study, str(setting), cells, grid.baseline)]
    content = {
        "study": study.name,
        "recipe": Path(grid.recipe).name,
        "seeds": grid.seeds,
        "baseline": grid.baseline,
        "units": UNITS,
        "records": records,
        "weights": _weights(study, cells),
        "seconds": _seconds(study, cells),
        "cells": len(cells),
        "failed": failed,
    }
    write_atomically(study / "study.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_page(study, content)
    return failed


def write_page(study: Path, content: Mapping[str, Any]) -> None:
    """Write study.md and the pictures from the content of study.json."""
    pictures = _pictures(study, content["records"], content["baseline"])
    write_atomically(study / "study.md", _markdown(content, pictures))


def _setting(study: Path, setting: str, cells: Sequence[Cell], baseline: str) -> list[dict[str, Any]]:
    """The records of one setting; those of the student before training come first."""
    ours = [cell for cell in cells if cell.setting == setting]
    seeds = {
        method: _by_seed(study, [cell for cell in ours if cell.method == method], "after")
        for method in dict.fromkeys(cell.method for cell in ours)
    }
    everything = {BEFORE: _before(study, ours, baseline)} | seeds
    records = []
    for method, found in everything.items():
        for key in dict.fromkeys(key for values in found.values() for key in values):
            estimate = _estimate({seed: values[key] for seed, values in found.items() if key in values})
            record: dict[str, Any] = {"setting": setting, "method": method, "task": key[0], "split": key[1]}
            record |= {"measure": key[2], "mean": estimate.mean, "se": estimate.se, "seeds": len(found)}
            record["n"] = len(next(values[key] for values in found.values() if key in values))
            difference = None if method in (BEFORE, baseline) else _difference(found, seeds[baseline], key)
            record[f"diff_vs_{baseline}"] = None if difference is None else difference.mean
            record["diff_ci95"] = None if difference is None else difference.interval()
            records.append(record)
    return records


def _before(study: Path, cells: Sequence[Cell], baseline: str) -> dict[int, Values]:
    """What the untrained student reached, from cells of the baseline or else of whatever method has it; once, where
    all seeds were asked the same."""
    found: dict[int, Values] = {}
    for method in dict.fromkeys([baseline, *(cell.method for cell in cells)]):
        missing = [cell for cell in cells if cell.method == method and cell.seed not in found]
        found |= _by_seed(study, missing, "before")
    found = dict(sorted(found.items()))
    first = next(iter(found), None)
    return {first: found[first]} if first is not None and all(v == found[first] for v in found.values()) else found


def _by_seed(study: Path, cells: Sequence[Cell], when: str) -> dict[int, Values]:
    """What each seed reached; a seed one of whose folds is missing or has failed is left out.

    A question that every fold was asked counts once, with its mean: folds are no questions of their own.
    """
    found: dict[int, Values] = {}
    for seed in dict.fromkeys(cell.seed for cell in cells):
        asked: defaultdict[Key, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for cell in (cell for cell in cells if cell.seed == seed):
            folder = study / "cells" / cell.name
            results, _ = load_results(folder, when)
            over = finished(folder) and not (folder / "failed.txt").exists()
            if not results or (when == "after" and not over):
                break
            for key, item, value in _measured(results, cell.fold):
                asked[key][item].append(value)
            drift = folder / "evaluation" / when / "drift.json"
            for index, value in enumerate(json.loads(drift.read_text())["values"] if drift.exists() else ()):
                asked["held_text", "forgetting", "kl"][str(index)].append(value)
        else:
            found[seed] = {
                key: {item: float(np.mean(values)) for item, values in items.items()} for key, items in asked.items()
            }
    return found


def _measured(results: Mapping[str, TaskResult], fold: int | None) -> Iterator[tuple[Key, str, float]]:
    """What a cell's predictions are worth; those of several tasks out of distribution also count in their pool."""
    pooled = [name for name, result in results.items() if result.split == "ood"]
    pool: list[tuple[Key, str, float]] = []
    for name, result in results.items():
        for title, measure in MEASURES.items():
            for row in result.predictions:
                value = measure(row)
                if value is None:
                    continue
                item = f"{fold}/{row['id']}" if result.split == "id" else row["id"]
                yield (name, result.split, NAMES[title]), item, value
                if name in pooled:
                    pool.append((("all", "ood", NAMES[title]), f"{name}/{row['id']}", value))
        if len(pooled) > 1 and name == pooled[-1]:
            yield from pool


def _estimate(by_seed: Mapping[int, Mapping[str, float]]) -> Estimate:
    """Over seeds and questions, whether all seeds were asked the same ones or not."""
    shared = [item for item in next(iter(by_seed.values())) if all(item in values for values in by_seed.values())]
    if shared and all(len(values) == len(shared) for values in by_seed.values()):
        return crossed(np.array([[values[item] for item in shared] for values in by_seed.values()]))
    flat = [(value, seed, item) for seed, values in by_seed.items() for item, value in values.items()]
    values, seeds, items = (np.array(column) for column in zip(*flat))
    return clustered(values, seeds, items)


def _difference(ours: Mapping[int, Values], theirs: Mapping[int, Values], key: Key) -> Estimate | None:
    """Paired: the same questions under the same seeds."""
    paired = {}
    for seed in ours.keys() & theirs.keys():
        one, other = ours[seed].get(key, {}), theirs[seed].get(key, {})
        if items := [item for item in one if item in other]:
            paired[seed] = {item: one[item] - other[item] for item in items}
    return _estimate(dict(sorted(paired.items()))) if paired else None


def _weights(study: Path, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Mean α of each teacher in the last quarter of training, over seeds, and its entropy."""
    reports: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        folder = study / "cells" / cell.name
        file = folder / "report.json"
        if finished(folder) and not (folder / "failed.txt").exists():
            reports.setdefault((cell.setting, cell.method), []).append(json.loads(file.read_text()))
    out = []
    for (setting, method), found in reports.items():
        known = [report for report in found if report["alpha_entropy"] is not None]
        if known:
            means = [report["alpha_mean"] for report in known]
            teachers = dict.fromkeys(name for mean in means for name, value in mean.items() if value is not None)
            by_seed = {name: [mean.get(name) for mean in means] for name in teachers}
            alpha = {name: float(np.mean([a for a in of if a is not None])) for name, of in by_seed.items()}
            entropy = float(np.mean([report["alpha_entropy"] for report in known]))
            out.append({"setting": setting, "method": method, "alpha": alpha, "entropy": entropy})
    return out


def _listed(names: list[str]) -> str:
    """The first of them where they are many: each one's folder says the same."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _seconds(study: Path, cells: Sequence[Cell]) -> dict[str, Any] | None:
    """What finished cells took on the clock, and what the others would take one after another.

    A cell is taken for as long as others of its method; of a method without any, `unpriced`, as all.
    """
    of_method: defaultdict[str, list[float]] = defaultdict(list)
    missing: list[str] = []
    for cell in cells:
        folder = study / "cells" / cell.name
        if (folder / "cell.json").exists():
            of_method[cell.method].append(seconds_of(folder))
        else:
            missing.append(cell.method)
    seconds = [value for values in of_method.values() for value in values]
    if not seconds:
        return None
    to_come = sum(float(np.median(of_method[method] or seconds)) for method in missing)
    unpriced = sorted({method for method in missing if not of_method[method]})
    known = {"median": float(np.median(seconds)), "sum": float(np.sum(seconds))}
    return {**known, "missing": len(missing), "to_come": to_come, "unpriced": unpriced}


def seconds_of(folder: Path) -> float:
    """What a finished cell took on the clock."""
    return json.loads((folder / "cell.json").read_text())["seconds"]


def _markdown(content: Mapping[str, Any], pictures: Sequence[str]) -> str:
    records, baseline = content["records"], content["baseline"]
    few = " Two seeds say little of others: such an interval can be too short." if len(content["seeds"]) == 2 else ""
    parts = [
        f"# {content['study']}",
        f"{content['cells']} cells, recipe `{content['recipe']}`, seeds {content['seeds']}. "
        f"Mean ± one standard error; in brackets the paired difference from `{baseline}`, over the seeds that both "
        "have, with its 95% interval, which allows for other seeds and other questions (two-way random effects; of "
        f"one seed for other questions alone). Bold: the interval is clear of zero.{few}",
    ]
    if content["failed"]:
        alike: defaultdict[str, list[str]] = defaultdict(list)
        for name, why in content["failed"].items():
            alike[why].append(f"`{name}`")
        reasons = "\n".join(f"- {_listed(of)}: {why}" for why, of in alike.items())
        parts.append(f"**{len(content['failed'])} cells failed** and are in no number below:\n\n{reasons}")
    for setting in dict.fromkeys(record["setting"] for record in records):
        parts.append(f"## {setting}")
        ours = [record for record in records if record["setting"] == setting]
        for measure in dict.fromkeys(record["measure"] for record in ours):
            note = f" ({NOTES[measure]})" if measure in NOTES else ""
            parts += [f"**{measure}**, {UNITS[measure]}{note}", _table(ours, measure, content["baseline"])]
        parts += _best_teacher(ours)
        weights = [entry for entry in content["weights"] if entry["setting"] == setting]
        if weights:
            names = list(dict.fromkeys(name for entry in weights for name in entry["alpha"]))
            cells = [
                [entry["method"], *(f"{entry['alpha'].get(name, 0):.3f}" for name in names), f"{entry['entropy']:.2f}"]
                for entry in weights
            ]
            parts += ["**Mean α in the last quarter of training**", table(["method", *names, "entropy"], cells)]
    parts += [f"![{Path(path).stem}]({path})" for path in pictures]
    if seconds := content["seconds"]:
        text = f"A cell took {seconds['median']:.0f} s (median), the finished ones {seconds['sum'] / 60:.0f} min."
        if seconds["missing"]:
            minutes = seconds["to_come"] / 60
            text += f" {seconds['missing']} missing: at the price of others {minutes:.0f} min, one after another"
            unpriced = seconds.get("unpriced")
            text += f", though none of {_listed(unpriced)} was seen." if unpriced else "."
        parts.append(text)
    return "\n\n".join(parts) + "\n"


def _best_teacher(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which single teachers are the baselines "best" and "worst": known afterwards."""
    accuracy = {
        record["method"]: record["mean"]
        for record in records
        if record["method"].startswith("single:") and record["measure"] == "accuracy" and record["split"] == "id"
    }
    if len(set(accuracy.values())) < 2:
        return []
    best, worst = (choose(accuracy, key=accuracy.__getitem__) for choose in (max, min))
    return [f"Of the single teachers `{best}` is best in distribution, `{worst}` worst."]


def _table(records: Sequence[dict[str, Any]], measure: str, baseline: str) -> str:
    found = [record for record in records if record["measure"] == measure]
    tasks = list(dict.fromkeys((record["task"], record["split"]) for record in found))
    sizes = {(record["task"], record["split"]): record["n"] for record in found}
    names = [f"{task} ({split}, n = {sizes[task, split]})" for task, split in tasks]
    rows = []
    for method in dict.fromkeys(record["method"] for record in found):
        by_task = {(record["task"], record["split"]): record for record in found if record["method"] == method}
        seeds = max(record["seeds"] for record in by_task.values())
        rows.append([method, seeds, *(_cell(by_task.get(task), measure, baseline) for task in tasks)])
    return table(["method", "seeds", *names], rows)


def _cell(record: Mapping[str, Any] | None, measure: str, baseline: str) -> str:
    if record is None:
        return "–"
    digits = 1 if measure == "accuracy" else 3
    low, high = record["diff_ci95"] or (0.0, 0.0)
    while digits < 7 and low * high > 0 and not round(min(abs(low), abs(high)), digits):
        digits += 1  # an interval that is clear of zero shows it
    text = f"{record['mean']:.{digits}f}" + ("" if record["se"] is None else f" ± {record['se']:.{digits}f}")
    difference = record[f"diff_vs_{baseline}"]
    if difference is not None:
        shown = f"{difference:+.{digits}f}"
        if record["diff_ci95"] is not None:
            shown += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
            shown = f"**{shown}**" if low > 0 or high < 0 else shown
        text += f" ({shown})"
    return text.replace("-", "−")


def _pictures(study: Path, records: Sequence[dict[str, Any]], baseline: str) -> list[str]:
    """A picture a setting: every method's difference from the baseline, with its interval, a panel a task."""
    try:
        from compact import pictures
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return []
    paths = []
    with pictures.style():
        for setting in dict.fromkeys(record["setting"] for record in records):
            shown = [
                record
                for record in records
                if record["setting"] == setting
                and record["measure"] == "accuracy"
                and record[f"diff_vs_{baseline}"] is not None
            ]
            if shown:
                png = io.BytesIO()
                pictures.differences(shown, baseline).savefig(png, format="png")
                path = f"pictures/{setting}.png"
                write_atomically(study / path, png.getvalue())
                paths.append(path)
    return paths


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compact.study.summary")
    parser.add_argument("study", type=Path, help="a folder with study.json")
    study = parser.parse_args(arguments).study
    try:
        file = study / "study.json"
        if not file.is_file():
            raise UserError(f"there is no {file}; python -m compact.study writes it")
        write_page(study, json.loads(file.read_text(encoding="utf-8")))
    except UserError as error:
        print(f"compact.study: {error}", file=sys.stderr)
        return 2
    print(study / "study.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
