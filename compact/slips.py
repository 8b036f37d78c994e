"""A declared slip in a worked solution: one calculator result goes wrong, and every later step goes on from it.

The solutions are GSM8K's, whose calculator notes ``<<12*3=36>>`` say where each number comes from. The error model:

* ``off_by_one``: the result is one too high or too low,
* ``carry``: a lost or an extra carry, ten too high or too low,
* ``transposed``: two neighbouring digits change places,
* ``shifted``: a zero too many or too few.

After the slip the text is true to it: wherever the wrong number is used, in later notes and in words, it is the wrong
one, and what follows from it is calculated anew.
"""

from __future__ import annotations

import ast
import random
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

KINDS = ("off_by_one", "carry", "transposed", "shifted")

NOTE = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
_NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\d|st\b|nd\b|rd\b|th\b)|(?<![\w.])\.\d+")
_EQUATION = re.compile(
    rf"({_NUMBER.pattern})\s*([-+*/x×])\s*\$?({_NUMBER.pattern})\s*=\s*\$?({_NUMBER.pattern})".replace(
        r"(?<![\w.])", ""
    )
)


@dataclass(frozen=True)
class Slip:
    text: str  # the whole solution, notes and final answer included
    answer: str  # the wrong one
    kind: str
    note: int  # which calculator note slipped, from 1
    before: str  # its result
    after: str
    carried: int  # later notes with another result


def slip(question: str, solution: str, rng: random.Random) -> Slip | None:
    """A copy of `solution` (with notes, ending in ``#### answer``) with one slip and a wrong answer.

    Among all notes and kinds of slip, those are preferred that keep whole numbers whole, whose number stands for
    nothing else in question and solution, and that leave no other sum in the text false; `rng` draws among the best.
    None where there is no way: no notes, an answer that no note gives, nothing but negative or undefined numbers.
    """
    notes = len(NOTE.findall(solution))
    candidates = [(note, kind, sign) for note in range(notes) for kind in KINDS for sign in (1, -1)]
    rng.shuffle(candidates)
    best: tuple[int, Slip] | None = None
    for note, kind, sign in candidates:
        found = _Carrying(question, solution, note, kind, sign).result()
        if found is not None and (best is None or found[0] < best[0]):
            best = found
            if best[0] == 0:
                break
    return None if best is None else best[1]


class _Impossible(Exception):
    pass


class _Carrying:
    """One attempt: reads the solution from left to right and writes it anew."""

    def __init__(self, question: str, solution: str, note: int, kind: str, sign: int):
        self.question, self.solution, self.note, self.kind, self.sign = question, solution, note, kind, sign
        self.changed: dict[Fraction, Fraction] = {}  # numbers that now read differently
        self.flaws = 0

    def result(self) -> tuple[int, Slip] | None:
        try:
            return self._result()
        except (_Impossible, ZeroDivisionError):
            return None

    def _result(self) -> tuple[int, Slip] | None:
        body, mark, gold = self.solution.rpartition("####")
        gold = gold.strip()
        if not mark or not _NUMBER.fullmatch(gold):
            return None
        written, position, carried, before, after = "", 0, 0, "", ""
        given = {_value(number) for number in _NUMBER.findall(self.question)}
        for index, match in enumerate(NOTE.finditer(body)):
            written += self._text(body[position : match.start()])
            position = match.end()
            expression, stated = match.groups()
            value = _parsed(stated)
            if index == self.note:
                new = _slipped(value, self.kind, self.sign)
                before, after = stated.strip(), _written(new, stated)
            else:
                new = self._calculated(expression, value, stated)
                carried += new != value
            if new != value:
                if new <= 0:
                    raise _Impossible
                self.flaws += (value.denominator == 1) != (new.denominator == 1)
                seen = {_value(number) for number in _NUMBER.findall(NOTE.sub("", body[: match.start()]))}
                self.flaws += value in given or value in seen
                self.changed[value] = new
            else:
                self.changed.pop(value, None)
            written += f"<<{self._text(expression) if index != self.note else expression}={_written(new, stated)}>>"
        written += self._text(body[position:])
        answer = self.changed.get(_value(gold))
        if answer is None:
            return None
        wrong = _written(answer, gold)
        # What was calculated in words, without a note, is not carried through: the slip alone should be false.
        self.flaws += max(0, _false_equations(written) - _false_equations(body) - 1)
        return self.flaws, Slip(f"{written}#### {wrong}", wrong, self.kind, self.note + 1, before, after, carried)

    def _text(self, text: str) -> str:
        """The same text with the numbers that have changed."""
        return _NUMBER.sub(lambda match: self._number(match.group()), text) if self.changed else text

    def _number(self, number: str) -> str:
        new = self.changed.get(_value(number))
        return number if new is None else _written(new, number)

    def _calculated(self, expression: str, value: Fraction, stated: str) -> Fraction:
        """The note's result now: as stated where nothing in it has changed (solutions round), else calculated."""
        now = self._text(expression)
        if now == expression:
            return value
        old_result, new_result = _evaluate(expression), _evaluate(now)
        if new_result == old_result:
            return value
        return _parsed(_written(new_result, stated))


