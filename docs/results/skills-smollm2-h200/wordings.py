"""python wordings.py STUDY METHOD METHOD … [-SETTING …]: of `skills_wordings`, over all four students of each seed.

Accuracy, and differences from the first method, in points. The mean of `wordings` is over 32 of them, four of each of
eight skills, with an interval for other seeds and other wordings: the wider of two, of which one takes each wording
for itself and the other the eight that one student was asked together. All else is the mean over questions, for other
seeds and other questions. -wording_3 leaves a setting's cells out.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np

from compact.statistics import Estimate, crossed

study, methods = Path(sys.argv[1]), [word for word in sys.argv[2:] if not word.startswith("-")]
settings = sorted(path.name for path in (study / "cells").iterdir() if f"-{path.name}" not in sys.argv)
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


@cache
def table(method: str, task: str) -> np.ndarray:
    """Seeds × columns."""
    seeds = sorted(path.parent.name for path in (study / "cells" / settings[0] / method).glob("seed-*/cell.json"))
    found = [answers(method, seed, task) for seed in seeds]
    return np.array([[values[column] for column in sorted(found[0])] for values in found])


def width(estimate: Estimate) -> float:
    low, high = estimate.interval() or (0.0, 0.0)
    return high - low


def said(values: np.ndarray, task: str) -> str:
    """The mean of a difference with its interval, and for wordings how many are above and below 0."""
    estimates, counts = [crossed(values)], ""
    if task == "wordings":  # the columns of a setting are neighbours
        estimates.append(crossed(values.reshape(len(values), len(settings), -1).mean(2)))
        signs = np.sign(values.mean(0).round(9))
        counts = f", above it in {(signs > 0).sum()} and below it in {(signs < 0).sum()} of {len(signs)}"
    low, high = max(estimates, key=width).interval() or (float("nan"), float("nan"))
    return f"{estimates[0].mean:+.1f} [{low:+.1f}, {high:+.1f}]{counts}"


first = methods[0]
for method in methods:
    print(method)
    for task in ("held_out", "wordings", "tasks", "both ood"):
        values = table(method, task)
        line = f"  {task:9} {crossed(values).mean:5.1f} ± {crossed(values).se:.1f}"
        print(line if method == first else f"{line}, less {first} {said(values - table(first, task), task)}")
