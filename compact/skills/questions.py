"""Questions of the skills study: multi-step word problems and reasoning tasks, each with its derivation.

A question's derivation is a function of a *slip*: every number that it calculates passes through the slip, and what
follows goes on with what comes back. The right derivation has the slip that changes nothing; a teacher's error model
is another slip. A question's *content* is its arithmetic alone; which part of the study may ask it, training,
validation or test, is decided by a hash of the content, whatever the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from compact.demo.questions import DAYS, NAMES, Step, calculate, draw_problem
from compact.errors import UserError

LARGEST = 60  # no number of a word problem that the demo's generator draws exceeds it
PARTS = {"train": range(0, 154), "validation": range(154, 192), "test": range(192, 256)}  # of a content's hash
WEEK = [*DAYS, "Saturday", "Sunday"]
ITEMS = "pen book lamp cup ball".split()

Slip = Callable[[int], int]  # the right result of a calculation → what the teacher writes down


class Line(NamedTuple):
    """One step of a derivation."""

    said: str  # the sentence of the question that the step uses, without its full stop; may be ""
    where: str  # a short name of the step: "on Monday"
    equation: str  # "12 + 5 = 17"
    result: str  # the answer of somebody who stops here


@dataclass(frozen=True)
class Question:
    skill: str
    wording: int
    prompt: str
    content: str
    kind: str  # of the answer: "number" or "text"
    unit: str  # a sentence with {answer} in it
    derive: Callable[[Slip], list[Line]]

    @property
    def answer(self) -> str:
        return self.derive(lambda value: value)[-1].result

    @property
    def part(self) -> str:
        """The part of the study that may ask it."""
        byte = sha256(f"{self.skill} {self.content}".encode()).digest()[0]
        return next(name for name, share in PARTS.items() if byte in share)


def _told(rng: random.Random, wording: int, family: str) -> Question:
    """A word problem of the embedded demo's generator, in one of four wordings."""
    problem = draw_problem(rng, rng.choice((2, 2, 3)), largest=LARGEST, families=(family,))
    who, thing, asked = problem.people[0], problem.thing, problem.people[-1]
    start = f"{problem.start} {thing}"
    if family == "boxes":
        start = f"{problem.boxes} {problem.box} with {problem.start} {thing} each"
    first = (
        f"{who} has {start}",
        f"{who} starts with {start}",
        f"There are {start} at {who}'s",
        f"{who} owns {start}",
    )
    said = [first[wording]]
    for index, change in enumerate(problem.changes):
        size, more = abs(change), change > 0
        if family == "people":
            one, other = problem.people[index + 1], problem.people[index]
            word = "more" if more else "fewer"
            forms = (
                f"{one} has {size} {word} than {other}",
                f"{one} has {size} {thing} {word} than {other}",
                f"Compared with {other}, {one} has {size} {word}",
                f"{size} {word} than {other} is what {one} has",
            )
        else:
            day, verb = problem.days[index], problem.verbs[index]
            forms = (
                f"On {day} {who} {verb} {size}",
                f"{who} {verb} {size} on {day}",
                f"On {day} {who} {verb} {size} {thing}",
                f"{size} {thing} {'come to' if more else 'leave'} {who} on {day}",
            )
        said.append(forms[wording])
    ends = (
        f"How many {thing} does {asked} have?",
        f"How many {thing} does {asked} have in the end?",
        f"What number of {thing} does {asked} have?",
        f"Count the {thing} of {asked}.",
    )

    def derive(slip: Slip) -> list[Line]:
        lines: list[Line] = []
        told = said if len(problem.steps) == len(said) else said[1:]
        for step, place, sentence in zip(problem.steps, problem.places, told):
            left = int(lines[-1].result) if lines else step.left
            result = slip(calculate(left, step.sign, step.right))
            lines.append(Line(sentence, place, str(Step(left, step.sign, step.right, result)), str(result)))
        if len(said) > len(problem.steps):
            lines[0] = lines[0]._replace(said=f"{said[0]} and {said[1]}")
        return lines

    prompt = f"{'. '.join(said)}. {ends[wording]}"
    return Question(family, wording, prompt, problem.content, "number", f"{asked} has {{answer}} {thing}", derive)


