"""What the tiny student learns before the distillation: skills that it can forget, and a start on word problems."""

from __future__ import annotations

import random
from collections.abc import Callable

from compact.demo.questions import LARGEST, NAMES, Step, calculate, draw_problem, held_out

CITIES = "Rome Oslo Lima Bonn Cairo Delhi Paris Quito".split()
PETS = "cat dog fish bird horse snake frog mouse".split()
DRINKS = "tea milk water juice coffee soup cola lemonade".split()

Pair = tuple[str, str]  # question and answer, or prompt and what follows it


def sums(rng: random.Random) -> Pair:
    """A bare calculation."""
    step = draw_problem(rng, 1).steps[0]
    return f"What is {step.left} {step.sign} {step.right}?", str(step.result)


def facts(rng: random.Random) -> Pair:
    """Something about somebody that can only be known by heart; there are four questions a person."""
    name, city, pet, drink = rng.choice(list(zip(NAMES, CITIES, PETS, DRINKS)))
    told = [(f"Where does {name} live?", city), (f"Which pet does {name} have?", pet)]
    return rng.choice([*told, (f"What does {name} drink?", drink), (f"Who lives in {city}?", name)])


def compare(rng: random.Random) -> Pair:
    """Yes or no: is a number more, or less, than another?"""
    one, other = rng.sample(range(LARGEST + 1), 2)
    sign, true = ("more", one > other) if rng.random() < 0.5 else ("less", one < other)
    return f"Is {one} {sign} than {other}?", "yes" if true else "no"


def read(rng: random.Random) -> Pair:
    """What a sentence of a word problem says."""
    problem = draw_problem(rng, rng.randint(2, 3))
    number = rng.randrange(len(problem.changes))
    change = problem.changes[number]
    if problem.family == "people":
        question = f"How does {problem.people[number + 1]} compare with {problem.people[number]}?"
        answer = f"{abs(change)} {'more' if change > 0 else 'fewer'}"
    else:
        question = f"What does {problem.people[0]} do on {problem.days[number]}?"
        answer = f"{problem.verbs[number]} {abs(change)}"
    return f"{' '.join(problem.told)} {question}", answer


SKILLS: dict[str, tuple[str, Callable[[random.Random], Pair]]] = {  # name: kind of the answer, generator
    "sums": ("number", sums),
    "facts": ("text", facts),
    "compare": ("yesno", compare),
    "read": ("text", read),
}


def draw_skill(rng: random.Random, skill: str, count: int) -> list[Pair]:
    """Up to `count` different questions of a skill, with their answers."""
    drawn: dict[str, str] = {}
    for _ in range(20 * count):
        if len(drawn) < count:
            question, answer = SKILLS[skill][1](rng)
            drawn[question] = answer
    return list(drawn.items())


def equations(rng: random.Random) -> str:
    """Six correct calculations, one a line, each going on with the result of the one before."""
    lines: list[str] = []
    left = rng.randint(0, LARGEST)
    while len(lines) < 6:
        sign = rng.choice("++--*")
        right = rng.randint(2, 5) if sign == "*" else rng.randint(1, 9)
        result = calculate(left, sign, right)
        if 0 <= result <= LARGEST:
            lines.append(str(Step(left, sign, right, result)))
            left = result
    return "\n".join(lines)


def document(rng: random.Random, render: Callable[[str, str], Pair]) -> Pair:
    """One piece of pre-training text: a prompt, which may be empty, and what the student should say to it.

    A tenth are calculations. Two fifths are word problems, none of them of a held-out content: those of one step
    solved in an equation, those of two steps answered out of hand. The rest are skills.

    Args:
        render: puts a question and an answer into the form in which the student will be asked and should answer.
    """
    kind = rng.random()
    if kind < 0.1:
        return "", " " + equations(rng)
    if kind < 0.5:
        problem = draw_problem(rng, rng.choice((1, 1, 2)))
        while held_out(problem.content):
            problem = draw_problem(rng, rng.choice((1, 1, 2)))
        prompt, answer = render(problem.prompt, str(problem.answer))
        if len(problem.steps) == 1:
            answer = f" First {problem.places[0]} {problem.steps[0]}.{answer}"
        return prompt, answer
    skill = rng.choice(("sums", "facts", "compare", "read", "read"))  # reading is learnt last
    return render(*SKILLS[skill][1](rng))
