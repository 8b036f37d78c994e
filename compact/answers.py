"""Answers in text: closing statements taken off, answers extracted, answers compared.

Kinds of answers: ``number`` (GSM8K), ``choice`` (a letter), ``yesno``, ``math`` (LaTeX, through math-verify) and
``text`` (equal up to case, spacing and the full stop).
"""

from __future__ import annotations

import difflib
import re
import threading
import unicodedata
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from compact.errors import UserError

KINDS = ("number", "choice", "yesno", "math", "text")
GOLD = {  # what a gold answer is, for messages
    "number": "one number in digits, such as 1500000, 1.5e6 or 3/4",
    "choice": "an option's letter",
    "yesno": "yes or no",
    "math": "a formula",
    "text": "some words",
}

_NUMBER = r"[-+]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?"
_VALUE = rf"{_NUMBER}(?:(?:[ ]\d+)?/\d+)?"  # 1/2 and 2 1/2 too
_LETTER = "[A-J]"
_WORD = (
    r"(?:(?:and|so|thus|therefore|hence|then|finally|consequently|in conclusion|to conclude|in summary)\b[,:]?"
    r"|(?:(?:this|that|it|which)\s+(?:means|implies|shows|gives(?:\s+us)?)|(?:we|i|one)(?:\s+can)?\s+"
    r"(?:conclude|see|find|say)|i\s*(?:[’']|\sa)m\s+(?:confident|sure))(?:\s+that)?[,:]?)"
)
_CONNECTIVE = rf"(?:{_WORD}\s+)"
_NAMED = (
    r"(?:(?:the|our|my)\s+)?(?:(?:final|correct|right|best)\s+)*"
    r"(?:answer|(?:option|choice)(?=[\s:*]*(?:is\b)?[\s:*(]*(?-i:[A-J])\b))"
)
_OF = r"(?:\s+(?:to|for)\s+(?:the|this)\s+(?:question|problem))?"
# What joins "the answer" to what it is; "answer" alone on a line counts too ("## Final Answer", then the answer).
_IS = (
    r"(?:\**\s*(?:(?:is|are|was|would\s+be|must\s+be|should\s+be)(?![\w'’])|=|:)[\s:*]*(?!not\b)"
    r"|\**:?\**[ \t]*\n\s*)"
)
# What ends no sentence: titles (Jr. does, unless its sentence goes on), and two initials or more before a name.
_TITLE = r"(?:\b(?:(?:St|Mt|Ft|Mr|Mrs|Ms|Dr)\.|(?:Jr|Sr)\.(?-i:(?=,? [a-z])))|(?-i:\b(?:[A-Z]\. ?){2,}(?=[A-Z][a-z])))"
# One line, and no second sentence in it: what stands in mid-text is no closing statement.
_STATED = rf"(?P<stated>(?:{_TITLE}|(?![.!?]\s+\S)[^\n])+)"
_HASHES = re.compile(r"(?:^|\s)####[ \t]*(?P<stated>[^\n]+)$")
_STATEMENT = re.compile(
    rf"(?:^|(?<=[\s(*]))[#*_]*[ \t]*{_CONNECTIVE}*{_NAMED}{_OF}{_IS}(?=\S){_STATED}$", re.IGNORECASE
)
_POSTFIX = re.compile(
    rf"(?:^|(?<=\s)){_CONNECTIVE}*(?P<stated>{_NUMBER}|\({_LETTER}\)|\b(?-i:{_LETTER})\b|yes|no)"
    rf"\s+is\s+(?:the|our|my)\s+(?:(?:final|correct|right)\s+)*(?:answer|option|choice)[.!]?$",
    re.IGNORECASE,
)
# What stands before a \boxed{…} that is a closing statement: a connective alone in its sentence, or "the answer is".
_LEAD_IN = re.compile(
    rf"(?:^|(?<=[.!?:])|(?<=\n))\s*(?:{_CONNECTIVE}*{_WORD})?\s*$"
    rf"|(?:^|(?<=\s))[#*_]*[ \t]*{_CONNECTIVE}*{_NAMED}{_OF}{_IS}$",
    re.IGNORECASE,
)
_WRAPPERS = (
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("**", "**"),
    ("*", "*"),
    ("`", "`"),
    ('"', '"'),
)
# What models like to say after their answer, and the emoji after that.
_PLEASANTRY = re.compile(
    r"(?<=[.!?\n])\s*(?:I hope (?:it|this|that) (?:is correct|helps)|Let me know if [^.!?\n]*|Hope this helps)\W*\Z",
    re.I,
)
_TAIL = 600  # characters: no closing statement is longer, and patterns need not search a whole rationale


