"""Tasks: questions with checkable answers, read from files or taken from the held-out part of the training data."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compact.answers import GOLD, KINDS, is_answer, strip_closing
from compact.data import prompt_of
from compact.errors import UserError
from compact.results import SPLITS
from compact.rows import answer_text, clean_prompt, prompt_problem, row_id
from compact.sources import JsonLines

# Put after a prompt so that a model that was not trained on the task knows in what form to answer.
INSTRUCTIONS = {
    "number": 'Think step by step, then end with "The answer is N." where N is a number.',
    "choice": 'Think step by step, then end with "The answer is X." where X is the letter of the right option.',
    "yesno": 'Think step by step, then end with "The answer is yes." or "The answer is no."',
    "math": 'Think step by step, then end with "The answer is X."',
    "text": 'Think step by step, then end with "The answer is X."',
}

_NUMBER = re.compile(r"[-+]?\$?(\d[\d,]*(\.\d+)?|\.\d+)([eE][-+]?\d+)?(( \d+)?/\d+)?%?")
_LETTER = re.compile(r"\(?[A-J]\)?")
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator notes, which nobody reads aloud
_YES_NO = {"yes", "no", "true", "false"}


@dataclass(frozen=True)
class TaskRow:
    """One question of a task."""

    id: str
    prompt: str | list[dict[str, str]]  # as it is rendered: options and instruction included
    answer: str
    kind: str
    solution: str | None = None  # a reference rationale without its closing statement, where there is one
    options: int = 0  # how many options a choice question offers; 2 for yes or no; 0: not such a question


@dataclass(frozen=True)
class Task:
    name: str
    rows: tuple[TaskRow, ...]
    split: str = "ood"  # id | ood | forgetting
    kind_source: str = "told"  # "told", or "guessed from the answers"

    @property
    def kind(self) -> str:
        """The kind of the answers; "mixed" where rows differ."""
        kinds = {row.kind for row in self.rows}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    def __str__(self) -> str:
        return f"{self.name}: {len(self.rows)} questions, answers of kind {self.kind} ({self.kind_source})"


def load_task(
    name: str,
    path: str | Path,
    *,
    split: str = "ood",
    limit: int | None = None,
    seed: int = 0,
    instruct: bool = True,
) -> Task:
    """Read a task from a file of JSON lines (or Parquet).

    A row has a `prompt` (a string or messages) or a `question`; an `answer`; where it is a choice, `options`: {A:
    text, …} or a list of texts; and, if it likes, `id`, `task` (the kind), `solution` or `explanation` (a reference
    rationale), and `instruct`: false where the prompt is in the training's form and is to be asked as it is. The kind
    of a row without `task` is guessed from all answers.

    Args:
        limit: at most so many questions, drawn with `seed`; the file's order is kept.
        instruct: put INSTRUCTIONS[kind] after the prompt.

    Raises:
        UserError: naming the file, the line and the field.
    """
    path = Path(path)
    records = list(_read(name, path))
    if not records:
        raise UserError(f"task {name}: {path} holds no questions")
    answers = [_answer(record, f"{path}:{line}") for line, record in records]
    have_options = any(record.get("options") or record.get("choices") for _, record in records)
    guess = _guess_kind([answer for answer, _ in answers], have_options)
    rows, seen = [], dict[str, int]()
    for (line, record), (answer, solution) in zip(records, answers):
        row = _row(name, record, answer, solution, record.get("task") or guess, f"{path}:{line}", line)
        if row.id in seen:
            raise UserError(f"{path}:{line}: id {row.id!r} is also on line {seen[row.id]}; ids must differ")
        seen[row.id] = line
        rows.append(row)
    every_row_says = all(record.get("task") for _, record in records)
    source = "told" if every_row_says else "guessed from the answers"
    bare = {row.id for row, (_, record) in zip(rows, records) if record.get("instruct") is False}
    return _task(name, rows, split, source, limit, seed, instruct, bare)


def task_from_questions(
    name: str,
    questions: Any,
    *,
    limit: int | None = None,
    seed: int = 0,
    reference: str | None = None,
) -> Task:
    """A task from questions as :func:`compact.data.load_questions` gives them: the held-out ones.

    No instruction is put after the prompt: the student was trained on it as it is. `reference`: the teacher whose
    rationale is the reference solution.
    """
    rows = []
    chosen: Iterable[int] = range(len(questions))
    if limit is not None and limit < len(questions):  # before the rows are made: there may be many
        chosen = sorted(random.Random(seed).sample(range(len(questions)), limit))
    for number, question in enumerate((questions[index] for index in chosen), 1):
        record = {**question, "prompt": prompt_of(dict(question))}
        answer, solution = _answer(record, f"{name}:{number}")
        rows.append(_row(name, record, answer, solution, record["kind"], f"{name}:{number}", number, reference))
    return _task(name, rows, "id", "told", limit, seed, instruct=False)


def _task(
    name: str,
    rows: list[TaskRow],
    split: str,
    source: str,
    limit: int | None,
    seed: int,
    instruct: bool,
    bare: Set[str] = frozenset(),
) -> Task:
    if split not in SPLITS:
        raise UserError(f"task {name}: split {split!r} is none of {', '.join(SPLITS)}")
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]
    if instruct:
        rows = [
            row if row.id in bare else replace(row, prompt=_append(row.prompt, INSTRUCTIONS[row.kind])) for row in rows
        ]
    return Task(name, tuple(rows), split, source)


def _read(name: str, path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """(line number, record) of every row of a file."""
    if not path.is_file():
        raise UserError(f"task {name}: there is no file {path}; mend its path under evaluation in the recipe")
    if path.suffix in (".parquet", ".pq"):
        from pyarrow import parquet

        yield from enumerate(parquet.read_table(path).to_pylist(), 1)
        return
    source = JsonLines(path)
    for index, record in enumerate(source.rows()):
        if not isinstance(record, dict):
            raise UserError(f"{source.place(index)}: a {type(record).__name__}; one JSON object a line is expected")
        yield source.line(index), record


def _answer(record: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """The gold answer as text, and the solution that stands before it in GSM8K's upstream form ("… #### 72")."""
    answer = record.get("answer", record.get("answerKey"))
    if answer is None or not str(answer).strip():
        raise UserError(f"{where}: field 'answer' is missing or empty; every question needs its gold answer")
    if isinstance(answer, (bool, int, float)):
        if (text := answer_text(answer)) is None:
            raise UserError(f"{where}: field 'answer' is {answer}; every question needs its gold answer")
        return text, None
    if not isinstance(answer, str):
        kind = type(answer).__name__
        raise UserError(f"{where}: field 'answer' is a {kind}; every question needs one gold answer, text or a number")
    solution, mark, short = answer.rpartition("####")
    if not short.strip():
        raise UserError(f"{where}: field 'answer' has nothing after ####; every question needs its gold answer")
    return short.strip(), (solution.strip() if mark else None)


