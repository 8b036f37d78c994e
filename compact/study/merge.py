"""Branches that each learn from one teacher, merged by averaging their weights (Merge-of-Thought's idea)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import compact.analyze
from compact.config import Recipe
from compact.data import load_questions
from compact.drift import measure_drift
from compact.evaluate import evaluate_tasks, recipe_tasks
from compact.files import save_model, write_atomically
from compact.results import finished
from compact.run_folder import Phases, claim, save_student
from compact.train import run
from compact.training_arguments import TRAINING_DEFAULTS
from compact.training_data import training_data


def run_merged(recipe: Recipe, rounds: int) -> None:
    """Branches that each learn from one teacher, merged by averaging their weights (Merge-of-Thought's idea).

    Every round trains its branches from the last round's average, with an even share of the recipe's epochs or steps;
    the branches are ordinary runs in RUN/branches, which :func:`clear` deletes. RUN then holds the merged student, its
    evaluation and a report.
    """
    assert recipe.data.train is not None  # grids without are refused
    folder = Path(recipe.run)
    claim(folder, recipe)
    if finished(folder):
        return
    phases = Phases(folder)
    cache, drop = folder / "cache", recipe.data.wrong_answers == "drop"
    questions, read = load_questions(recipe.data.train, answer_kind=recipe.data.answer_kind, cache_dir=cache)
    taught = {r["teacher"] for row in questions for r in row["rationales"] if not (drop and r["wrong"])}
    given: dict[str, Any] = {**TRAINING_DEFAULTS, **recipe.training}
    share: dict[str, Any] = {"num_train_epochs": given["num_train_epochs"] / rounds}
    if (steps := given.get("max_steps", -1)) > 0:
        share["max_steps"] = max(1, round(steps / rounds))
    student = recipe.student
    options = {"trust_remote_code": student.trust_remote_code}
    for number in range(1, rounds + 1):
        branches = []
        for teacher in (name for name in read.teachers if name in taught):
            branch = replace(
                recipe,
                run=str(folder / "branches" / f"round-{number}-{teacher}"),
                strategy="single",
                weights=replace(recipe.weights, teacher=teacher),
                student=student,
                training={**recipe.training, **share},
                evaluation=replace(recipe.evaluation, tasks={}, forgetting={}, held_text=None, limit=1),
            )
            run(branch)
            branches.append(Path(branch.run) / "student")
        average = folder / f"round-{number}"
        if not average.exists():
            save_model(averaged(branches, **options), AutoTokenizer.from_pretrained(branches[0], **options), average)
        student = replace(student, model=str(average))
    model = AutoModelForCausalLM.from_pretrained(average, dtype="auto", **options)
    tokenizer = AutoTokenizer.from_pretrained(average, **options)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    _, held_out, report = training_data(recipe, tokenizer, folder)  # the same as every branch's
    write_atomically(folder / "data_report.json", json.dumps(report.to_dict(), indent=1))
    settings = recipe.evaluation
    timings = [json.loads(file.read_text())["seconds"] for file in folder.glob("branches/*/timing.json")]
    phases.seconds["branches"] = sum(sum(seconds.values()) for seconds in timings)
    with phases("evaluate_after"):
        evaluate_tasks(
            model,
            tokenizer,
            recipe_tasks(settings, held_out, recipe.seed),
            folder,
            "after",
            data=recipe.data,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
        )
    if settings.held_text is not None:
        measure_drift(recipe, model, tokenizer, folder)
    save_student(model, tokenizer, folder)
    compact.analyze.write_report(folder, over=True)


def clear(folder: Path) -> None:
    """What a merged student was made of."""
    for leftover in (folder / "branches", *folder.glob("round-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def averaged(folders: Sequence[Path], **options: Any) -> PreTrainedModel:
    """A model whose weights are the means, in float32, of those in `folders`, in their own dtype."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options) for folder in folders]
    model, states = models[0], [model.state_dict() for model in models]
    mean = {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}
    model.load_state_dict({name: value.to(states[0][name].dtype) for name, value in mean.items()})
    return model
