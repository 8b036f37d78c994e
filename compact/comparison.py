"""Runs side by side: what each reached, and the paired difference from the first, question by question."""

from __future__ import annotations

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

    Differences are paired: the mean over the questions that both runs answered, ± one standard error.
    Log-probabilities are means per token (natural logarithm), as in a run's report. A run is named by as much of the
    end of its path as tells it from the others.

    Raises:
        UserError: a folder without results after training, or no question in common.
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
                lines.append(
                    f"| {names.get(name, name)} | {' | '.join(_cells(name, result, reference, name == first))} |"
                )
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


def _cells(name: str, result: TaskResult, reference: TaskResult, is_reference: bool) -> list[str]:
    theirs = {question_of(row): row for row in reference.predictions}
    if not any(question_of(row) in theirs for row in result.predictions):
        raise UserError(
            f"task {result.name}: {name} and the first run have no question in common; compare runs with the same "
            "seed and the same data"
        )
    cells = []
    for measure in MEASURES.values():
        values = [value for row in result.predictions if (value := measure(row)) is not None]
        pairs = [(measure(row), measure(theirs[q])) for row in result.predictions if (q := question_of(row)) in theirs]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        cells += [_plus_minus(values), "" if is_reference else _plus_minus(differences, sign=True)]
    return cells


def _plus_minus(values: Sequence[float], sign: bool = False) -> str:
    middle, error = mean(values), standard_error(values)
    if middle is None:
        return "–"
    text = f"{middle:+.3f}" if sign else f"{middle:.3f}"
    return text if error is None else f"{text} ± {error:.3f}"
