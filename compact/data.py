"""Questions with their rationales: read, checked, grouped, split.

One row a question, ``{"id", "prompt": str | messages, "answer", "rationales": [{"teacher", "completion", "answer"?},
…], "task"?}``, or the long form, one row a rationale: ``{"prompt", "completion", "teacher", "answer", "id"?}``,
grouped by id (by prompt where there is none), in whatever order the rows come; what a row of a question leaves out is
taken from its other rows. ``task`` says how answers are compared. A rationale's ``answer`` is the one that its teacher
gave; without it, the completion's closing statement tells.

What happens to bad input:

* It stops, with a :class:`compact.errors.UserError` that names file, line, field and way out, where the file is
  damaged or contradicts itself: nothing there, broken JSON, one id with two prompts or answers, a teacher twice for
  one question, no usable row at all.
* A row or rationale that alone is unusable (empty or missing field, unknown task) is refused, and the
  :class:`DataReport` counts it and says where and why. Copies of a row are refused likewise.
* A wrong or unrecognised answer of a rationale is flagged and counted; a question with none but wrong ones stays.

An empty body (a completion that is only "#### 72") is a rationale: that teacher gives the bare answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from array import array
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from compact.answers import KINDS, LOWERED, canonical, is_answer, nearest, same_answer, strip_closing
from compact.data_report import DataReport
from compact.errors import UserError
from compact.files import digest, write_atomically
from compact.rows import (
    answer_text,
    clean_prompt,
    gold_text,
    is_long,
    prompt_problem,
    question_problem,
    row_id,
    row_key,
    row_rationales,
    unseen_options,
)
from compact.sources import Source, cache_folder, open_source, write_arrow
from compact.tokenization import tokenize_questions

__all__ = ["DataReport", "load_questions", "prompt_of", "prompt_text", "question_text", "split", "tokenize_questions"]

_EXPONENT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")

_FORMAT = 2  # raise it when the columns or their meaning change, so that no old cache is read

QUESTIONS = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),  # text, or messages as JSON
        ("is_messages", pa.bool_()),
        ("answer", pa.string()),
        ("kind", pa.string()),
        (
            "rationales",
            pa.list_(
                pa.struct(
                    [
                        ("teacher", pa.string()),
                        ("body", pa.string()),
                        ("answer", pa.string()),  # what the teacher answered; null: not known
                        ("wrong", pa.bool_()),
                        ("recognised", pa.bool_()),  # a closing statement was found
                    ]
                )
            ),
        ),
    ]
)


def load_questions(
    source: str | os.PathLike[str] | datasets.Dataset,
    *,
    answer_kind: str = "number",
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[datasets.Dataset, DataReport]:
    """Read questions into a memory-mapped dataset with the columns of :data:`QUESTIONS`.

    Args:
        source: .jsonl, .parquet, the folder of a saved dataset, a hub id, or a datasets.Dataset.
        answer_kind: how answers are compared in rows without a ``task``.
        cache_dir: where the Arrow files go; they are named by the source's content, so a changed source is read anew
            and an unchanged one is not. Default: a folder that is removed when the process ends.

    Raises:
        UserError: see the module.
    """
    if answer_kind not in KINDS:
        raise UserError(f"data.answer_kind: {answer_kind!r} is none of {', '.join(KINDS)}{nearest(answer_kind)}")
    folder = cache_folder(cache_dir)
    rows = open_source(source, folder)
    key = digest([_FORMAT, rows.digest(), answer_kind])
    name = hashlib.blake2b(rows.name.encode(), digest_size=8).hexdigest()  # which the report's places begin with
    target, report_file = folder / f"questions-{key}.arrow", folder / f"questions-{key}-{name}.json"
    if not (target.exists() and report_file.exists()):
        report = DataReport()
        reader = _Reader(rows, answer_kind, report)
        write_arrow(target, QUESTIONS, _batches(reader.questions()))
        rows.close()
        write_atomically(report_file, json.dumps(report.to_dict()))
    report = DataReport(**json.loads(report_file.read_text()))
    if not report.questions["used"]:
        what = report.summary() if report.questions["read"] else "it has no rows"
        raise UserError(
            f"{rows.name}: no usable question. {what}\nA row looks like this: "
            '{"id": "1", "prompt": "…", "answer": "72", "rationales": [{"teacher": "a", "completion": "…"}]}'
        )
    return datasets.Dataset.from_file(str(target)), report


def _batches(questions: Iterator[dict[str, Any]], size: int = 500) -> Iterator[pa.RecordBatch]:
    block: list[dict[str, Any]] = []
    for question in questions:
        block.append(question)
        if len(block) == size:
            yield pa.RecordBatch.from_pylist(block, schema=QUESTIONS)
            block = []
    if block:
        yield pa.RecordBatch.from_pylist(block, schema=QUESTIONS)


class _Reader:
    """Two passes over a source: the first indexes the rows by question, the second reads a question at a time."""

    def __init__(self, source: Source, kind: str, report: DataReport):
        self.source, self.kind, self.report = source, kind, report
        self.seen_teachers: set[str] = set()

    def questions(self) -> Iterator[dict[str, Any]]:
        hashes = array("Q")  # one number a row is all that is held of a file
        for row in tqdm(self.source.rows(), desc="Indexing questions", unit=" rows", disable=None):
            text = json.dumps(row_key(row) or ["row", len(hashes)])
            hashes.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
        keys = np.frombuffer(hashes, dtype=np.uint64) if hashes else np.empty(0, np.uint64)
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(keys[order]) != 0]) if len(keys) else np.empty(0, np.int64)
        ends = np.r_[starts[1:], len(keys)]
        by_appearance = np.argsort(order[starts])
        for first in tqdm(by_appearance, desc="Reading questions", unit=" questions", disable=None):
            group = order[starts[first] : ends[first]]
            by_key: dict[str, list[tuple[int, Any]]] = {}  # more than one only where two hashes collide
            for index in group.tolist():
                row = self.source[index]
                by_key.setdefault(json.dumps(row_key(row)), []).append((index, row))
            for members in by_key.values():
                self.report.questions["read"] += 1
                question = self._question(members)
                if question is not None:
                    self.report.questions["used"] += 1
                    yield question

    def _question(self, members: list[tuple[int, Any]]) -> dict[str, Any] | None:
        report, place = self.report, self.source.place(members[0][0])
        members = self._without_copies(members)
        rows = [row for _, row in members]
        rationales = [(index, entry) for index, row in members for entry in row_rationales(row)]
        report.rationales["read"] += len(rationales)
        problem, kind = question_problem(rows, self.kind)
        if problem:
            report.refuse_question(place, *problem, rationales=len(rationales))
            return None
        given = next(row["prompt"] for row in rows if prompt_problem(row.get("prompt")) is None)
        prompt = clean_prompt(given)
        answer = next(answer for row in rows if (answer := gold_text(row.get("answer"))) is not None)
        self._check_agreement(members, prompt, answer, kind)
        if unseen := unseen_options(rows, prompt):
            report.because(place, "field 'options' is not read in training: write the choices into 'prompt'", unseen)
        parsed = self._parsed(rationales, answer, kind, row_id(rows[0]))
        if not parsed:
            report.refuse_question(place, "field 'rationales' is missing or empty, or none of them is usable")
            return None
        report.questions["all_wrong"] += all(rationale["wrong"] for rationale in parsed)
        report.rationales["used"] += len(parsed)
        return {
            "id": row_id(rows[0]) or f"q-{hashlib.sha1(json.dumps(given).encode()).hexdigest()[:16]}",
            "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False),
            "is_messages": not isinstance(prompt, str),
            "answer": answer,
            "kind": kind,
            "rationales": parsed,
        }

    def _without_copies(self, members: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
        """Refuse rows that repeat another one exactly: a file put together twice."""
        if len(members) == 1:
            return members
        kept: list[tuple[int, Any]] = []
        first: dict[str, int] = {}
        for index, row in members:
            text = json.dumps(row, sort_keys=True, default=str)
            if text in first:
                count = len(row_rationales(row))
                self.report.rationales["read"] += count
                self.report.rationales["refused"] += count
                original = self.source.place(first[text])
                self.report.because(self.source.place(index), "copy of another row", f"({original})")
            else:
                first[text] = index
                kept.append((index, row))
        return kept

    def _check_agreement(self, members: list[tuple[int, Any]], prompt: Any, answer: str, kind: str) -> None:
        index, row = members[0]
        name = f"id {row_id(row)!r}" if row_id(row) else "the same prompt (and no id)"
        for other_index, other in members[1:]:
            where = f"{self.source.place(index)} and {self.source.place(other_index)}"
            if not (is_long(row) and is_long(other)):
                raise UserError(
                    f"{where}: two rows for one question, {name}; give every question its own 'id' and one row, "
                    "or one row a rationale, with the fields 'teacher' and 'completion'"
                )
            if prompt_problem(other.get("prompt")) is None and clean_prompt(other["prompt"]) != prompt:
                raise UserError(
                    f"{where}: {name} with two prompts; give every question its own 'id' (or leave the ids out)"
                )
            given = gold_text(other.get("answer"))
            if given is not None and given != answer and not same_answer(answer, given, kind):
                raise UserError(
                    f"{where}: {name} with two answers, {answer!r} and {given!r}; 'answer' is the correct one and the "
                    "same in all rows of a question, what a teacher answered stays in its 'completion'"
                )

    def _parsed(
        self, rationales: list[tuple[int, Any]], gold: str, kind: str, name: str | None
    ) -> list[dict[str, Any]]:
        report, parsed, where = self.report, [], dict[str, int]()
        for number, (index, entry) in enumerate(rationales, 1):
            place = f"{self.source.place(index)}, rationale {number}"
            if not isinstance(entry, dict):
                report.refuse_rationale(place, "the rationale is not a JSON object")
                continue
            teacher, completion = entry.get("teacher"), entry.get("completion")
            if not isinstance(teacher, str) or not teacher.strip():
                report.refuse_rationale(place, "field 'teacher' is missing, empty or no text")
                continue
            if teacher in where:
                raise UserError(
                    f"{place}: teacher {teacher!r} a second time for one question (first at "
                    f"{self.source.place(where[teacher])}, id {name!r}); keep one of them, or tell them apart as "
                    f"{teacher + '-1'!r} and {teacher + '-2'!r}"
                )
            where[teacher] = index
            if not isinstance(completion, str) or not completion.strip():
                report.refuse_rationale(place, "field 'completion' is missing, empty or no text")
                continue
            body, stated, recognised = strip_closing(completion)
            own = answer_text(entry.get("answer")) or stated
            own = None if own is None else canonical(own, kind) or None
            if kind == "choice" and own and not is_answer(own, kind):  # an option's text may be the right one's
                report.because(place, "a stated answer without a letter, which counts as unknown:", f"{own!r}")
                own = None
            wrong = own is not None and not same_answer(gold, own, kind)
            if teacher not in self.seen_teachers:
                self.seen_teachers.add(teacher)
                report.teachers.append(teacher)
            report.rationales["wrong"] += wrong
            report.rationales["unrecognised_closings"] += not recognised
            parsed.append({"teacher": teacher, "body": body, "answer": own, "wrong": wrong, "recognised": recognised})
        return parsed


def prompt_of(row: dict[str, Any]) -> str | list[dict[str, str]]:
    """The prompt of a loaded question: text, or messages."""
    return json.loads(row["prompt"]) if row["is_messages"] else row["prompt"]


def question_text(row: dict[str, Any]) -> str:
    """What makes two questions the same question: the text up to case, spacing and Unicode form.

    What a system's message says to all questions is no part of it: one file has that, another has not.
    """
    prompt = prompt_of(row)
    asked = prompt if isinstance(prompt, str) else [message for message in prompt if message["role"] != "system"]
    return prompt_text(asked or prompt)


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
    """The text of a prompt up to case, spacing and Unicode form; an exponent stays one, as 3² is not 32."""
    return _folded(_EXPONENT.sub(lambda found: "^" + found[0].translate(LOWERED), _joined(prompt)))


def _joined(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def split(dataset: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and held-out questions, by question text: two ids that share a question land on the same side.

    `fraction` of the different texts is held out, at least one of them if `fraction` > 0 and there are two, never all.
    Which ones depends on `seed` and on the texts alone, not on the rows' order.

    Raises:
        UserError: `fraction` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UserError(f"data.holdout: {fraction} is not in [0, 1); it is the share of the questions held out")
    rows = dataset.select_columns(["prompt", "is_messages"])
    keys = (f"{seed}\0{question_text(row)}".encode() for row in rows)
    hashes = np.fromiter(
        (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") for key in keys),
        dtype=np.uint64,
        count=len(dataset),
    )
    texts = np.unique(hashes)
    held = min(len(texts) - 1, max(1, round(fraction * len(texts)))) if fraction and len(texts) else 0
    chosen = np.isin(hashes, texts[:held])
    return dataset.select(np.flatnonzero(~chosen)), dataset.select(np.flatnonzero(chosen))
