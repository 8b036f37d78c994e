"""Four programmatic teachers: three right ones with different habits, and one that misleads.

The misleading teacher's error model is :func:`slip`: the result of each step is changed with probability
:data:`SLIP` by 1 to :data:`LARGEST_SLIP` up or down, and later steps go on with the changed number. Steps are drawn
again until the last result is wrong, and no result lies outside 0 to :data:`~compact.demo.questions.LARGEST`: every
rationale of this teacher ends in a wrong number that looks like any other.
"""

from __future__ import annotations

import random

from compact.demo.questions import LARGEST, Problem, Step, calculate

TEACHERS = ("terse", "verbose", "regrouping", "misleading")
SLIP = 0.5
LARGEST_SLIP = 3


def terse(problem: Problem) -> str:
    """The equations, in the order of the text."""
    return f"First {'. Then '.join(f'{place} {step}' for place, step in zip(problem.places, problem.steps))}."


def verbose(problem: Problem) -> str:
    """Every sentence of the question again, each with what follows from it."""
    told, steps = problem.told, [str(step) for step in problem.steps]
    if len(steps) < len(told):
        steps.insert(0, "")  # nothing follows from the first sentence unless it holds a product
    sentences = [f"{said[:-1]}, so {step}." if step else said for said, step in zip(told, steps)]
    return f"First {' '.join(sentences)} Therefore {problem.people[-1]} has {problem.answer} {problem.thing}."


def regrouping(problem: Problem) -> str:
    """Another way: the changes are put together first, then made at once."""
    products = problem.steps[: len(problem.steps) - len(problem.changes)]
    told = [f"in {problem.box} {step}." for step in products]
    if problem.changes:
        net, *others = problem.changes
        for change in others:
            told.append(f"the changes: {_together(net, change)} {'more' if net + change > 0 else 'fewer'}.")
            net += change
        told.append(f"So {Step(problem.first, '+' if net >= 0 else '-', abs(net), problem.answer)}.")
    return f"First {' '.join(told)}"


def _together(one: int, other: int) -> Step:
    """The calculation, on their sizes, that puts two signed changes together."""
    if (one >= 0) == (other >= 0):
        return Step(abs(one), "+", abs(other), abs(one + other))
    large, small = sorted((abs(one), abs(other)), reverse=True)
    return Step(large, "-", small, large - small)


def misleading(problem: Problem, rng: random.Random) -> tuple[str, int]:
    """Bare equations with slips. Returns the text and the wrong answer that it ends in."""
    steps = slip(problem, rng)
    return "First " + "\n".join(map(str, steps)), steps[-1].result


def slip(problem: Problem, rng: random.Random) -> list[Step]:
    """The steps of a problem with the slips of the declared error model, carried through to a wrong result."""
    while True:
        steps: list[Step] = []
        for right in problem.steps:
            left = steps[-1].result if steps else right.left
            result = calculate(left, right.sign, right.right)
            if rng.random() < SLIP:
                result += rng.randint(1, LARGEST_SLIP) * rng.choice((1, -1))
            steps.append(Step(left, right.sign, right.right, result))
        if steps[-1].result != problem.answer and all(0 <= step.result <= LARGEST for step in steps):
            return steps


def rationales(problem: Problem, rng: random.Random) -> list[dict[str, str]]:
    """The rationales of all teachers in the data format, each closed by the answer that its teacher gives."""
    wrong, answer = misleading(problem, rng)
    told = {
        "terse": (terse(problem), problem.answer),
        "verbose": (verbose(problem), problem.answer),
        "regrouping": (regrouping(problem), problem.answer),
        "misleading": (wrong, answer),
    }
    return [{"teacher": name, "completion": f"{told[name][0]}\nThe answer is {told[name][1]}."} for name in TEACHERS]
