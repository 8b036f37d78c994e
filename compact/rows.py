"""One row of a user's file: what it holds, and what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import ValuesView
from decimal import Decimal
from typing import Any

from compact.answers import GOLD, KINDS, is_answer, nearest


def row_id(row: Any) -> str | None:
    """The id as text; None where there is none. Whole floats are what Parquet makes of whole numbers with gaps."""
    value = row.get("id") if isinstance(row, dict) else None
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    return str(value).strip() or None


def row_key(row: Any) -> list[Any] | None:
    """What makes a row part of a question."""
    if (name := row_id(row)) is not None:
        return ["id", name]
    if isinstance(row, dict) and prompt_problem(row.get("prompt")) is None:
        return ["prompt", row["prompt"]]
    return None


def answer_text(value: Any) -> str | None:
    """An answer as text, from text, number or truth value; None where there is none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value.is_integer() else f"{Decimal(repr(value)):f}"  # not 5e-05
    if isinstance(value, int):
        return str(value)
    return (value.strip() or None) if isinstance(value, str) else None


def gold_text(value: Any) -> str | None:
    """A gold answer as text; in GSM8K's own form it stands after a solution: "… #### 72"."""
    text = answer_text(value)
    return text and (text.rpartition("####")[2].strip() or text)


def is_long(row: Any) -> bool:
    """Whether a row is one rationale (the long form) rather than one question."""
    return isinstance(row, dict) and row.get("rationales") is None and ("completion" in row or "teacher" in row)


def row_rationales(row: Any) -> list[Any]:
    """The rationales of a row of either form, unchecked."""
    if is_long(row):  # its 'answer' is the gold one
        return [{"teacher": row.get("teacher"), "completion": row.get("completion")}]
    entries = row.get("rationales") if isinstance(row, dict) else None
    return entries if isinstance(entries, list) else []


def question_problem(rows: list[Any], default_kind: str) -> tuple[tuple[str, str] | None, str]:
    """Why a question's rows cannot be used (reason, detail), or None; and the kind of its answer."""
    if not isinstance(rows[0], dict):
        return ("the row is not a JSON object", ""), default_kind
    problems = [prompt_problem(row.get("prompt")) for row in rows]
    if None not in problems:
        hint = "; rename field 'question'" if all("question" in row and "prompt" not in row for row in rows) else ""
        return (problems[0][0] + hint, problems[0][1]), default_kind  # type: ignore[index]
    kind = next((row["task"] for row in rows if row.get("task") is not None), default_kind)
    if kind not in KINDS:
        return ("field 'task' is unknown:", f"{kind!r}, not one of {', '.join(KINDS)}{nearest(kind)}"), default_kind
    answer = next((text for row in rows if (text := gold_text(row.get("answer"))) is not None), None)
    if answer is None:
        return ("field 'answer' is missing or empty", ""), kind
    if not is_answer(answer, kind):
        detail = f"{answer!r} is no {kind} (data.answer_kind, or 'task'), which is {GOLD[kind]}"
        return ("field 'answer' is not of its kind:", detail), kind
    return None, kind


def unseen_options(rows: list[Any], prompt: Any) -> str:
    """The first choice that a question's row has and its prompt does not show: '(text)', or nothing."""
    shown = prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)
    for row in rows:
        options = row.get("options") or row.get("choices") or ()
        if isinstance(options, dict):
            options = options.get("text", options.values())
        for text in options if isinstance(options, (list, tuple, ValuesView)) else ():
            if isinstance(text, str) and text not in shown:
                return f"({text})"
    return ""


def prompt_problem(prompt: Any) -> tuple[str, str] | None:
    """Why this is no prompt (reason, detail), or None."""
    if isinstance(prompt, str) and prompt.strip():
        return None
    if isinstance(prompt, list) and prompt:
        for number, message in enumerate(prompt, 1):
            if problem := _message_problem(message):
                return problem[0], f"{problem[1]} (message {number})"
        if prompt[-1]["role"] == "assistant":
            return "field 'prompt' ends in a message of the assistant; the rationale is what it says next", ""
        return None
    return "field 'prompt' is missing, empty or no text", ""


def _message_problem(message: Any) -> tuple[str, str] | None:
    message = message if isinstance(message, dict) else {}
    if {"from", "value"} <= message.keys():
        renamed = "rename 'from' to 'role' (human to user, gpt to assistant) and 'value' to 'content'"
        return f"field 'prompt' has messages in ShareGPT's form: {renamed}", ""
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else part
            return "field 'prompt' has a part that is no text:", f"{kind!r}"
    for name, text in (("role", message.get("role")), ("content", _joined(content))):
        if not isinstance(text, str) or not text.strip():
            return "field 'prompt' has a message without", f"'{name}'"
    return None


def _joined(content: Any) -> Any:
    """A message's text; OpenAI's form has a list of parts, [{"type": "text", "text": …}, …]."""
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content


def clean_prompt(prompt: Any) -> str | list[dict[str, str]]:
    """A prompt without problem: text, or messages without whatever else their rows hold, each one text."""
    if isinstance(prompt, str):
        return prompt
    return [{"role": message["role"], "content": _joined(message["content"])} for message in prompt]
