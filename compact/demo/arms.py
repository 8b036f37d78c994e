"""The arms of the embedded default: the same questions and student under other weights, and the table of all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from compact.config import Recipe
from compact.demo import build
from compact.demo.teachers import TEACHERS
from compact.files import write_atomically
from compact.report import table

Report = dict[str, Any]  # the content of report.json

GAIN = 20.0  # points that the run should gain on the held-out questions
SHARE = 0.8  # of an equal weight: what the misleading teacher should have at most


def run_arms(recipe: Recipe, run: Callable[[Recipe], Report]) -> Report:
    """Train what `recipe.demo.arms` names, each an ordinary run in RUN/arms/NAME, and compare it with the run itself.

    RUN/arms.md and RUN/arms.json hold the comparison; it is printed too. What has finished is not trained again.

    Args:
        run: what runs a recipe and returns its report, :func:`compact.train.run`.

    Returns:
        The content of arms.json.
    """
    reports: dict[str, Report] = {recipe.strategy: run(recipe)}
    for arm in recipe.demo.arms:
        if arm not in reports:
            if PartialState().is_main_process:
                print(f"\nThe same with {_label(arm)}:", flush=True)
            reports[arm] = run(arm_recipe(recipe, arm))
    content = compare_arms(reports)
    if PartialState().is_main_process:
        text = arms_table(content)
        write_atomically(Path(recipe.run) / "arms.json", json.dumps(content, indent=1) + "\n")
        write_atomically(Path(recipe.run) / "arms.md", text)
        print(f"\n{text}", flush=True)
    return content


def arm_recipe(recipe: Recipe, arm: str) -> Recipe:
    """The recipe of one arm: a strategy's name, or a teacher's, who then teaches alone."""
    alone = arm in TEACHERS
    recipe = build(recipe)
    if recipe.consensus.affinity != "sentence":  # an encoder may be for MIND's features alone
        recipe = replace(recipe, consensus=replace(recipe.consensus, encoder=None))
    return replace(
        recipe,
        run=str(Path(recipe.run) / "arms" / arm),
        strategy="single" if alone else arm,  # type: ignore[arg-type]  # demo.arms allows nothing else
        weights=replace(recipe.weights, teacher=arm if alone else None, fixed=None),
    )


def compare_arms(reports: Mapping[str, Report]) -> Report:
    """The content of arms.json: accuracies and forgotten answers of each arm, and what the first should reach.

    Args:
        reports: of the run itself first, then of its arms, by name.
    """
    name, report = next(iter(reports.items()))
    held_out, alpha = report["accuracy"]["held_out"], report["alpha_mean"]
    content: Report = {
        "run": name,
        "tasks": {task: {"n": of["n"], "split": of["split"]} for task, of in report["accuracy"].items()},
        "before": {task: of["before"] for task, of in report["accuracy"].items()},
        "after": {
            arm: {task: of["after"] for task, of in theirs["accuracy"].items()} for arm, theirs in reports.items()
        },
        "forgotten": {
            arm: {task: of["changes"]["forgotten"] for task, of in theirs["accuracy"].items()}
            for arm, theirs in reports.items()
        },
        "gain": 100 * (held_out["after"] - held_out["before"]),
        "gain_error": 100 * held_out["changes"]["standard_error"],
        "alpha_mean": alpha,
    }
    content["gain_reached"] = content["gain"] >= GAIN
    if name == "compact" and "misleading" in alpha:
        content["misleading_lowest"] = min(alpha, key=alpha.__getitem__) == "misleading"
        content["misleading_limit"] = SHARE / len(alpha)
        content["misleading_low"] = alpha["misleading"] <= SHARE / len(alpha)
    return content


def arms_table(content: Report) -> str:
    """arms.md: the table, and in words what holds and what does not."""
    tasks = content["tasks"]
    names = [f"{task}{' (skill)' if of['split'] == 'forgetting' else ''}" for task, of in tasks.items()]
    rows = [["base", *(f"{100 * content['before'][task]:.1f}" for task in tasks)]]
    arms = [arm for arm in content["after"] if arm != content["run"]]
    for arm in [*arms, content["run"]]:
        cells = []
        for task in tasks:
            lost = content["forgotten"][arm][task]
            cells.append(f"{100 * content['after'][arm][task]:.1f}" + (f" (−{lost})" if lost else ""))
        rows.append([_label(arm), *cells])
    reached = "as it should" if content["gain_reached"] else "**fewer than it should**"
    counts = ", ".join(f"{task} {of['n']}" for task, of in tasks.items())
    lines = [
        table(["right answers, %", *names], rows),
        f"(−n): n questions answered right before and wrong after. Questions a task: {counts}.",
        f"{_label(content['run'])} gains {content['gain']:.1f} ± {content['gain_error']:.1f} points on the held-out "
        f"questions ({reached}: at least {GAIN:.0f}).",
    ]
    if "misleading_low" in content:
        weights = ", ".join(f"{teacher} {alpha:.3f}" for teacher, alpha in content["alpha_mean"].items())
        order = "is the lowest" if content["misleading_lowest"] else "**is not the lowest, as it should be**"
        low = "at most" if content["misleading_low"] else "**above, where it should be at most**"
        lines.append(
            f"Mean weights in the last quarter of training: {weights}. The misleading teacher's {order}, and "
            f"{low} {content['misleading_limit']:.2f} ({SHARE} of an equal weight)."
        )
    return "\n\n".join(lines) + "\n"


def _label(arm: str) -> str:
    return {"compact": "COMPACT", "uniform": "equal weights"}.get(arm, f"{arm} alone" if arm in TEACHERS else arm)