def _shop(rng: random.Random, wording: int) -> Question:
    who, (one, other) = rng.choice(NAMES), rng.sample(ITEMS, 2)
    prices, counts = (rng.randint(2, 9), rng.randint(2, 9)), (rng.randint(2, 6), rng.randint(2, 6))
    first, second = f"{counts[0]} {one}s", f"{counts[1]} {other}s"
    prompt = (
        f"A {one} costs {prices[0]} dollars and a {other} costs {prices[1]} dollars. {who} buys {first} and {second}. "
        "How many dollars is that?",
        f"{who} buys {first} at {prices[0]} dollars each and {second} at {prices[1]} dollars each. How much is it?",
        f"{who} needs {first} and {second}. Each {one} costs {prices[0]} dollars, each {other} {prices[1]}. "
        "What does it cost?",
        f"At {prices[0]} dollars for one {one} and {prices[1]} dollars for one {other}, what must {who} pay for "
        f"{first} and {second}?",
    )[wording]

    def derive(slip: Slip) -> list[Line]:
        a, b = slip(counts[0] * prices[0]), slip(counts[1] * prices[1])
        total = slip(a + b)
        return [
            Line(f"{who} buys {first}", f"for the {one}s", f"{counts[0]} * {prices[0]} = {a}", str(a)),
            Line(f"{who} buys {second}", f"for the {other}s", f"{counts[1]} * {prices[1]} = {b}", str(b)),
            Line("", "in all", f"{a} + {b} = {total}", str(total)),
        ]

    content = f"{sorted(zip(counts, prices))}"
    return Question("shop", wording, prompt, content, "number", f"{who} pays {{answer}} dollars", derive)


def _sequence(rng: random.Random, wording: int) -> Question:
    start, step, ahead = rng.randint(1, 40), rng.randint(2, 12), rng.choice((1, 2))
    terms = [start + i * step for i in range(4)]
    shown = ", ".join(map(str, terms))
    place = ("next", "two places later")[ahead - 1]
    prompt = (
        f"The numbers {shown} follow a rule. Which number comes {place}?",
        f"Look at {shown}. What is the number that comes {place}?",
        f"A list goes {shown} and so on. Give the number that comes {place}.",
        f"Somebody counts: {shown}. Going on like this, what is said {place}?",
    )[wording]

    def derive(slip: Slip) -> list[Line]:
        gap = slip(step)
        lines = [
            Line(
                f"The list begins with {terms[0]}, {terms[1]}",
                "from one to the next",
                f"{terms[1]} - {terms[0]} = {gap}",
                str(gap),
            )
        ]
        last = terms[-1]
        for _ in range(ahead):
            following = slip(last + gap)
            lines.append(
                Line(f"After {last} comes {gap} more", "further on", f"{last} + {gap} = {following}", str(following))
            )
            last = following
        return lines

    return Question("sequence", wording, prompt, f"{start} {step} {ahead}", "number", "the number is {answer}", derive)


def _weekday(rng: random.Random, wording: int) -> Question:
    today, days = rng.randrange(7), rng.randint(8, 80)
    name = WEEK[today]
    prompt = (
        f"Today is {name}. Which day of the week is it in {days} days?",
        f"If today is {name}, what day will it be {days} days from now?",
        f"It is {name} now. {days} days later, which weekday is it?",
        f"A letter sent on {name} takes {days} days. On which day of the week does it arrive?",
    )[wording]

    def derive(slip: Slip) -> list[Line]:
        weeks = days // 7
        off = slip(7 * weeks)
        rest = slip(days - off)
        end = WEEK[(today + slip(rest)) % 7]
        return [
            Line(
                f"A week has 7 days and {days} days are {weeks} whole weeks",
                "in whole weeks",
                f"{weeks} * 7 = {off}",
                name,
            ),
            Line(f"It is {name} again after whole weeks", "days left", f"{days} - {off} = {rest}", name),
            Line("", "from there", f"{name} + {rest} = {end}", end),
        ]

    return Question("weekday", wording, prompt, f"{today} {days}", "text", "the day is {answer}", derive)


def _digits(rng: random.Random, wording: int) -> Question:
    digits = [rng.randint(1, 9), *(rng.randint(0, 9) for _ in range(3))]
    number = "".join(map(str, digits))
    prompt = (
        f"What is the sum of the digits of {number}?",
        f"Add up the digits of {number}.",
        f"Take the number {number}. What do its digits give together?",
        f"A lock shows {number}. Its digits are added. What comes out?",
    )[wording]

    def derive(slip: Slip) -> list[Line]:
        total, lines = digits[0], []
        for digit in digits[1:]:
            following = slip(total + digit)
            lines.append(
                Line(
                    f"The digit {digit} comes next",
                    f"with {digit}",
                    f"{total} + {digit} = {following}",
                    str(following),
                )
            )
            total = following
        return lines

    return Question("digits", wording, prompt, number, "number", "the sum is {answer}", derive)


def _order(rng: random.Random, wording: int) -> Question:
    people = rng.sample(NAMES, 4)  # from the greatest to the least
    word, end = rng.choice((("taller", "tallest"), ("older", "oldest"), ("faster", "fastest")))
    rank = rng.randint(2, 3)
    place = {2: "second", 3: "third"}[rank]
    pairs = list(zip(people, people[1:]))
    rng.shuffle(pairs)
    said = [
        (
            f"{a} is {word} than {b}",
            f"{a} is {word} than {b}",
            f"{a} is the {word} one of {a} and {b}",
            f"Beside {a}, {b} is not the {word} one",
        )[wording]
        for a, b in pairs
    ]
    ask = (
        f"Who is the {place} {end}?",
        f"Which of them is the {place} {end}?",
        f"Name the {place} {end}.",
        f"Who takes place {rank} among the {end}?",
    )

    def derive(slip: Slip) -> list[Line]:
        lines, known = [], people[:1]
        for one, other in zip(people, people[1:]):
            known.append(other)
            lines.append(Line(f"{one} is {word} than {other}", f"after {one}", " > ".join(known), other))
        index = slip(rank) % 4
        lines.append(Line("", "in that order", f"place {index or 4} = {people[index - 1]}", people[index - 1]))
        return lines

    return Question(
        "order",
        wording,
        f"{'. '.join(said)}. {ask[wording]}",
        f"{' '.join(people)} {word} {rank}",
        "text",
        f"the {place} {end} is {{answer}}",
        derive,
    )