def strip_closing(completion: str) -> tuple[str, str | None, bool]:
    r"""Take the closing answer statement off the end of a completion.

    ``#### 72``, "So the answer is 72.", "Therefore, the final answer is: (C)", "Answer: yes", "72 is the answer.",
    ``\boxed{72}`` alone or after such words; several of them in a row go together, and the last one speaks. A
    ``\boxed{9}`` that ends a sentence of the reasoning ("the total is $4+5=\boxed{9}$.") is unboxed, and the sentence
    stays. Statements in mid-text stay.

    Returns:
        body (right-stripped), the stated answer or None, whether a closing statement was recognised.
    """
    body, stated = completion.rstrip(), None
    cut = max(0, len(body) - _TAIL)
    body = body[:cut] + _PLEASANTRY.sub("", body[cut:])
    while True:
        shorter, found = _strip_one(body)
        if found is None:
            return body, stated, stated is not None
        stated = found if stated is None else stated
        if not body.startswith(shorter):
            return shorter, stated, True  # unboxed: the sentence belongs to the reasoning
        body = shorter


def _strip_one(text: str) -> tuple[str, str | None]:
    cut = max(0, len(text) - _TAIL)
    boxed = _trailing_box(text)
    if boxed is not None:
        start, content, opening, closing = boxed
        lead_in = _LEAD_IN.search(text, min(cut, start), start)
        if lead_in is None:
            return text[:start] + opening + content + closing, content
        return text[: lead_in.start()].rstrip(" \t\n,;"), content
    for pattern in (_HASHES, _POSTFIX, _STATEMENT):
        match = pattern.search(text, cut)
        if match and (stated := clean(match["stated"])):
            return text[: match.start()].rstrip(" \t\n,;"), stated
    return text, None


def _box(text: str) -> tuple[int, int, str] | None:
    r"""The last ``\boxed{…}`` with matching braces: where it begins and ends, its content."""
    if "boxed{" not in text and "fbox{" not in text:  # most: no need to look at every brace
        return None
    opened: list[re.Match[str]] = []
    last: tuple[int, int, str] | None = None
    for brace in re.finditer(r"(?:\\boxed|\\fbox)?\{|\}", text):
        if brace.group() != "}":
            opened.append(brace)
        elif opened and (begin := opened.pop()).group() != "{" and (last is None or begin.start() > last[0]):
            last = begin.start(), brace.end(), text[begin.end() : brace.start()].strip()
    return last


def _trailing_box(text: str) -> tuple[int, str, str, str] | None:
    """The box that ends the text, up to maths delimiters and a full stop: (start, content, marks before, after)."""
    box = _box(text)
    if box is None or not re.fullmatch(r"(?:\s|[.*!]|\$|\\\]|\\\)|\\end\{[a-z]+\*?\})*", text[box[1] :]):
        return None
    start, end, content = box
    opening = re.compile(r"(?:\*\*|\$\$?|\\\[|\\\()?\s*$").search(text, max(0, start - 40), start)
    assert opening is not None
    return opening.start(), content, opening.group(), text[end:]


def clean(stated: str, marks: str = " \t.!,;") -> str:
    """An answer without the marks around it: maths delimiters, bold, quotes, the full stop and other `marks`."""
    text = stated.strip()
    while True:
        before = text
        text = text.rstrip(marks) if not text.endswith("...") else text
        box = _trailing_box(text)
        if box is not None and box[0] == 0:
            text = box[1]
        for left, right in _WRAPPERS:
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
                text = text[len(left) : len(text) - len(right)].strip()
        if text.endswith("**") and "**" not in text[:-2]:  # the bold began before the answer: "**Answer: 72**"
            text = text[:-2]
        if text == before:
            return text


def canonical(stated: str, kind: str) -> str:
    """What a statement says, as an answer of its kind: "72 dollars" → "72", "(C) the bank" → "C", "No, it is" → "no".

    A statement that holds no answer of the kind comes back as :func:`clean` leaves it.
    """
    _check_kind(kind)
    if kind == "math":
        return clean(stated, " \t.,;")  # 10! is a factorial
    text = _bare(stated)
    if kind == "number":
        number = _number(text)
        return number[0] if number else text
    if kind == "choice":
        found = _CHOSEN.match(text)
        return found.group(1).upper() if found else text
    if kind == "yesno":
        found = re.match(r"(yes|no|true|false)\b", text, re.IGNORECASE)
        return _YESNO[found.group(1).lower()] if found else text
    return text


# "A bank" and "I think" begin with words, "A because" does not.
_NO_WORD = r"(?![a-zAI][ \t]+(?!(?:as|because|is|since)\b)\w)"
_CHOSEN = re.compile(rf"{_NO_WORD}(?i:(?:option|choice)\s+)?\(?([A-Za-z])\)?(?![A-Za-z'’])")
_STYLED = re.compile(r"\\(?:text|mathrm|mathbf)(?:bf|rm|it)?\{([^{}]*)\}")
_VULGAR = re.compile("[¼-¾⅐-⅞]")


