"""What a recipe trains on: questions in tokens, the held-out ones, and the one that the pictures show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from compact.config import Recipe
from compact.data import load_questions, prompt_of, prompt_text, question_text, split, tokenize_questions
from compact.data_report import DataReport
from compact.embed import with_embeddings
from compact.errors import UserError
from compact.evaluate import recipe_tasks
from compact.files import file_digest, fingerprint, write_atomically
from compact.results import finished
from compact.strategies import build_strategy
from compact.tokenization import prompt_ids, suffix_ids


def training_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[Dataset, Dataset, DataReport]:
    """Training questions in tokens, held-out questions in text, and what became of every row."""
    assert recipe.data.train is not None  # compact.demo.build sees to it
    cache = folder / "cache"
    questions, read = load_questions(recipe.data.train, answer_kind=recipe.data.answer_kind, cache_dir=cache)
    if recipe.data.held_out is None:
        train_questions, held_out = split(questions, recipe.data.holdout, recipe.seed)
        if not len(held_out):
            raise UserError(
                f"{recipe.data.train}: one question alone, and none to hold out for evaluation: at least two "
                "different ones are needed"
            )
    else:
        train_questions = questions
        held_out, theirs = load_questions(recipe.data.held_out, answer_kind=recipe.data.answer_kind, cache_dir=cache)
        read.add_refusals(theirs)
        trained_on = {question_text(row) for row in held_out} & {question_text(row) for row in train_questions}
        if trained_on:
            raise UserError(
                f"{recipe.data.held_out}: {len(trained_on)} of its questions are in {recipe.data.train} too, such as "
                f"{min(trained_on)!r}: what is held out must not be trained on"
            )
    train_set, tokenized = tokenize_questions(
        train_questions, tokenizer, recipe.data, teachers=read.teachers, cache_dir=cache
    )
    report = read.then(tokenized)
    reference = recipe.evaluation.reference
    if reference is not None and reference not in report.teachers:
        raise UserError(
            f"evaluation.reference: {reference!r} is none of the teachers: {', '.join(report.teachers)}; "
            "--evaluation.reference null goes without"
        )
    room = [
        len(prompt_ids(tokenizer, prompt_of(row), recipe.data.prompt_template))
        + len(suffix_ids(tokenizer, recipe.data.suffix, row["answer"])[0])
        <= recipe.data.max_length
        for row in held_out
    ]
    for row, fits in zip(held_out, room):
        if not fits:
            report.refuse_question(
                f"held-out question {row['id']!r}", "prompt and suffix alone are longer than data.max_length"
            )
    held_out = held_out.select([index for index, fits in enumerate(room) if fits])
    report.questions["held_out"] = len(held_out)
    # Their Arrow files are named by their content.
    check_unchanged(folder, questions=[Path(f["filename"]).name for d in (questions, held_out) for f in d.cache_files])
    kept = build_strategy(recipe, report.teachers).restrict(train_set)
    if kept is not train_set:
        _recount(report, train_set, kept)
    trained = set(kept["id"])
    chosen = [index for index, name in enumerate(train_questions["id"]) if name in trained]
    report.trained_on = _trained_on(recipe, train_questions.select(chosen))
    train_set = with_embeddings(kept, tokenizer, recipe, cache_dir=cache, device=PartialState().device)
    return train_set, held_out, report


def _trained_on(recipe: Recipe, questions: Dataset) -> dict[str, list[int]]:
    """Of each task that asks what is trained on: how many such questions, and how many it asks."""
    known = {text for row in questions for text in _texts(prompt_of(row))}
    found = {}
    for task in recipe_tasks(replace(recipe.evaluation, instruct=False), None, recipe.seed):
        shared = sum(not known.isdisjoint(_texts(row.prompt)) for row in task.rows)
        if shared:
            found[task.name] = [shared, len(task.rows)]
    return found


def _texts(prompt: str | list[dict[str, str]]) -> set[str]:
    """A prompt's text, and what its user says alone: one file has a system's message, another has none."""
    if isinstance(prompt, str):
        return {prompt_text(prompt)}
    return {prompt_text(prompt), prompt_text([message for message in prompt if message["role"] == "user"])}


def input_files(recipe: Recipe) -> dict[str, Path]:
    """The files that a recipe reads, the student's folder too, by their keys and as far as they are there."""
    data, evaluation = recipe.data, recipe.evaluation
    named = {"data.train": data.train, "data.held_out": data.held_out, "evaluation.held_text": evaluation.held_text}
    named |= {f"evaluation.tasks.{name}": file for name, file in evaluation.tasks.items()}
    named |= {f"evaluation.forgetting.{name}": file for name, file in evaluation.forgetting.items()}
    named["student.model"] = None if recipe.student.model == "demo" else recipe.student.model
    paths = {key: Path(name).expanduser().resolve() for key, name in named.items() if name}
    return {key: path for key, path in paths.items() if path.is_file() or key == "student.model" and path.is_dir()}


def input_digest(key: str, path: Path) -> str:
    """Of what :func:`input_files` named."""
    return fingerprint(path) if key == "student.model" else file_digest(path)


def check_inputs(folder: Path, recipe: Recipe) -> None:
    """As :func:`check_unchanged`, of the files that a recipe reads."""
    check_unchanged(folder, **{key: input_digest(key, path) for key, path in input_files(recipe).items()})


def check_unchanged(folder: Path, **facts: Any) -> None:
    """What the run is made of is what it began with: RUN/cache/questions.json holds that.

    Args:
        facts: plain values by what they tell of; what is not known of an older run is taken as it is now.

    Raises:
        UserError: it has changed since.
    """
    stored = folder / "cache" / "questions.json"
    known = json.loads(stored.read_text()) if stored.exists() else {}
    if isinstance(known, list):  # of an older version
        known = {"questions": known}
    if changed := [name for name, value in facts.items() if known.get(name, value) != value]:
        raise UserError(
            f"{' and '.join(changed)} changed since the run in {folder} began, and the run is of what was there then: "
            "bring that back, or choose another folder with --run"
        )
    if PartialState().is_main_process and not finished(folder):
        write_atomically(stored, json.dumps(known | facts))


def _recount(report: DataReport, before: Dataset, after: Dataset) -> None:
    """What the strategy leaves out of the questions, in the report."""
    left = set(before["id"]) - set(after["id"])
    for name in sorted(left):
        report.questions["used"] -= 1
        report.refuse_question(f"question {name!r}", "no rationale of a teacher that the strategy trains on")
    flags = [(rationale["wrong"], rationale["cut"]) for item in after for rationale in item["rationales"]]
    report.rationales["left_out"] = report.rationales["used"] - len(flags)  # by the strategy
    report.rationales["used"] = len(flags)
    report.rationales["wrong"], report.rationales["cut"] = (sum(column) for column in zip(*flags))


def example_question(
    train_set: Dataset,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    report: DataReport,
    folder: Path,
) -> dict[str, Any]:
    """The question that the report's pictures show: a held-out one with every teacher, where there is one."""
    few = held_out.select(range(min(len(held_out), 50)))
    try:
        candidates, _ = tokenize_questions(
            few, tokenizer, recipe.data, teachers=report.teachers, cache_dir=folder / "cache"
        )
        candidates = build_strategy(recipe, report.teachers).restrict(candidates)
    except UserError:  # not one of the few is usable
        return train_set[0]
    candidates = with_embeddings(
        candidates, tokenizer, recipe, cache_dir=folder / "cache", device=PartialState().device
    )
    return max(candidates, key=lambda item: len(item["rationales"]))
