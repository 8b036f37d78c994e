"""Runs side by side: what each reached, and the paired difference from the first, question by question."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compact.errors import UserError
from compact.results import TaskResult, load_results, question_of
from compact.statistics import mean, standard_error

Row = dict[str, Any]  # one prediction
MEASURES: dict[str, Callable[[Row], float | None]] = {
    "accuracy, %": lambda row: 100.0 * row["correct"],
    "log p of the answer": lambda row: row["answer_logprob"],
    "log p of the solution": lambda row: row["solution_logprob"],
}


def comparison(folders: Sequence[str | Path]) -> str:
    """A Markdown table a task: the results of finished runs, and their differences from the first one's.

    Differences are paired: the mean over the questions that both runs answered, ± one standard error, with their
    number where it is not the task's n. The same question has the same id and prompt; where none has, the same prompt.
    Log-probabilities are means per token (natural logarithm), as in a run's report. A run is named by as much of the
    end of its path as tells it from the others.

    Raises:
        UserError: a folder without results after training, or no question of any task in common.
    """
    results: dict[str, dict[str, TaskResult]] = {}
    for folder in folders:
        found, _ = load_results(folder, "after")
        if not found:
            raise UserError(f"{folder} holds no results after training: is it the folder of a finished run?")
        results[str(folder)] = found
    first = str(folders[0])
    base, _ = load_results(first, "before")
    names = _names(list(results))
    for name, found in results.items():
        shared = [task for task in found if task in results[first]]
        if shared and not any(_pairs(found[task], results[first][task]) for task in shared):
            raise UserError(
                f"{', '.join(shared)}: {names[name]} and {names[first]} have no question in common; compare runs with "
                "the same seed and the same data"
            )
    blocks = [
        f"Differences are from {names[first]}, question by question; ± is one standard error. log p: nats a token."
    ]
    for task, reference in results[first].items():
        n = len(reference.predictions)
        lines = [f"**{task}** ({reference.split}, n = {n})", ""]
        titles = [f"{name} | difference" for name in MEASURES]
        lines += [f"| run | {' | '.join(titles)} |", "| --- |" + " ---: |" * (2 * len(MEASURES))]
        contenders = {"before training": base.get(task)} | {name: found.get(task) for name, found in results.items()}
        for name, result in contenders.items():
            if result is not None:
                cells = _cells(result, reference, differ=name != first)
                lines.append(f"| {names.get(name, name)} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    for name in results:
        for has, lacks in ((name, first), (first, name)):
            if only := [task for task in results[has] if task not in results[lacks]]:
                blocks.append(f"{names[has]} was asked {', '.join(only)}, and {names[lacks]} was not.")
    return "\n\n".join(blocks)


def _names(folders: Sequence[str]) -> dict[str, str]:
    parts = {folder: Path(folder).absolute().parts for folder in folders}
    for count in range(1, max(map(len, parts.values())) + 1):
        names = {folder: "/".join(of[-count:]) for folder, of in parts.items()}
        if len(set(names.values())) == len(names):
            break
    return names


def _pairs(result: TaskResult, reference: TaskResult) -> list[tuple[Row, Row]]:
    """What both said to the questions that they share."""
    for key in (question_of, _prompt):
        ours, theirs = (_once(one.predictions, key) for one in (result, reference))
        if pairs := [(row, theirs[name]) for name, row in ours.items() if name in theirs]:
            return pairs
    return []


def _once(rows: Sequence[Row], key: Callable[[Row], object]) -> dict[object, Row]:
    """Rows by a name that no two of them have."""
    names = Counter(map(key, rows))
    return {name: row for row in rows if names[name := key(row)] == 1}


def _prompt(row: Row) -> object:
    """The same file has other ids in another form, or none."""
    return json.dumps(row["prompt"]) if row.get("prompt") else question_of(row)


def _cells(result: TaskResult, reference: TaskResult, differ: bool) -> list[str]:
    n, pairs, cells = len(reference.predictions), _pairs(result, reference), []
    for measure in MEASURES.values():
        values = [value for row in result.predictions if (value := measure(row)) is not None]
        both = [(measure(ours), measure(theirs)) for ours, theirs in pairs]
        differences = [a - b for a, b in both if a is not None and b is not None]
        cells += [_plus_minus(values, n), _plus_minus(differences, n, sign=True) if differ else ""]
    return cells


def _plus_minus(values: Sequence[float], n: int, sign: bool = False) -> str:
    middle, error = mean(values), standard_error(values)
    if middle is None:
        return "–"
    text = f"{middle:+.3f}" if sign else f"{middle:.3f}"
    text += "" if error is None else f" ± {error:.3f}"
    return text if len(values) == n else f"{text} (n = {len(values)})"