def _bare(stated: str) -> str:
    return clean(_STYLED.sub(r"\1", clean(stated)))


def _number(text: str) -> tuple[str, str, str] | None:
    """The number of a bare statement (5, -1.5e3, 5/2 of 2 1/2), and what stands before and after it."""
    said = _numeric(text)
    if found := re.search(r"((?<!\d)-|)\$?(\d[\d,]{0,99})\s+(\d{1,99})/(\d{1,99})", said):  # 2 1/2
        whole, part, of = (int(number.replace(",", "")) for number in found.groups()[1:])
        number = f"{found[1]}{whole * of + part}/{of}"
    elif found := re.search(rf"{_NUMBER}(?:/\d+)?(?!\d*:\d)", said):
        number = found.group().translate(_DROP)
    else:
        return None
    return number, said[: found.start()], said[found.end() :]


def _numeric(text: str) -> str:
    """What a statement says as a number, in digits, -, / and what stands around them.

    Of "x = 5" it is what stands last, of "72 = 6 · 12", "72 (n = 3)" and "72, since x = 6" what stands first.
    """
    said = _scaled(re.sub("[−–](?=\\s*[$\\d.])", "-", text))
    said = _VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found[0]).replace("⁄", "/"), said)
    said = re.sub(r"\\[dt]?frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))", r" \1\3/\2\4", said)
    said = re.sub(r"(?<=\d)\s*/\s*(?=\d)", "/", said)
    said = re.sub(r"(?<![\d.,])(\d{1,3}(?:[\u00a0\u2009\u202f ]\d{3})+)(?![\d.,]*\d)", _joined, said)
    said = re.sub(r"(?<![\d.])(\d{1,6})\s*\^\s*\{?(\d{1,2})\}?(?!\d)", lambda x: str(int(x[1]) ** int(x[2])), said)
    first = re.match(rf"\s*{_VALUE}(?=\s*(?:$|=|\(|,?\s*(?:since|because|as|where|when)\b))", said)
    said = first.group() if first else said.rpartition("=")[2]
    return re.sub(r"^\s*-\s+", "-", re.sub(r"\{,\}|\\[,!$%]", "", said))


_TIMES_TEN = re.compile(
    r"(?<![\w/.,])(\d[\d,]*(?:\.\d+)?|\.\d+)\s*(?:[×·x*]|\\times|\\cdot)\s*10"
    r"(?:\s*\^\s*\{?([-+]?\d{1,3})\}?|([⁺⁻]?[⁰¹²³⁴-⁹]{1,3}))(?![\d.]*\d)"
)
LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")


def _scaled(text: str) -> str:
    """5 × 10^3 → 5e3"""
    return _TIMES_TEN.sub(lambda found: f"{found[1]}e{(found[2] or found[3]).translate(LOWERED)}", text)


def _joined(digits: re.Match[str]) -> str:
    """1 234 567 → 1234567"""
    return re.sub(r"\D", "", digits[1])


def is_answer(text: str, kind: str) -> bool:
    """Whether a gold answer is of its kind: holds a number and no second one, a letter, yes or no."""
    if kind == "number":
        number = _number(_bare(text))
        if number is None or _value(number[0]) is None or re.search(r"\d\s*:\s*\d", text):  # a ratio or a time
            return False
        before, after = number[1], number[2].partition(" (")[0]
        rooted = re.search(r"(?:√|sqrt\W*)\Z", before)
        return not rooted and not _MAGNITUDE.match(after) and not _SECOND.search(f"{before} {after}")
    said = canonical(text, kind)
    if kind == "choice":
        return len(said) == 1 and said.isalpha()
    return said in ("yes", "no") if kind == "yesno" else bool(said)


# After a number, what makes it another one; and a second number, which no exponent or index of a unit is (cm^2, CO2).
_MAGNITUDE = re.compile(
    r"\^(?!\s*\{?\\circ)|e[-+]?\d|[⁰¹²³⁴-⁹⁺⁻!_]|x[\da-f]|k\b|\s*(?:pi\b|π|squared|cubed)"
    r"|[\s-]*(?:hundred|thousand|million|billion|trillion|dozen|tenth|hundredth|thousandth)s?\b",
    re.I,
)
_SECOND = re.compile(r"(?<![^\W\d]|[\d^])(?<![\^_]\{)\d")
_DROP = str.maketrans("", "", "$,%+ ")
_YESNO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}


