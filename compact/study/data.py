"""What cells read: generated questions, folds of a file, and a student that is read from a GGUF file once."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from compact.config import Recipe, from_dict, read_recipe
from compact.data import question_text
from compact.errors import UserError
from compact.files import fingerprint, save_model, write_atomically
from compact.options import plain, refuse
from compact.rows import clean_prompt, prompt_problem
from compact.skills.files import write_skills
from compact.sources import JsonLines
from compact.student import load_student, unwrap
from compact.study.grid import Cell, Grid, SkillsConfig, at

RATIONALES = {"rationales", "completion"}  # what a row has, in the short form and in the long one


def recipe_of(cell: Cell, study: Path) -> Recipe:
    """The whole recipe of a cell, its data written into the study's folder if it is not there.

    Raises:
        UserError: what is wrong with its recipe or its data.
    """
    values = plain(cell.tree)
    values["run"] = str(study / "cells" / cell.name)
    data, evaluation = values.setdefault("data", {}), values.setdefault("evaluation", {})
    if cell.skills is not None:
        _use_skills(cell, study, data, evaluation)
    if cell.fold is not None:
        _use_fold(cell, study, data, evaluation)
    evaluation["seed"] = evaluation.get("seed") or 0  # every seed of the study is asked the same questions
    return from_dict(values)


def _use_skills(cell: Cell, study: Path, data: dict[str, Any], evaluation: dict[str, Any]) -> None:
    wanted = cell.skills
    assert wanted is not None
    seed = cell.seed if wanted.fresh else 0
    facts, defaults = asdict(wanted), asdict(SkillsConfig())
    with _made_once(study / "data" / cell.setting, "skills", facts, defaults) as (folder, _):
        files = write_skills(
            folder,
            questions=wanted.questions,
            held_out=wanted.held_out,
            seed=seed,
            part=wanted.part,
            misleading=wanted.misleading,
            one_style=wanted.one_style,
            held_out_wording=wanted.held_out_wording,
            gym=wanted.gym,
            train=f"train-{seed}",
        )
    data |= {"train": str(files["train"]), "held_out": str(files["held_out"])}
    evaluation["limit"] = max(wanted.held_out, wanted.gym, evaluation.get("limit") or 0)
    tasks = {name: str(files[name]) for name in ("wordings", "tasks", "gym") if name in files}
    if taken := sorted(tasks.keys() & evaluation.get("tasks", {}).keys()):
        raise UserError(f"evaluation.tasks.{taken[0]}: skills makes a task of that name; give yours another")
    evaluation["tasks"] = tasks | evaluation.get("tasks", {})


def _use_fold(cell: Cell, study: Path, data: dict[str, Any], evaluation: dict[str, Any]) -> None:
    """Questions into folds by their text, the same for every seed: each question is held out once a seed."""
    source = _source(data.get("train"))
    if not source.exists():
        raise UserError(f"folds: there is no file {source}, which data.train names")
    content = source.read_bytes()
    facts = {"folds": cell.folds, "questions": hashlib.sha256(content).hexdigest()}
    with _made_once(study / "data" / cell.setting, "folds", facts) as (folder, made):
        if not made:
            _write_folds(source, cell.folds, folder)
    files = {name: folder / f"fold-{cell.fold}" / f"{name}.jsonl" for name in ("train", "held_out")}
    data |= {name: str(file) for name, file in files.items()}
    held_out = _questions(JsonLines(files["held_out"]).rows())
    evaluation["limit"] = max(held_out, evaluation.get("limit", 0))


@contextmanager
def _made_once(
    folder: Path, key: str, facts: dict[str, Any], defaults: dict[str, Any] | None = None
) -> Iterator[tuple[Path, bool]]:
    """A setting's folder of data, and whether it has been made; after the block it has.

    Args:
        facts: what it is made of. defaults: of those that an older version did not write.

    Raises:
        UserError: it has been made of something else: cells that were trained on that may be finished.
    """
    file, wanted = folder / "made.json", json.dumps(facts)
    made = file.exists()
    if made and {**(defaults or {}), **json.loads(file.read_text())} != facts:
        raise UserError(
            f"{key}: {folder} was made of {file.read_text()}, and this study is of {wanted}: choose another folder "
            "with --study"
        )
    if not made:
        shutil.rmtree(folder, ignore_errors=True)
    yield folder, made
    if not made:
        write_atomically(file, wanted)


def check_folds(grid: Grid, cells: Sequence[Cell]) -> None:
    """What can be said of folds before they are made, and before any cell is begun.

    Raises:
        UserError: a file or a row that no fold can have, or a limit of the grid's that a fold would not keep.
    """
    largest: dict[tuple[Path, int], int] = {}
    default = at(read_recipe(grid.recipe), "evaluation.limit")
    for cell in cells:
        if not cell.folds or (Path(grid.study) / "data" / cell.setting / "made.json").exists():
            continue
        train, limit = (at(cell.tree, key) for key in ("data.train", "evaluation.limit"))
        source = _source(train and train.value)
        if not source.exists():  # which its cells say: it may be there when they are tried again
            continue
        if (source, cell.folds) not in largest:
            rows = _folded(source, cell.folds)
            parts = ([row for of, row in rows if of == fold] for fold in range(cell.folds))
            largest[source, cell.folds] = max(map(_questions, parts))
        size = largest[source, cell.folds]
        if limit is not None and limit.value < size and (default is None or limit.place != default.place):
            problem = (
                f"{limit.value} is less than the {size} questions that a fold holds out, which are all asked, and "
            )
            refuse(limit, "evaluation.limit", problem + f"it is one for every task: make it {size} or leave it out")


def _source(train: object) -> Path:
    """The file of questions that folds are made of, whether it is there or not."""
    source = Path(str(train))
    if source.suffix != ".jsonl" or source.is_dir():
        raise UserError(f"folds: data.train must be a .jsonl file of questions, and is {train!r}")
    return source


def _folded(source: Path, folds: int) -> list[tuple[int, dict[str, Any]]]:
    """Every row with its fold; rows of one question, of the long form, have one."""
    read = JsonLines(source)
    rows = list(read.rows())
    for index, row in enumerate(rows):
        problem = prompt_problem(row.get("prompt")) if isinstance(row, dict) else None
        if not isinstance(row, dict) or problem or not row.keys() & RATIONALES:
            why = f": {' '.join(problem)}" if problem else ""
            raise UserError(
                f"folds: {read.place(index)} must be one question, with its prompt and its rationales{why}"
            )
    texts = sorted({_text(row) for row in rows})
    if len(texts) < folds:
        raise UserError(f"folds: {folds} of them need as many questions, and {source} has {len(texts)}")
    random.Random(0).shuffle(texts)
    fold_of = {text: index % folds for index, text in enumerate(texts)}
    return [(fold_of[_text(row)], row) for row in rows]


def _write_folds(source: Path, folds: int, folder: Path) -> None:
    lines = [(fold, json.dumps(row, ensure_ascii=False) + "\n") for fold, row in _folded(source, folds)]
    for fold in range(folds):
        held_out, train = ("".join(line for of, line in lines if (of == fold) is held) for held in (True, False))
        write_atomically(folder / f"fold-{fold}" / "held_out.jsonl", held_out)
        write_atomically(folder / f"fold-{fold}" / "train.jsonl", train)


def _questions(rows: Iterable[dict[str, Any]]) -> int:
    """How many there are: a row each in the short form, rows of one prompt in the long one."""
    return len({_text(row) if "completion" in row else index for index, row in enumerate(rows)})


def _text(row: dict[str, Any]) -> str:
    prompt = clean_prompt(row["prompt"])
    is_messages = not isinstance(prompt, str)
    return question_text({"prompt": json.dumps(prompt) if is_messages else prompt, "is_messages": is_messages})


def plain_student(recipe: Recipe, study: Path, digests: dict[Path, str]) -> str:
    """The student's folder: a GGUF file takes half a minute to read, so each is read once a study.

    STUDY/students.json holds of which file each folder is; an older study's is of the first that is asked for.

    Args:
        digests: of files that were looked at before.
    """
    if not recipe.student.model.endswith(".gguf"):
        return recipe.student.model
    note = study / "students.json"
    known = json.loads(note.read_text()) if note.exists() else {}
    file = Path(recipe.student.model).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"student.model={recipe.student.model}: no such file")
    if file not in digests:
        digests[file] = fingerprint(file)
    first = known.get("student", digests[file]) == digests[file]
    folder = study / ("student" if first else f"student-{digests[file][:12]}")
    if folder.name not in known:
        write_atomically(note, json.dumps({**known, folder.name: digests[file]}, indent=1))
    if not folder.exists():
        model, tokenizer = load_student(replace(recipe.student, lora=None, compile=False), seed=0, projections=False)
        save_model(unwrap(model), tokenizer, folder)
    return str(folder)
