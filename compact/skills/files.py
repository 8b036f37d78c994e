"""The files of the skills study: questions, held-out ones, and the rationales of four teachers."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from compact.errors import UserError
from compact.files import write_atomically
from compact.skills.questions import (
    HELD_OUT_WORDING,
    TAUGHT,
    UNTAUGHT,
    WORDINGS,
    Question,
    draw_questions,
    trained_wordings,
)
from compact.skills.teachers import rationale, team

# reasoning-gym's generators whose answers are numbers, at a difficulty for small students.
GYM: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "leg_counting": {"min_animals": 1, "max_animals": 2, "min_instances": 1, "max_instances": 4},
    "gcd": {"min_value": 2, "max_value": 30},
    "lcm": {"min_value": 2, "max_value": 12},
}
GYM_SEED = 10**7  # an item's own seed is seed + index: far from every other use


def write_skills(
    folder: Path,
    *,
    questions: int = 1000,
    held_out: int = 400,
    seed: int = 0,
    part: str = "test",
    misleading: bool = True,
    one_style: bool = False,
    held_out_wording: int = HELD_OUT_WORDING,
    gym: int = 0,
    train: str = "train",
) -> dict[str, Path]:
    """Write the files; what is there is kept. Training questions depend on `seed`, held-out ones do not.

    Args:
        questions: to train on. held_out: in each of the three held-out files.
        part: "test", or "validation" for choices that the test must not see.
        misleading: whether one of the four teachers misleads. one_style: whether all write in the same.
        held_out_wording: of each skill, 0 to 3: never trained on, and what wordings.jsonl asks in.
        gym: questions by reasoning-gym; 0: none.
        train: what the file of training questions is called, without .jsonl.

    Raises:
        UserError: there is no such part or wording; reasoning-gym is asked for and not installed.
    """
    if part not in ("test", "validation"):
        raise UserError(f"skills.part is {part!r}; it is test or validation")
    if held_out_wording not in WORDINGS:
        raise UserError(
            f"skills.held_out_wording is {held_out_wording!r}; a skill has the wordings 0 to {WORDINGS[-1]}"
        )
    names, trained = team(misleading), trained_wordings(held_out_wording)
    # Random state, how many, of which part, skills, wordings.
    kinds: dict[str, tuple[str, int, str, dict[str, Callable], tuple[int, ...]]] = {
        "train": (f"train {seed}", questions, "train", TAUGHT, trained),
        "held_out": (part, held_out, part, TAUGHT, trained),
        "wordings": (f"{part} wordings", held_out, part, TAUGHT, (held_out_wording,)),
        "tasks": (f"{part} tasks", held_out, part, UNTAUGHT, (0,)),
    }
    files = {}
    for name, (state, count, of, skills, wordings) in kinds.items():
        files[name] = folder / f"{train if name == 'train' else name}.jsonl"
        if not files[name].exists():
            asked = draw_questions(random.Random(state), count, part=of, skills=skills, wordings=wordings)
            rng = random.Random(f"{name} {seed if name == 'train' else part} teachers")
            rows = (
                _row(f"{name}-{i}", question, [rationale(one, question, rng, one_style=one_style) for one in names])
                for i, question in enumerate(asked, 1)
            )
            _write(files[name], rows)
    if gym:
        files["gym"] = folder / "gym.jsonl"
        if not files["gym"].exists():
            _write(files["gym"], gym_rows(gym, part))
    return files


def _row(name: str, question: Question, rationales: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "id": name,
        "prompt": question.prompt,
        "answer": question.answer,
        "task": question.kind,
        "skill": question.skill,
        "instruct": False,  # asked in the training's form
        "rationales": rationales,
    }


def gym_rows(count: int, part: str) -> Iterator[dict[str, Any]]:
    """Different questions by reasoning-gym whose answer is a number, the generators in turn.

    For validation those that the test of as many has are left out: some generators have few.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(
            "skills.gym needs the package reasoning-gym: pip install reasoning-gym, or set skills.gym to 0"
        )
    import reasoning_gym

    seed = GYM_SEED + (10**6 if part == "validation" else 0)
    sources = [reasoning_gym.create_dataset(name, size=4 * count, seed=seed, **how) for name, how in GYM.items()]
    kept_apart = {row["prompt"] for row in gym_rows(count, "test")} if part == "validation" else set()
    seen: set[str] = set()
    for index in range(4 * count):
        for name, source in zip(GYM, sources):
            item = source[index]
            answer = str(item["answer"])
            asked = item["question"] in seen or item["question"].strip() in kept_apart
            if len(seen) < count and not asked and re.fullmatch(r"-?\d+", answer):
                seen.add(item["question"])
                row = {"id": f"gym-{name}-{index}", "prompt": item["question"].strip(), "answer": answer}
                yield {**row, "task": "number", "instruct": False}


def _write(file: Path, rows: Iterator[dict[str, Any]]) -> None:
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
