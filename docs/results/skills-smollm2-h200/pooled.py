"""python pooled.py STUDY FRESH: `compact` less each method of both studies, in points, over the seeds of both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from compact.statistics import crossed

TASKS = {"held_out": ["held_out"], "wordings": ["wordings"], "tasks": ["tasks"], "ood": ["wordings", "tasks"]}


def table(cells: list[Path], tasks: list[str]) -> np.ndarray:
    """Whether each answer is right, seeds × questions."""
    seeds = []
    for cell in cells:
        right = {}
        for task in tasks:
            for line in (cell / "evaluation" / "after" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                right[task, row["id"]] = float(row["correct"])
        seeds.append(right)
    if any(right.keys() != seeds[0].keys() for right in seeds):
        sys.exit("the studies asked different questions")
    return np.array([[right[key] for key in sorted(right)] for right in seeds])


studies = [Path(word) / "cells" / "misleading" for word in sys.argv[1:3]]
methods = set.intersection(*({path.name for path in study.iterdir()} for study in studies))


def cells(study: Path, method: str) -> dict[str, Path]:
    return {cell.parent.name: cell.parent for cell in (study / method).glob("seed-*/cell.json")}


for method in sorted(methods - {"compact"}):
    of_both = [(cells(study, "compact"), cells(study, method)) for study in studies]
    pairs = [[(ours[name], theirs[name]) for name in sorted(ours.keys() & theirs.keys())] for ours, theirs in of_both]
    for label, some in ((sys.argv[1], pairs[0]), (sys.argv[2], pairs[1]), ("both", [*pairs[0], *pairs[1]])):
        said = []
        for task, files in TASKS.items():
            ours, theirs = (table([pair[side] for pair in some], files) for side in (0, 1))
            found = crossed(100 * (ours - theirs))
            low, high = found.interval() or (float("nan"), float("nan"))
            said.append(f"{task} {found.mean:+.1f} [{low:+.1f}, {high:+.1f}]")
        print(f"compact - {method}, {len(some)} seeds of {label}: {', '.join(said)}")
