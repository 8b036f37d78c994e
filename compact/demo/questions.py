"""Word problems of the embedded default, with answers that can be checked.

A word problem is a small number with a few changes to it, told in one of three ways. Its *content* is the
arithmetic alone: names, things and wording do not enter it. Training and held-out questions have no content in
common: :func:`held_out` decides by a hash of the content, whatever the seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

LARGEST = 20  # no number of a problem, of its steps or of its answer exceeds this
FAMILIES = ("change", "people", "boxes")
NUM_STEPS = (1, 2, 2, 3, 3)  # of the questions to distill, drawn from evenly
NAMES = "Ann Ben Cid Dot Eva Fay Gus Ida".split()
THINGS = "apples pens books coins cards shells".split()
BOXES = "bags boxes trays".split()
GAINS = "buys finds gets wins".split()
LOSSES = "loses sells eats drops".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday".split()


@dataclass(frozen=True)
class Step:
    """One calculation."""

    left: int
    sign: str  # "+", "-" or "*"
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.result}"


def calculate(left: int, sign: str, right: int) -> int:
    """The result of one calculation."""
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


@dataclass(frozen=True)
class Problem:
    """A word problem: `start` (in each of `boxes` boxes), and changes to it."""

    family: str  # "change": one person over time; "people": a chain of comparisons; "boxes": a product first
    start: int
    boxes: int  # 1 unless the family is "boxes"
    changes: tuple[int, ...]  # signed, none 0
    people: tuple[str, ...]  # for "people" one more than changes, else one
    thing: str
    verbs: tuple[str, ...]  # one a change; none for "people"
    days: tuple[str, ...]  # one a change; none for "people"
    box: str  # what boxes are called; "" unless the family is "boxes"

    @property
    def content(self) -> str:
        """The arithmetic alone, such as ``"3*4 +2 -5"``: the same for every wording of the same calculation."""
        return " ".join([f"{self.boxes}*{self.start}", *(f"{change:+d}" for change in self.changes)])

    @property
    def first(self) -> int:
        """What is there before the changes."""
        return self.boxes * self.start

    @property
    def answer(self) -> int:
        return self.first + sum(self.changes)

    @property
    def steps(self) -> list[Step]:
        """The calculation in the order of the text."""
        steps = [Step(self.boxes, "*", self.start, self.first)] if self.boxes > 1 else []
        total = self.first
        for change in self.changes:
            steps.append(Step(total, "+" if change > 0 else "-", abs(change), total + change))
            total += change
        return steps

    @property
    def told(self) -> list[str]:
        """The sentences of the question: what is there at first, then one a change."""
        who, start = self.people[0], f"{self.start} {self.thing}"
        if self.family == "boxes":
            start = f"{self.boxes} {self.box} with {start} each"
        if self.family == "people":
            rest = [
                f"{one} has {abs(change)} {'more' if change > 0 else 'fewer'} than {other}."
                for one, other, change in zip(self.people[1:], self.people, self.changes)
            ]
        else:
            rest = [
                f"On {day} {who} {verb} {abs(change)}."
                for day, verb, change in zip(self.days, self.verbs, self.changes)
            ]
        return [f"{who} has {start}.", *rest]

    @property
    def places(self) -> list[str]:
        """Where in the question each step comes from: "on Monday", "for Ben", "in bags"."""
        changes = [f"for {one}" for one in self.people[1:]] or [f"on {day}" for day in self.days]
        return [f"in {self.box}", *changes] if self.family == "boxes" else changes

    @property
    def prompt(self) -> str:
        return " ".join(self.told) + f" How many {self.thing} does {self.people[-1]} have?"


def held_out(content: str) -> bool:
    """Whether problems of this content belong to the held-out questions: a fixed quarter of all contents does."""
    return sha256(content.encode()).digest()[0] < 64


def draw_problem(
    rng: random.Random, num_steps: int, *, largest: int = LARGEST, families: Sequence[str] = FAMILIES
) -> Problem:
    """A problem of one of `families` with `num_steps` steps, all of whose numbers lie between 0 and `largest`."""
    family = rng.choice(families)
    if family == "boxes":
        boxes, start = rng.randint(2, 4), rng.randint(2, largest // 4)
    else:
        boxes, start = 1, rng.randint(2, 3 * largest // 5)
    changes: list[int] = []
    total = boxes * start
    while len(changes) + (boxes > 1) < num_steps:
        change = rng.randint(1, 9 * largest // 20) * rng.choice((1, -1))
        if 0 <= total + change <= largest:
            changes.append(change)
            total += change
    people = rng.sample(NAMES, len(changes) + 1 if family == "people" else 1)
    timed = () if family == "people" else tuple(changes)
    day = rng.randint(0, len(DAYS) - 3)
    return Problem(
        family=family,
        start=start,
        boxes=boxes,
        changes=tuple(changes),
        people=tuple(people),
        thing=rng.choice(THINGS),
        verbs=tuple(rng.choice(GAINS if change > 0 else LOSSES) for change in timed),
        days=tuple(DAYS[day : day + len(timed)]),
        box=rng.choice(BOXES) if family == "boxes" else "",
    )


def draw_problems(rng: random.Random, count: int, *, held: bool) -> list[Problem]:
    """`count` problems of one to three steps with different prompts: all of them held out, or none."""
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = draw_problem(rng, rng.choice(NUM_STEPS))
        if held_out(problem.content) == held:
            problems[problem.prompt] = problem
    return list(problems.values())
