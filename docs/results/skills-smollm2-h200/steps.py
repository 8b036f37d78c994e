"""python steps.py STUDY/cells/SETTING BASELINE METHOD …: where answers leave the derivation that is due.

A question's derivation is drawn again by the study's generator, and every written step is held against the step that
is due: its operation and both numbers, where a result of an earlier step stands for what the student wrote there. Of
each method it says, in % of the answers, how often all steps are set up so, and how often they are but the answer
stops before the last; and the paired differences from the baseline. `order`, whose steps calculate nothing, is in no
total; of it there are the right answers alone.
"""

from __future__ import annotations

import json
import math
import random
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from compact.skills.questions import HELD_OUT_WORDING, TAUGHT, UNTAUGHT, Question, draw_questions, trained_wordings
from compact.statistics import crossed

STEP = re.compile(r"(\w+) ([-+*]) (\d+) = (\w+)")  # also "Monday + 3 = Thursday"
KINDS = "right", "set up", "stops early"
DRAWN = {
    "held_out": ("test", TAUGHT, trained_wordings()),
    "wordings": ("test wordings", TAUGHT, (HELD_OUT_WORDING,)),
    "tasks": ("test tasks", UNTAUGHT, (0,)),
}


def due(question: Question) -> list[tuple[str, str, str]]:
    """(left, sign, right) of each step; "r0" stands for the result of the first step, "*" for any number."""
    lines = question.derive(lambda value: value)
    steps = [match.groups()[:3] for line in lines if (match := STEP.fullmatch(line.equation))]
    if question.skill == "weekday":
        return [("*", "*", "7"), (steps[1][0], "-", "r0"), (steps[2][0], "+", "r1")]
    if question.skill == "shop":
        return [steps[0], steps[1], ("r0", "+", "r1")]
    if question.skill == "sequence":
        return [steps[0], *((steps[1][0] if i == 1 else f"r{i - 1}", "+", "r0") for i in range(1, len(steps)))]
    if question.skill == "budget":
        return [steps[0], (steps[1][0], "-", "r0")]
    return [steps[0], *((f"r{i - 1}", sign, right) for i, (_, sign, right) in enumerate(steps[1:], 1))]


def fits(step: tuple[str, ...], wanted: tuple[str, str, str], results: list[str]) -> bool:
    left, sign, right, _ = step
    a, b = (results[int(w[1:])] if w.startswith("r") else w for w in (wanted[0], wanted[2]))
    there, back = a in ("*", left) and b == right, a in ("*", right) and b == left
    return sign == wanted[1] and (there or (back and sign in "+*"))


def judged(question: Question, row: dict) -> dict[str, bool]:
    if question.skill == "order":
        return {"right": row["correct"]}
    steps, wanted = STEP.findall(row["text"]), due(question)
    results = [step[3] for step in steps]
    right = all(fits(step, want, results) for step, want in zip(steps, wanted))
    return {
        "right": row["correct"],
        "set up": right and len(steps) == len(wanted),
        "stops early": right and 0 < len(steps) < len(wanted),
    }


def main(cells: Path, methods: list[str]) -> None:
    common = set.intersection(
        *({path.parent.name for path in (cells / method).glob("seed-*/cell.json")} for method in methods)
    )
    for task, (state, skills, wordings) in DRAWN.items():
        drawn = draw_questions(random.Random(state), 500, part="test", skills=skills, wordings=wordings)
        asked = {f"{task}-{number}": question for number, question in enumerate(drawn, 1)}
        found = {method: answers(cells / method, task, asked, common) for method in methods}
        show(task, found, lambda skill: skill != "order")
        for name in sorted({q.skill for q in drawn}):
            kinds = KINDS[:1] if name == "order" else KINDS
            show(f"{task}, {name}", found, lambda skill, name=name: skill == name, kinds)


def answers(
    method: Path, task: str, asked: dict[str, Question], seeds: Collection[str]
) -> list[list[tuple[str, dict[str, bool]]]]:
    """By seed: the skill of each question and what became of it."""
    runs = []
    for folder in (method / seed / "evaluation" / "after" for seed in sorted(seeds)):
        rows = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert all(asked[row["id"]].prompt == row["prompt"] for row in rows), "questions of another generator"
        told = [(asked[row["id"]], row) for row in rows]
        runs.append([(question.skill, judged(question, row)) for question, row in told])
    return runs


def show(title: str, found: dict[str, list], kept: Callable[[str], bool], kinds: tuple[str, ...] = KINDS) -> None:
    baseline = next(iter(found))
    print(f"\n{title}")
    for what in kinds:
        tables = {
            method: np.array([[100.0 * is_so[what] for skill, is_so in run if kept(skill)] for run in runs])
            for method, runs in found.items()
        }
        for method, table in tables.items():
            line = f"  {what:12} {method:18} {table.mean():5.1f}"
            if method != baseline:
                estimate = crossed(table - tables[baseline])
                low, high = estimate.interval() or (math.nan, math.nan)  # of what does not vary there is none
                line += f"  {estimate.mean:+.1f} [{low:+.1f}, {high:+.1f}]"
            print(line)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