def _ages(rng: random.Random, wording: int) -> Question:
    one, other = rng.sample(NAMES, 2)
    age, gap, years = rng.randint(3, 20), rng.randint(2, 9), rng.randint(2, 9)
    prompt = (
        f"{one} is {age} years old. {other} is {gap} years older than {one}. How old will {other} be in {years} years?"
    )

    def derive(slip: Slip) -> list[Line]:
        now = slip(age + gap)
        then = slip(now + years)
        return [
            Line(f"{other} is {gap} years older than {one}", "now", f"{age} + {gap} = {now}", str(now)),
            Line(f"That is in {years} years", "then", f"{now} + {years} = {then}", str(then)),
        ]

    return Question("ages", wording, prompt, f"{age} {gap} {years}", "number", f"{other} will be {{answer}}", derive)


def _budget(rng: random.Random, wording: int) -> Question:
    who, item = rng.choice(NAMES), rng.choice(ITEMS)
    price, count = rng.randint(2, 9), rng.randint(2, 6)
    money = price * count + rng.randint(1, 20)
    prompt = f"{who} has {money} dollars and buys {count} {item}s at {price} dollars each. How many dollars are left?"

    def derive(slip: Slip) -> list[Line]:
        cost = slip(count * price)
        left = slip(money - cost)
        return [
            Line(f"{who} buys {count} {item}s", f"for the {item}s", f"{count} * {price} = {cost}", str(cost)),
            Line(f"{who} has {money} dollars", "after that", f"{money} - {cost} = {left}", str(left)),
        ]

    return Question(
        "budget", wording, prompt, f"{money} {count} {price}", "number", f"{who} has {{answer}} dollars left", derive
    )


def _seats(rng: random.Random, wording: int) -> Question:
    rows, each = rng.randint(2, 9), rng.randint(3, 9)
    taken = rng.randint(1, rows * each - 1)
    prompt = f"A hall has {rows} rows of {each} seats. {taken} seats are taken. How many seats are free?"

    def derive(slip: Slip) -> list[Line]:
        seats = slip(rows * each)
        free = slip(seats - taken)
        return [
            Line(f"A hall has {rows} rows of {each} seats", "in the hall", f"{rows} * {each} = {seats}", str(seats)),
            Line(f"{taken} seats are taken", "free", f"{seats} - {taken} = {free}", str(free)),
        ]

    return Question("seats", wording, prompt, f"{rows} {each} {taken}", "number", "{answer} seats are free", derive)


def _word_problem(family: str) -> Callable[[random.Random, int], Question]:
    return lambda rng, wording: _told(rng, wording, family)


# Taught: three of the four wordings are trained on, the last one is held out unless another is asked for. Untaught:
# never trained on at all, in one wording, but of the same calculations, two of them in an order that no taught skill
# has: what nobody can do tells no methods apart.
TAUGHT: dict[str, Callable[[random.Random, int], Question]] = {
    "change": _word_problem("change"),
    "people": _word_problem("people"),
    "boxes": _word_problem("boxes"),
    "shop": _shop,
    "sequence": _sequence,
    "weekday": _weekday,
    "digits": _digits,
    "order": _order,
}
UNTAUGHT = {"ages": _ages, "budget": _budget, "seats": _seats}
WORDINGS = range(4)
HELD_OUT_WORDING = 3


def trained_wordings(held_out: int = HELD_OUT_WORDING) -> tuple[int, ...]:
    """All of a skill's wordings but the held-out one."""
    return tuple(wording for wording in WORDINGS if wording != held_out)


def draw_questions(
    rng: random.Random, count: int, *, part: str, skills: dict[str, Callable], wordings: tuple[int, ...]
) -> list[Question]:
    """`count` questions with different prompts, the skills in turn, their contents all of one part of the study."""
    drawn: dict[str, Question] = {}
    names = list(skills)
    for attempt in range(200 * count):  # in turn, so that a skill with few contents gives what it has
        question = skills[names[attempt % len(names)]](rng, rng.choice(wordings))
        if question.part == part:
            drawn.setdefault(question.prompt, question)
        if len(drawn) == count:
            return list(drawn.values())
    raise UserError(f"there are not {count:,} different questions of the {part} part: ask for {len(drawn):,} or fewer")
