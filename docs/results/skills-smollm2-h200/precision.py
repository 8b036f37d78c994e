"""python precision.py STUDY OTHER: accuracy in STUDY less that in OTHER over cells of both, mean ± standard error."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

TASKS = "held_out", "wordings", "tasks"


def accuracy(cell: Path, task: str) -> float:
    lines = (cell / "evaluation" / "after" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return 100 * mean(json.loads(line)["correct"] for line in lines)


study, other = (Path(word) / "cells" for word in sys.argv[1:3])
pairs = defaultdict(list)
alike = 0
for cell in sorted(path.parent for path in study.glob("*/*/*/cell.json")):
    there = other / cell.relative_to(study)
    if (there / "cell.json").exists():
        differences = [accuracy(cell, task) - accuracy(there, task) for task in TASKS]
        pairs[cell.parent.relative_to(study).as_posix()].append(differences)
        pairs["all"].append(differences)
        alike += all(
            (cell / "evaluation" / "after" / f"{task}.jsonl").read_bytes()
            == (there / "evaluation" / "after" / f"{task}.jsonl").read_bytes()
            for task in TASKS
        )
for name, rows in sorted(pairs.items()):
    columns = list(zip(*rows))
    said = [
        f"{task} {mean(c):+.1f} ± {stdev(c) / len(c) ** 0.5 if len(c) > 1 else 0:.1f}"
        for task, c in zip(TASKS, columns)
    ]
    print(f"{name}, {len(rows)} cells: {', '.join(said)}")
print(f"{alike} of them with the same answers to the letter")