def extract(text: str, kind: str, strict: bool) -> str | None:
    r"""The answer a generated text gives, or None.

    Strict: what the first ``#### …`` or "The answer is …" states (number: or else, math: first of all, the last
    ``\boxed{…}``), and only if it is of the kind. Flexible: that, or else what stands last in the text (the last
    number, letter, yes or no, formula, line); for numbers the last number in any case, as lm-eval's flexible-extract
    does; 1/2 and 2 1/2 are one number.
    """
    _check_kind(kind)
    if kind == "number":
        text = _scaled(text.replace("−", "-"))  # not –, which may stand between two
        if not strict:
            numbers = re.findall(_VALUE, text)
            return canonical(numbers[-1], kind) if numbers else None
        found = _first(rf"{_MARK}(?:\\boxed\{{|\\[(\[]|[$(*\s])*((?:-[ ])?{_VALUE})", text)
        if found is None and (box := _box(text)):
            found = box[2]
        number = _number(_bare(found)) if found else None
        return number[0] if number else None
    if kind == "choice":
        mark = rf"{_MARK}{_NO_WORD}(?i:(?:option|choice)\s+)?\(?"
        found = _first(rf"{mark}({_LETTER})\b(?!['’])", text)
        if found is None and (small := re.search(rf"{mark}([a-j])(?!\.[a-z])(?=[).:,]|\s*$|\s*\n)", text)):
            found = small[1].upper()  # "The answer is b.", where that is what the options are called
        if found or strict:
            return found
        if (box := _box(text)) and len(boxed := canonical(box[2], kind)) == 1:
            return boxed
        letters = re.findall(rf"\(({_LETTER})\)", text) or re.findall(
            rf"(?<![\w'’])({_LETTER})(?=[).:,]|\s*$|\s*\n)", text
        )
        return letters[-1] if letters else None
    if kind == "yesno":
        found = _first(rf"{_MARK}(yes|no|true|false)\b", text)
        if found is None and not strict:
            words = re.findall(r"\b(yes|no|true|false)\b", text, re.IGNORECASE)
            found = words[-1] if words else None
        return _YESNO[found.lower()] if found else None
    if kind == "math":
        box = _box(text)
        if box is not None:
            return box[2]
    found = _first(rf"{_MARK}((?:{_TITLE}|(?![.!?](?:\s|$))[^\n])+)", text)
    if found or strict:
        return clean(found) or None if found else None
    if kind == "math":
        formulas = re.findall(r"\$([^$\n]+)\$", text) or re.findall(_NUMBER, text)
        return formulas[-1].strip() if formulas else None
    lines = text.strip().splitlines()
    return clean(lines[-1]) or None if lines else None


_MARK = r"(?:####|\b[Aa]nswer(?:\s+is\b|\s*:)\s*:?|\bANSWER\s*:)[ \t]*\**\s*"


def _first(pattern: str, text: str) -> str | None:
    # Case counts in letters ("a" is a word) and not in yes and no.
    found = re.search(pattern, text, 0 if _LETTER in pattern else re.IGNORECASE)
    return found.group(1) if found else None


def same_answer(a: str, b: str, kind: str) -> bool:
    """Whether two answers are the same; for ``math``, `a` is the gold one.

    Numbers are compared by value without ``,`` ``$`` ``%`` and a trailing full stop (72.0 is 72, 0.5 is 1/2).

    Raises:
        UserError: an unknown kind, or math-verify is not installed.
    """
    _check_kind(kind)
    if kind == "math":
        return _same_math(a, b)
    a, b = canonical(a, kind), canonical(b, kind)
    if kind == "number":
        x, y = _value(a), _value(b)
        if x is not None and y is not None:
            return x == y
    return _plain(a) == _plain(b)


def _value(text: str) -> Fraction | None:
    numerator, slash, denominator = text.partition("/")
    try:
        value = Fraction(Decimal(numerator))
        return value / Fraction(Decimal(denominator)) if slash else value
    except (InvalidOperation, ZeroDivisionError, ValueError, OverflowError):
        return None


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).replace("’", "'").casefold().split()).rstrip(".")


def _same_math(gold: str, predicted: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError(
            "answers of kind 'math' are compared by math-verify, which is not installed: "
            "pip install math-verify, or use another answer kind"
        ) from None
    if _plain(gold) == _plain(predicted):
        return True
    # math-verify's time limit is a signal, which only the main thread may set.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    texts = (re.sub(r"\\\$", "", text) for text in (gold, predicted))  # of money: \$18.90
    formulas = (text if text.count("$") > 1 else f"${text.replace('$', '')}$" for text in texts)
    sides = [parse(formula, parsing_timeout=limit) for formula in formulas]
    return bool(verify(sides[0], sides[1], timeout_seconds=limit))


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise UserError(f"unknown answer kind {kind!r}: use one of {', '.join(KINDS)}{nearest(kind)}")


def nearest(kind: object) -> str:
    """ "; did you mean 'number'?" or nothing."""
    close = difflib.get_close_matches(str(kind), KINDS, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