def _false_equations(text: str) -> int:
    """How many plain equations of two numbers in the text, "12 + 3 = 14", do not hold (up to rounding)."""
    false = 0
    for left, operator, right, result in _EQUATION.findall(NOTE.sub("", text)):
        try:
            value = _evaluate(f"{left}{'*' if operator in 'x×' else operator}{right}")
            false += abs(value - _value(result)) > Fraction(1, 100)
        except (_Impossible, ZeroDivisionError):
            continue
    return false


def _slipped(value: Fraction, kind: str, sign: int) -> Fraction:
    if kind == "off_by_one":
        return value + sign
    if kind == "carry":
        if value < 10:
            raise _Impossible
        return value + 10 * sign
    if kind == "shifted":
        if sign < 0 and value % 10:
            raise _Impossible
        return value * 10 if sign > 0 else value / 10
    whole = str(int(value)) if value > 0 else ""
    places = [i for i in range(len(whole) - 1) if whole[i] != whole[i + 1] and whole[i + 1] + whole[:i] != "0"]
    if not places:
        raise _Impossible
    i = places[0 if sign > 0 else -1]
    return value - int(whole) + int(whole[:i] + whole[i + 1] + whole[i] + whole[i + 2 :])


def _value(number: str) -> Fraction:
    try:
        return Fraction(number.replace(",", ""))
    except (ValueError, ZeroDivisionError):  # no number, or one of thousands of digits
        raise _Impossible from None


def _parsed(stated: str) -> Fraction:
    return _value(stated.replace("$", "").strip())


def _written(value: Fraction, like: str) -> str:
    """A number written as `like` is: thousands with commas, as many decimals, at least two if it needs any."""
    shown = len(like.strip().partition(".")[2])
    decimals = shown if (value * 10**shown).denominator == 1 else max(shown, 2 if abs(value) >= Fraction(1, 10) else 4)
    digits = Decimal(round(value * 10**decimals)).scaleb(-decimals)
    text = f"{digits:,f}" if "," in like else f"{digits:f}"
    return text if decimals <= shown else text.rstrip("0").rstrip(".")


def _evaluate(expression: str) -> Fraction:
    """Exact arithmetic: + - * / and brackets.

    Raises:
        _Impossible: anything else.
    """
    try:
        numbers: list[Fraction] = []

        def name(match: re.Match[str]) -> str:
            numbers.append(_value(match.group()))
            return f" n{len(numbers) - 1} "

        tree = ast.parse(_NUMBER.sub(name, expression).strip(), mode="eval").body
        return _walk(tree, numbers)
    except (SyntaxError, ValueError, IndexError, RecursionError, MemoryError):
        raise _Impossible from None


def _walk(node: ast.expr, numbers: list[Fraction]) -> Fraction:
    if isinstance(node, ast.Name):
        return numbers[int(node.id[1:])]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _walk(node.operand, numbers)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _walk(node.left, numbers), _walk(node.right, numbers)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    raise _Impossible
