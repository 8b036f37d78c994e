"""python gym.py STUDY/cells/misleading METHOD …: answers to reasoning-gym's questions, by what is asked and written.

Differences are from the first method and from the untrained student, with their 95% intervals.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from compact.statistics import crossed

EQUATION = re.compile(r"[-+*/] ?-?\d+ = ")
Rows = list[list[dict]]  # of each seed, in the order of the questions


def kind(row: dict) -> str:
    """one step: a sum, product or quotient of two numbers; two steps: a sum of three; else the generator's name."""
    name = row["id"].split("-")[1]
    if name not in ("chain_sum", "basic_arithmetic"):
        return name
    return "one step" if len(re.findall(r"\d+", row["prompt"])) == 2 else "two steps"


def read(folder: Path) -> Rows:
    files = sorted(folder.glob("seed-*/evaluation/after/gym.jsonl"))
    return [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]


def difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    estimate = crossed(ours - theirs)
    low, high = estimate.interval() or (float("nan"), float("nan"))
    return f"{estimate.mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def tell(title: str, found: dict[str, Rows], untrained: list[dict], kept: Callable[[dict], bool]) -> None:
    before = np.array([100.0 * row["correct"] for row in untrained if kept(row)])
    print(f"\n{title}, {len(before)} questions; before training {before.mean():.1f}")
    right = {
        method: np.array([[100.0 * row["correct"] for row in run if kept(row)] for run in runs])
        for method, runs in found.items()
    }
    first = next(iter(right.values()))
    for method, table in right.items():
        less = f", less the first {difference(table, first)}" if table is not first else ""
        print(f"  {method:14} {table.mean():5.1f}{less}, less the untrained {difference(table, before)}")
        rows = [row for run in found[method] for row in run if kept(row)]
        for what, holds in KINDS_OF_ANSWERS.items():
            some = [row["correct"] for row in rows if holds(row)]
            shown = (
                f" ({100 * np.mean(some):.1f}% right, {sum(some)} of {sum(r['correct'] for r in rows)})"
                if some
                else ""
            )
            print(f"      {what} {100 * len(some) / len(rows):.1f}%{shown}")


KINDS_OF_ANSWERS: dict[str, Callable[[dict], bool]] = {
    "no derivation": lambda row: row["text"].startswith("The answer is"),
    "one equation": lambda row: len(EQUATION.findall(row["text"])) == 1,
    "more equations": lambda row: len(EQUATION.findall(row["text"])) > 1,
}

cells = Path(sys.argv[1])
found = {method: read(cells / method) for method in sys.argv[2:]}
file = cells.parent.parent / "base" / cells.name / "evaluation" / "before" / "gym.jsonl"
untrained = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
tell("all", found, untrained, lambda row: True)
for name in dict.fromkeys(map(kind, untrained)):
    tell(name, found, untrained, lambda row, name=name: kind(row) == name)
