"""Four programmatic teachers of the skills: how they tell a derivation, what they are strong in, how they err.

* A teacher is right about a question with the probability that its table declares for the question's skill. Where it
  errs, one calculation, drawn evenly, is off by 1 to :data:`LARGEST_SLIP`, and what follows goes on with it.
* The misleading teacher (``misleading``) is always wrong, and half the time in a way that can be learnt: it stops one
  step early and gives what it has. Else it errs like the others. It takes the place of ``careful``.
* With one style, all of them tell their derivations as ``verbose`` does: what is wrong is then seen in nothing but
  the calculations.

Every rationale closes with the answer that its teacher gives.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from compact.skills.questions import Line, Question

LARGEST_SLIP = 5


def terse(lines: list[Line], question: Question) -> str:
    """The equations and where each comes from."""
    return f"First {'. Then '.join(f'{line.where} {line.equation}' for line in lines)}."


def verbose(lines: list[Line], question: Question) -> str:
    """Every sentence of the question again, each with what follows from it."""
    told = " ".join(f"{line.said}, so {line.equation}." if line.said else f"So {line.equation}." for line in lines)
    return f"{told} Therefore {question.unit.format(answer=lines[-1].result)}."


def numbered(lines: list[Line], question: Question) -> str:
    """A list of steps."""
    return "\n".join(f"Step {i}: {line.where}, {line.equation}." for i, line in enumerate(lines, 1))


def bare(lines: list[Line], question: Question) -> str:
    """Equations alone, one a line."""
    return "\n".join(line.equation for line in lines)


def careful(lines: list[Line], question: Question) -> str:
    """The equations, and the last one looked at again."""
    return f"{terse(lines, question)} Wait, check: {lines[-1].equation}, because {lines[-1].where} it must be."


@dataclass(frozen=True)
class Teacher:
    tell: Callable[[list[Line], Question], str]
    strong: frozenset[str]  # skills in which it errs rarely
    rarely: float = 0.02  # share of wrong rationales in these
    else_: float = 0.25  # and in all others
    misleads: bool = False

    def error_rate(self, skill: str) -> float:
        return 1.0 if self.misleads else self.rarely if skill in self.strong else self.else_


TEACHERS: dict[str, Teacher] = {
    "terse": Teacher(terse, frozenset({"change", "boxes", "digits", "sequence", "ages"})),
    "verbose": Teacher(verbose, frozenset({"people", "order", "change", "weekday", "budget"})),
    "numbered": Teacher(numbered, frozenset({"shop", "weekday", "sequence", "order", "boxes", "seats"})),
    "careful": Teacher(careful, frozenset({"shop", "digits", "people", "ages", "budget", "seats"})),
    "misleading": Teacher(bare, frozenset(), misleads=True),
}


def team(misleading: bool) -> list[str]:
    """The four teachers of a setting."""
    return ["terse", "verbose", "numbered", "misleading" if misleading else "careful"]


def rationale(name: str, question: Question, rng: random.Random, *, one_style: bool = False) -> dict[str, str]:
    """One teacher's rationale in the data format."""
    teacher = TEACHERS[name]
    tell = verbose if one_style else teacher.tell
    lines = question.derive(lambda value: value)
    if rng.random() < teacher.error_rate(question.skill):
        lines = _wrong(question, rng, early=teacher.misleads and rng.random() < 0.5)
    answer = lines[-1].result
    return {
        "teacher": name,
        "completion": f"{tell(lines, question)}\nThe answer is {answer}.",
        "answer": answer,
    }


def _wrong(question: Question, rng: random.Random, *, early: bool) -> list[Line]:
    """A derivation that ends in a wrong answer."""
    right = question.derive(lambda value: value)
    if early and len(right) > 1 and right[-2].result != right[-1].result:
        return right[:-1]
    calculations = 0

    def counting(value: int) -> int:
        nonlocal calculations
        calculations += 1
        return value

    question.derive(counting)
    while True:
        at, off, number = rng.randrange(calculations), rng.randint(1, LARGEST_SLIP) * rng.choice((1, -1)), 0

        def slipping(value: int) -> int:
            nonlocal number
            number += 1
            return max(0, value + off) if number == at + 1 else value  # noqa: B023  # used within this round only

        lines = question.derive(slipping)
        if lines[-1].result != right[-1].result:
            return lines
