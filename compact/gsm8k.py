"""python -m compact.gsm8k SOURCE OUT.jsonl [--seed N] [--limit N]: GSM8K solutions → questions with four teachers.

SOURCE is GSM8K in its upstream form, ``{"question", "answer": "…<<3*12=36>>36 eggs.\\n#### 36"}``, or rows ``{"id",
"question", "solution", "paragraph"?, "answer"}``, as JSON Lines or Parquet. The teachers:

* ``human``: the solution, without the calculator notes,
* ``paragraph``: the same as one paragraph,
* ``equations``: nothing but the notes' equations, one a line,
* ``slip``: the solution with a declared slip, carried through to a wrong answer (:mod:`compact.slips`). It is the
  misleading teacher: its ``answer`` is the wrong one, and its ``slip`` says what was changed.

A teacher that a row does not allow (no notes, no note that gives the answer) is absent and counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compact.answers import same_answer
from compact.commandline import positive
from compact.errors import UserError
from compact.slips import NOTE, slip
from compact.sources import cache_folder, open_source

TEACHERS = ("human", "paragraph", "equations", "slip")


def convert(row: dict[str, Any], seed: int, identifier: str) -> dict[str, Any]:
    """One question in the format of :mod:`compact.data`; a teacher it does not allow is left out.

    Args:
        identifier: the id of a row that has none; together with `seed` it decides the slip.

    Raises:
        UserError: the row is not one of GSM8K's, with the field that is missing.
    """
    question = row.get("question")
    upstream = "solution" not in row
    solution = row.get("answer" if upstream else "solution")
    if not isinstance(question, str) or not question.strip():
        raise UserError("field 'question' is missing or empty")
    if not isinstance(solution, str) or "####" not in solution:
        field = "answer" if upstream else "solution"
        raise UserError(f"field '{field}' holds no worked solution that ends in '#### answer'")
    steps, _, end = solution.rpartition("####")
    answer = end.strip().replace(",", "") if upstream else str(row.get("answer") or end.strip()).replace(",", "")
    identifier = str(row.get("id") or identifier)
    rationales: list[dict[str, Any]] = [
        {"teacher": "human", "completion": without_notes(solution)},
        {"teacher": "paragraph", "completion": row.get("paragraph") or one_paragraph(steps, answer)},
    ]
    equations = [f"{expression.strip()} = {result.strip()}" for expression, result in NOTE.findall(steps)]
    if equations:
        rationales.append({"teacher": "equations", "completion": "\n".join([*equations, f"#### {answer}"])})
    slipped = slip(question, f"{steps}#### {answer}", random.Random(f"{seed} {identifier}"))
    if slipped is not None and not same_answer(answer, slipped.answer, "number"):
        rationales.append(
            {
                "teacher": "slip",
                "completion": without_notes(slipped.text),
                "answer": slipped.answer,
                "slip": {
                    "kind": slipped.kind,
                    "note": slipped.note,
                    "before": slipped.before,
                    "after": slipped.after,
                    "carried": slipped.carried,
                },
            }
        )
    return {"id": identifier, "prompt": question, "answer": answer, "task": "number", "rationales": rationales}


def without_notes(solution: str) -> str:
    return re.sub(r"<<[^<>]*>>", "", solution).strip()


def one_paragraph(steps: str, answer: str) -> str:
    """The steps as sentences of one paragraph, closing in words."""
    lines = [line.strip() for line in without_notes(steps).splitlines() if line.strip()]
    sentences = [line if line[-1] in ".!?:;," else f"{line}." for line in lines]
    return " ".join([*sentences, f"So the answer is {answer}."])


def convert_file(source: str, out: str, *, seed: int = 0, limit: int | None = None) -> dict[str, Any]:
    """Convert a file; returns the summary: questions, refused (with reasons), absent teachers, slips by kind.

    Raises:
        UserError: the source cannot be read, holds no row of GSM8K, or `out` is the source.
    """
    target = Path(out)
    if Path(source).exists() and target.exists() and Path(source).samefile(target):
        raise UserError(f"{out}: the converted file would take the place of its source; give it another name")
    present: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    refused: list[str] = []
    carried = 0

    def questions() -> Iterator[dict[str, Any]]:
        nonlocal carried
        rows = open_source(source, cache_folder(None))
        for index, row in enumerate(rows.rows()):
            if limit is not None and present["questions"] == limit:
                return
            try:
                if not isinstance(row, dict):
                    raise UserError("the row is not a JSON object")
                question = convert(row, seed, f"gsm8k-{index + 1}")
            except UserError as error:
                refused.append(f"{rows.place(index)}: {error}")
                continue
            present["questions"] += 1
            for rationale in question["rationales"]:
                present[rationale["teacher"]] += 1
                if "slip" in rationale:
                    kinds[rationale["slip"]["kind"]] += 1
                    carried += rationale["slip"]["carried"] > 0
            yield question

    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with aside.open("w", encoding="utf-8") as file:
            for question in questions():
                file.write(json.dumps(question, ensure_ascii=False) + "\n")
        if not present["questions"]:
            raise UserError(f"{source}: no row of GSM8K in it. " + ("; ".join(refused[:3]) or "It is empty."))
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return {
        "questions": present["questions"],
        "refused": refused,
        "absent": {name: present["questions"] - present[name] for name in TEACHERS},
        "slips": dict(sorted(kinds.items())),
        "slips_carried": carried,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m compact.gsm8k", description="GSM8K → questions with four teachers"
    )
    parser.add_argument("source", help="GSM8K as .jsonl or .parquet")
    parser.add_argument("out", help="the converted file, .jsonl")
    parser.add_argument("--seed", type=int, default=0, help="decides the slips (default: 0)")
    parser.add_argument("--limit", type=positive, help="stop after so many questions")
    given = parser.parse_args(arguments)
    try:
        summary = convert_file(given.source, given.out, seed=given.seed, limit=given.limit)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{given.out}: {summary['questions']:,} questions, seed {given.seed}")
    print("  slips: " + ", ".join(f"{count:,} {kind}" for kind, count in summary["slips"].items()))
    print(f"  of them carried through later steps: {summary['slips_carried']:,}")
    print("  absent teachers: " + ", ".join(f"{name} {count:,}" for name, count in summary["absent"].items() if count))
    print(f"  refused rows: {len(summary['refused']):,}")
    for reason in summary["refused"][:5]:
        print(f"    {reason}")


if __name__ == "__main__":
    main()
