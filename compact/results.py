"""Results of an evaluation: accuracies with their errors, what was forgotten, how they are kept in a run's folder."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compact.errors import UserError
from compact.files import write_atomically
from compact.statistics import binomial_error, mcnemar, mean, standard_error, wilson

# What a task is beside the training, and how it is called in tables and pictures.
SPLITS = {"id": "in distribution", "ood": "out of distribution", "forgetting": "not trained on"}


@dataclass
class TaskResult:
    """What a model did on a task. `predictions` has one row a question, in the task's order."""

    name: str
    split: str
    kind: str
    predictions: list[dict[str, Any]] = field(repr=False)
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """Share of right answers, read flexibly."""
        return sum(row["correct"] for row in self.predictions) / len(self.predictions)

    def summary(self) -> dict[str, Any]:
        """Numbers alone: accuracies with binomial standard errors, mean log-probabilities with theirs.

        Means over no questions are None. A standard error of 0 at an accuracy of 0 or 1 only says that n is too
        small to see the difference: the 95% interval (Wilson) is given beside it.
        """
        n = len(self.predictions)
        out: dict[str, Any] = {"split": self.split, "kind": self.kind, "n": n, "seconds": round(self.seconds, 3)}
        for name, key in (("flexible", "correct"), ("strict", "strict_correct")):
            right = sum(row[key] for row in self.predictions)
            error = binomial_error(right, n)
            out[name] = {"accuracy": right / n, "standard_error": error, "interval": wilson(right, n)}
        out.update(accuracy=out["flexible"]["accuracy"], standard_error=out["flexible"]["standard_error"])
        for key in ("answer_logprob", "suffix_logprob", "solution_logprob"):
            values = [row[key] for row in self.predictions if row.get(key) is not None]
            out[key] = {"mean": mean(values), "standard_error": standard_error(values), "n": len(values)}
        out["finished"] = mean([row["finished"] for row in self.predictions])  # share that stopped by itself
        out["tokens"] = mean([row["tokens"] for row in self.predictions])  # mean length of an answer
        return out


def question_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """What a prediction answers. Ids such as 1, 2, 3 may be those of other questions elsewhere."""
    return row["id"], json.dumps(row.get("prompt"))


def compare(before: TaskResult, after: TaskResult) -> dict[str, Any]:
    """Item by item what was forgotten (right before, wrong after) and gained (the other way round).

    `change` is the difference of the accuracies with the standard error of paired answers; `p_value` is McNemar's
    exact test. Choice and yes/no questions are also hit by luck: `forgotten_by_luck` and `gained_by_luck` are the
    flips to be expected if every answer not known were a fresh, even guess among the options (an upper bound for a
    greedy model, whose guesses repeat).

    Raises:
        ValueError: the results are not about the same questions.
    """
    questions = [{question_of(row) for row in result.predictions} for result in (before, after)]
    if missing := sorted(questions[0] ^ questions[1]):
        raise ValueError(
            f"task {before.name}: {len(missing)} questions are in one result only, such as {missing[0][0]!r}"
        )
    first = {row["id"]: row for row in before.predictions}
    second = {row["id"]: row for row in after.predictions}
    forgotten = [i for i in first if first[i]["correct"] and not second[i]["correct"]]
    gained = [i for i in first if not first[i]["correct"] and second[i]["correct"]]
    n, lost, won = len(first), len(forgotten), len(gained)
    out: dict[str, Any] = {
        "n": n,
        "forgotten": lost,
        "gained": won,
        "kept": sum(first[i]["correct"] and second[i]["correct"] for i in first),
        "change": (won - lost) / n,
        "standard_error": math.sqrt(max(0.0, won + lost - (won - lost) ** 2 / n)) / n,
        "p_value": mcnemar(lost, won),
        "forgotten_ids": forgotten,
        "gained_ids": gained,
    }
    if all(row["options"] > 1 for row in first.values()):
        # With c options a guesser is wrong (c - 1) times for each lucky hit; a hit flips when the next guess misses.
        out["forgotten_by_luck"] = sum(1 / row["options"] for row in first.values() if not row["correct"])
        out["gained_by_luck"] = sum(1 / row["options"] for row in second.values() if not row["correct"])
    return out


def store_results(results: dict[str, TaskResult], settings: dict[str, Any], run: str | Path, when: str) -> None:
    """Write RUN/evaluation/{when}/{task}.jsonl (predictions) and summary.json, each whole or not at all."""
    folder = Path(run) / "evaluation" / when
    for name, result in results.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in result.predictions]
        write_atomically(folder / f"{name}.jsonl", "".join(line + "\n" for line in lines))
    summary = {"settings": settings, "tasks": {name: result.summary() for name, result in results.items()}}
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")


def load_results(run: str | Path, when: str) -> tuple[dict[str, TaskResult], dict[str, Any]]:
    """The stored results under RUN/evaluation/{when} and their settings; ({}, {}) where nothing is stored.

    Raises:
        UserError: a file of them is damaged or missing.
    """
    folder = Path(run) / "evaluation" / when
    if not (folder / "summary.json").is_file():
        return {}, {}
    results, file = {}, folder / "summary.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        for name, task in stored["tasks"].items():
            file = folder / f"{name}.jsonl"
            with file.open(encoding="utf-8") as lines:  # not splitlines(): texts hold what that splits at too
                predictions = [json.loads(line) for line in lines]
            if len(predictions) != task["n"]:
                raise ValueError
            results[name] = TaskResult(name, task["split"], task["kind"], predictions, task["seconds"])
    except (ValueError, FileNotFoundError):
        raise UserError(f"{file} is damaged: bring it back, or begin the run anew in another folder") from None
    return results, stored["settings"]


def check_run(folder: Path) -> None:
    """
    Raises:
        UserError: it is not a run's folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of a run (its recipe's `run`)")
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not the folder of a run: it holds no recipe.yaml")


def finished(folder: Path) -> bool:
    """Whether a run has come to its end: it has a report, and not one of a run under way."""
    try:
        return json.loads((folder / "report.json").read_text(encoding="utf-8")).get("finished", True)
    except FileNotFoundError:
        return False
    except ValueError:  # damaged: compact.analyze writes it again
        return True


def versions() -> dict[str, str]:
    """What a run ran on; the trainer keeps it in timing.json, since a report may be written elsewhere."""
    out = {"python": platform.python_version()}
    for name, package in {"torch": "torch", "transformers": "transformers", "compact": "compact-distillation"}.items():
        try:
            out[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed as a package"
    out["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return out
