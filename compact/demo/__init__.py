"""The embedded default: generated questions, programmatic teachers and a tiny student, made inside a run's folder."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from compact.config import Recipe
from compact.demo.pretraining import SKILLS, Pair, document, draw_skill
from compact.demo.questions import Problem, draw_problems
from compact.demo.teachers import rationales
from compact.demo.tiny import build_model, build_tokenizer, pretrain
from compact.files import save_model, write_atomically
from compact.randomness import random_state_kept

FOLDER = "demo"  # in the run's folder


def is_embedded(recipe: Recipe) -> bool:
    """Whether the recipe asks for the embedded questions or the embedded student."""
    return recipe.data.train is None or recipe.student.model == "demo"


def build(recipe: Recipe) -> Recipe:
    """Make in RUN/demo what the recipe leaves to the embedded default, and give the recipe that names these files.

    ``data.train: null`` becomes train.jsonl, with held_out.jsonl; ``student.model: demo`` becomes student/, and its
    skills become forgetting tasks. What is there already is kept: a run that goes on does not pre-train again. The
    arms are nothing of one run's, and left out.
    """
    folder = Path(recipe.run) / FOLDER
    data, evaluation, student = recipe.data, recipe.evaluation, recipe.student
    if data.train is None:
        train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
        _write(train, _questions(recipe.seed, recipe.demo.questions, held=False))
        _write(held_out, _questions(recipe.seed, evaluation.limit, held=True))
        data = replace(data, train=str(train), held_out=data.held_out or str(held_out))
    if student.model == "demo":
        forgetting = dict(evaluation.forgetting)
        for skill in SKILLS:
            file = folder / f"{skill}.jsonl"
            _write(file, _skill(skill, recipe.seed, evaluation.limit))
            forgetting.setdefault(skill, str(file))
        evaluation = replace(evaluation, forgetting=forgetting)
        student = replace(student, model=str(_student(folder / "student", recipe)))
    return replace(recipe, data=data, evaluation=evaluation, student=student, demo=replace(recipe.demo, arms=[]))


def _questions(seed: int, count: int, *, held: bool) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{seed} {'held out' if held else 'train'}")
    for number, problem in enumerate(draw_problems(rng, count, held=held), 1):
        yield _row(f"{'held-out' if held else 'train'}-{number}", problem, rng)


def _row(name: str, problem: Problem, rng: random.Random) -> dict[str, Any]:
    answer = str(problem.answer)
    return {"id": name, "prompt": problem.prompt, "answer": answer, "rationales": rationales(problem, rng)}


def _skill(skill: str, seed: int, count: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{seed} {skill}")
    for number, (question, answer) in enumerate(draw_skill(rng, skill, count), 1):
        yield {"id": f"{skill}-{number}", "prompt": question, "answer": answer, "task": SKILLS[skill][0]}


def _write(file: Path, rows: Iterator[dict[str, Any]]) -> None:
    if not file.exists():
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))


def _student(folder: Path, recipe: Recipe) -> Path:
    """The pre-trained tiny student in `folder`, written aside and renamed."""
    if folder.exists():
        return folder

    def render(prompt: str, answer: str) -> Pair:
        return recipe.data.prompt_template.replace("{prompt}", prompt), recipe.data.suffix.replace("{answer}", answer)

    rng = random.Random(0)  # the same vocabulary whatever the seed
    sample = ["".join(document(rng, render)) for _ in range(2000)]
    for problem in draw_problems(rng, 200, held=False):
        sample += [problem.prompt, *(rationale["completion"] for rationale in rationales(problem, rng))]
    tokenizer = build_tokenizer("\n".join(sample))
    with random_state_kept(seed=recipe.seed):
        model = build_model(tokenizer)
    pretrain(model, tokenizer, render, seed=recipe.seed, steps=recipe.demo.pretraining_steps)
    save_model(model, tokenizer, folder)
    return folder
