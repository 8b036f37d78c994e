"""python gym.py STUDY/cells/misleading METHOD …: answers to reasoning-gym's questions, by what is asked and written.

"one step": a question of two numbers and one sign; the taught skills have two steps or more. Differences are from the
first method, with their 95% interval.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from compact.statistics import crossed

EQUATION = re.compile(r"[-+*/] ?\d+ = ")
TERMS = re.compile(r"-?\d+")


def asked(row: dict) -> str:
    if row["id"].split("-")[1] in ("chain_sum", "basic_arithmetic"):
        return "one step" if len(TERMS.findall(row["prompt"].replace(" - ", " "))) == 2 else "two steps"
    return row["id"].split("-")[1]


def rows(folder: Path) -> list[list[dict]]:
    """Of each seed, in the order of the questions."""
    files = sorted(folder.glob("seed-*/evaluation/after/gym.jsonl"))
    return [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]


def tell(title: str, found: dict[str, list[list[dict]]], value: Callable[[dict], float], kept: Callable) -> None:
    tables = {
        method: np.array([[100.0 * value(row) for row in run if kept(row)] for run in runs])
        for method, runs in found.items()
    }
    print(f"\n{title}, {next(iter(tables.values())).shape[1]} questions")
    first = next(iter(tables.values()))
    for method, table in tables.items():
        line = f"  {method:16} {table.mean():5.1f}"
        if table is not first:
            estimate = crossed(table - first)
            low, high = estimate.interval() or (float("nan"), float("nan"))
            line += f"  {estimate.mean:+.1f} [{low:+.1f}, {high:+.1f}]"
        print(line)


cells = Path(sys.argv[1])
found = {method: rows(cells / method) for method in sys.argv[2:]}
before = cells.parent.parent / "base" / cells.name / "evaluation" / "before" / "gym.jsonl"
untrained = [json.loads(line) for line in before.read_text(encoding="utf-8").splitlines()]
tell("right, all", found, lambda row: row["correct"], lambda row: True)
for kind in dict.fromkeys(map(asked, untrained)):
    tell(f"right, {kind}", found, lambda row: row["correct"], lambda row, kind=kind: asked(row) == kind)
    right = [row["correct"] for row in untrained if asked(row) == kind]
    print(f"  before training  {100 * sum(right) / len(right):5.1f}")
tell("one equation written", found, lambda row: len(EQUATION.findall(row["text"])) == 1, lambda row: True)
for method, runs in found.items():
    every = [row for run in runs for row in run]
    some = {
        count: [row["correct"] for row in every if min(len(EQUATION.findall(row["text"])), 2) == count]
        for count in range(3)
    }
    said = ", ".join(
        f"{('none', 'one', 'more')[n]} {len(x) / len(every):.1%} ({np.mean(x):.1%} right)" for n, x in some.items()
    )
    print(f"{method}: equations written: {said}")