def _row(
    name: str,
    record: Mapping[str, Any],
    answer: str,
    solution: str | None,
    kind: str,
    where: str,
    number: int,
    reference: str | None = None,
) -> TaskRow:
    prompt = record.get("prompt") or record.get("question")
    if isinstance(prompt, list):
        if problem := prompt_problem(prompt):
            raise UserError(f"{where}: {' '.join(problem)}; messages are {{role, content}}, each a text")
        prompt = clean_prompt(prompt)
    elif not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: field 'prompt' (or 'question') is missing or empty")
    if kind not in KINDS:
        raise UserError(f"{where}: field 'task' is {kind!r}, none of {', '.join(KINDS)}")
    options = _options(record, where)
    if not (options and kind == "choice") and not is_answer(answer, kind):
        known = f"none of kind {kind}, which is {GOLD[kind]}"
        raise UserError(f"{where}: the answer {answer!r} is {known}; field 'task' says which kind it is")
    if options:
        if answer not in options and kind == "choice":
            raise UserError(f"{where}: the answer {answer!r} is none of the options {', '.join(options)}")
        if kind == "choice" and not all(_LETTER.fullmatch(label) for label in options):  # ARC's 1, 2, 3, 4
            if len(options) > 10:
                raise UserError(f"{where}: {len(options)} options; at most 10, A to J, can be told apart")
            place = list(options).index(answer)
            options = _lettered(options.values())
            answer = list(options)[place]
        prompt = _append(prompt, "\n".join(f"{letter}) {text}" for letter, text in options.items()))
    solution = record.get("solution") or record.get("explanation") or solution
    if reference is not None:
        by_teacher = {r["teacher"]: r.get("body") or r.get("completion") for r in record.get("rationales") or []}
        solution = by_teacher.get(reference)
    if solution is not None:
        if not isinstance(solution, str):
            raise UserError(f"{where}: field 'solution' (or 'explanation') is a {type(solution).__name__}; it is text")
        solution = strip_closing(_CALCULATOR.sub("", solution))[0].strip() or None
    return TaskRow(
        id=row_id(record) or f"{name}-{number}",
        prompt=prompt,
        answer=answer,
        kind=kind,
        solution=solution,
        options=len(options) or {"yesno": 2}.get(kind, 0),
    )


def _lettered(texts: Iterable[Any]) -> dict[str, str]:
    """A, B, C, …: the texts."""
    return {chr(ord("A") + i): str(text) for i, text in enumerate(texts)}


def _options(record: Mapping[str, Any], where: str) -> dict[str, str]:
    options = record.get("options") or record.get("choices") or {}
    if isinstance(options, list):
        return _lettered(options)
    if not isinstance(options, dict):
        raise UserError(f"{where}: field 'options' is a {type(options).__name__}; {{A: text, …}} or a list is needed")
    if options.keys() == {"label", "text"} and all(isinstance(part, list) for part in options.values()):  # CSQA's
        return dict(zip(options["label"], options["text"]))
    return {letter: text for letter, text in options.items() if text is not None}


def _append(prompt: str | list[dict[str, str]], text: str) -> str | list[dict[str, str]]:
    """Text after a prompt; after the last message where the prompt is messages."""
    if isinstance(prompt, str):
        return f"{prompt}\n{text}"
    return [*prompt[:-1], {**prompt[-1], "content": f"{prompt[-1]['content']}\n{text}"}]


def _guess_kind(answers: list[str], have_options: bool) -> str:
    if have_options or all(_LETTER.fullmatch(answer) for answer in answers):
        return "choice"
    if all(answer.lower() in _YES_NO for answer in answers):
        return "yesno"
    if all(_NUMBER.fullmatch(answer) for answer in answers):
        return "number"
    return "text"
