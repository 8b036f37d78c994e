"""python wordings.py STUDY METHOD METHOD …: of `skills_wordings`, over all four students of each seed.

Accuracy, and differences from the first method, in points. `wordings` has its interval for other seeds and other
wordings (32: four of each of eight skills), all else for other seeds and other questions.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from compact.statistics import Estimate, crossed

study, methods = Path(sys.argv[1]), sys.argv[2:]
settings = sorted(path.name for path in (study / "cells").iterdir())
Table = dict[tuple[str, ...], float]  # of one seed: a column's share of right answers, in %


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


skill = {
    (setting, row["id"]): row["skill"]
    for setting in settings
    for row in rows(study / "data" / setting / "wordings.jsonl")
}


def answers(method: str, seed: str, task: str) -> Table:
    """By question; of `wordings` by wording."""
    found = defaultdict(list)
    for setting in settings:
        after = study / "cells" / setting / method / seed / "evaluation" / "after"
        for file in ("wordings", "tasks") if task == "both ood" else (task,):
            for row in rows(after / f"{file}.jsonl"):
                column = (setting, skill[setting, row["id"]]) if task == "wordings" else (file, row["id"])
                found[column].append(row["correct"])
    return {column: 100 * float(np.mean(right)) for column, right in found.items()}


def table(method: str, task: str) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """Its columns, and seeds × columns."""
    seeds = sorted(path.parent.name for path in (study / "cells" / settings[0] / method).glob("seed-*/cell.json"))
    found = [answers(method, seed, task) for seed in seeds]
    columns = sorted(found[0])
    return columns, np.array([[values[column] for column in columns] for values in found])


def said(estimate: Estimate) -> str:
    low, high = estimate.interval() or (float("nan"), float("nan"))
    return f"{estimate.mean:+.1f} [{low:+.1f}, {high:+.1f}]"


first = methods[0]
for method in methods:
    print(method)
    for task in ("held_out", "wordings", "tasks", "both ood"):
        columns, values = table(method, task)
        line = f"  {task:9} {crossed(values).mean:5.1f} ± {crossed(values).se:.1f}"
        if method != first:
            less = values - table(first, task)[1]
            line += f", less {first} {said(crossed(less))}"
            if task == "wordings":
                above, below = (less.mean(0) > 0).sum(), (less.mean(0) < 0).sum()
                line += f", above it in {above} and below it in {below} of {len(columns)}"
        print(line)
