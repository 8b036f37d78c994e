"""python -m compact.study.cell FOLDER: one cell of a study; FOLDER/recipe.yaml is its recipe.

With --base the student is only evaluated as it is; with --merge N a branch a teacher is trained and merged, N times.
The cell is finished then. With --analyze compact.analyze looks into the student afterwards, before --drop_student
deletes it. With --serve alone the arguments of one cell after another come as lines of JSON, and each one's exit
status is the answer.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import compact.analyze
from compact.config import Recipe, from_dict, read_recipe
from compact.data import load_questions
from compact.drift import measure_drift
from compact.errors import UserError
from compact.evaluate import evaluate_tasks, recipe_tasks
from compact.files import save_model, write_atomically
from compact.options import plain
from compact.results import finished, load_results
from compact.run_folder import claim, save_student
from compact.train import run
from compact.training_data import training_data


def run_merged(recipe: Recipe, rounds: int) -> None:
    """Branches that each learn from one teacher, merged by averaging their weights (Merge-of-Thought's idea).

    Every round trains its branches from the last round's average, with an even share of the recipe's epochs or steps;
    the branches are ordinary runs in RUN/branches. RUN then holds the merged student, its evaluation and a report.
    """
    assert recipe.data.train is not None
    folder = Path(recipe.run)
    claim(folder, recipe)
    if finished(folder):
        _clear(folder)
        return
    _, read = load_questions(recipe.data.train, answer_kind=recipe.data.answer_kind, cache_dir=folder / "cache")
    share = {"num_train_epochs": float(recipe.training.get("num_train_epochs", 3)) / rounds}  # type: ignore[arg-type]
    if (steps := int(recipe.training.get("max_steps", -1))) > 0:  # type: ignore[call-overload]
        share["max_steps"] = max(1, round(steps / rounds))
    student = recipe.student
    for number in range(1, rounds + 1):
        branches = []
        for teacher in read.teachers:
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
            save_model(averaged(branches), AutoTokenizer.from_pretrained(branches[0]), average)
        student = replace(student, model=str(average))
    model = AutoModelForCausalLM.from_pretrained(average, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(average)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    _, held_out, report = training_data(recipe, tokenizer, folder)  # the same as every branch's
    write_atomically(folder / "data_report.json", json.dumps(report.to_dict(), indent=1))
    settings = recipe.evaluation
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
    _clear(folder)


def _clear(folder: Path) -> None:
    """What a merged student was made of."""
    for leftover in (folder / "branches", *folder.glob("round-*")):
        shutil.rmtree(leftover, ignore_errors=True)


def averaged(folders: Sequence[Path]) -> PreTrainedModel:
    """A model whose weights are the means, in float32, of those in `folders`, in their own dtype."""
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype="auto")
    states = [AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict() for folder in folders]
    mean = {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}
    model.load_state_dict({name: value.to(states[0][name].dtype) for name, value in mean.items()})
    return model


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compact.study.cell", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", action="store_true")
    parser.add_argument("--merge", type=int, default=0)
    parser.add_argument("--analyze", action="store_true")
    parser.add_argument("--drop_student", action="store_true")
    parser.add_argument("--at_once", type=int, default=1, help="cells that run beside each other, itself included")
    given = parser.parse_args(argv)
    started = time.time()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    folder = given.folder
    try:
        recipe = from_dict(plain(read_recipe(str(folder / "recipe.yaml"))))
        if given.base:
            if not load_results(folder, "before")[0]:
                run(recipe, only_before=True)
        elif given.merge:
            run_merged(recipe, given.merge)
        else:
            run(recipe)
    except UserError as error:
        print(f"\ncompact.study: {error}", file=sys.stderr)  # a line of its own, below a progress bar
        return 2
    peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    price = {"seconds": max(time.time() - started, _phases(folder)), "at_once": given.at_once, "peak_reserved": peak}
    write_atomically(folder / "cell.json", json.dumps(price))
    if given.analyze and (folder / "student").exists():  # other seeds do without: it is no part of the result or price
        try:
            compact.analyze.main([str(folder)])
        except Exception:  # the result stands
            traceback.print_exc()
    # Optimizer states are many times the student's size, and a finished cell goes on with none of them.
    for part in ["checkpoints", "cache", *(["student"] if given.drop_student else [])]:
        shutil.rmtree(folder / part, ignore_errors=True)
    return 0


def _phases(folder: Path) -> float:
    """Seconds that a run's phases took, in whichever processes: of one that goes on, this one saw the rest."""
    file = folder / "timing.json"
    seconds = json.loads(file.read_text())["seconds"] if file.exists() else {}
    return sum(value for name, value in seconds.items() if name != "start")


def serve() -> int:
    """Run cells as they are asked for; give up after one that broke, for it may have broken this process too."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        arguments = json.loads(line)
        with (Path(arguments[0]) / "log.txt").open("wb") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        try:
            code = main(arguments)
        except Exception:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        print(code, file=answers, flush=True)
        if code not in (0, 2):
            return code
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["--serve"] else main())
