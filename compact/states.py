"""What a run did to its student's inside: evidence along rationales, latent space, and what each metric sees.

The student as it was and as it is read the same questions with the same rationales: held-out ones where they have
rationales, else those of the training. Everything is measured at the same positions, in the dtype of the student;
what is kept and compared is float32.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from tqdm import tqdm

from compact.collate import Collator, to_device
from compact.config import Recipe
from compact.data import load_questions, split, tokenize_questions
from compact.drift import base_student
from compact.errors import UserError
from compact.evaluate import load_run
from compact.files import write_atomically
from compact.loss import distillation_loss
from compact.metrics import PEAK, SIGNS
from compact.run_folder import finished_recipe
from compact.statistics import auc, chance_of_cka, linear_cka, mean, pca_shift
from compact.strategies.baselines import Uniform
from compact.strategies.compact import Compact
from compact.student import prepare
from compact.training_data import check_inputs
from compact_kernels.rule import question_zscore

QUESTIONS = 64
BATCH = 8  # questions


def read_states(run: Path, questions: int = QUESTIONS) -> dict[str, Any]:
    """Measure both students of a finished run; write RUN/analysis/states.npz and states.json and give the latter.

    Raises:
        UserError: the run is not finished, or its data or first student is no longer where it was.
    """
    student, tokenizer = load_run(run)
    recipe = finished_recipe(run)
    items, teachers = run_items(recipe, tokenizer, run, questions)
    base = base_student(recipe, student)
    projections = recipe.consensus.affinity == "attention"
    collate = Collator(tokenizer, ifd=recipe.difficulty.kind == "ifd")
    found = {
        when: _measure(prepare(model, projections=projections), items, recipe, teachers, collate)
        for when, model in (("before", base), ("after", student.eval()))
    }
    wrong, teacher = (found["before"][name] for name in ("wrong", "teacher"))
    arrays = {f"{name}_{when}": value for when, values in found.items() for name, value in values.items()}
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    write_atomically(run / "analysis" / "states.npz", packed.getvalue())
    content = summary(found, wrong, teacher, teachers)
    content |= {"questions": len(items), "peak": PEAK}
    write_atomically(run / "analysis" / "states.json", json.dumps(content, indent=1))
    return content


def run_items(recipe: Recipe, tokenizer: Any, run: Path, count: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The first questions of a run with several rationales, in tokens, and the teachers' names in the run's order.

    Held-out ones, if any of those has several rationales of teachers that the run knows.

    Raises:
        UserError: none of them has several, or the run's files have changed since.
    """
    check_inputs(run, recipe)
    teachers = json.loads((run / "data_report.json").read_text())["teachers"]

    def known(row: dict[str, Any]) -> list[dict[str, Any]]:
        return [rationale for rationale in row["rationales"] if rationale["teacher"] in teachers]

    for rows in _questions(recipe, run / "cache"):
        rows = rows.filter(lambda row: len(known(row)) > 1)
        if len(rows):
            few = rows.select(range(min(count, len(rows)))).map(lambda row: {"rationales": known(row)})
            tokens, _ = tokenize_questions(few, tokenizer, recipe.data, teachers=teachers, cache_dir=run / "cache")
            return list(tokens), teachers
    raise UserError(f"{run}: no question has several rationales, so there is nothing to compare")


def _questions(recipe: Recipe, cache: Path) -> Iterator[Dataset]:
    """The held-out ones, and then all that the run trained on."""
    data = recipe.data
    assert data.train is not None
    if data.held_out is not None:
        yield load_questions(data.held_out, answer_kind=data.answer_kind, cache_dir=cache)[0]
    train, _ = load_questions(data.train, answer_kind=data.answer_kind, cache_dir=cache)
    if data.held_out is None:
        yield split(train, data.holdout, recipe.seed)[1]
    yield train


def without_encoder(recipe: Recipe) -> Recipe:
    """Sentence embeddings are of the training's rationales alone; elsewhere the cosine of states takes their place."""
    if recipe.consensus.affinity != "sentence":
        return recipe
    return replace(recipe, consensus=replace(recipe.consensus, affinity="cosine", encoder=None))


@torch.no_grad()
def _measure(
    model: nn.Module, items: Sequence[dict[str, Any]], recipe: Recipe, teachers: Sequence[str], collate: Collator
) -> dict[str, Any]:
    """(S, …) of all rationales: pooled and last states, metrics and their z-scores, α under each metric, peaks."""
    device = next(model.parameters()).device
    compact, uniform = Compact(recipe, teachers), Uniform(recipe, teachers)
    recipe = without_encoder(recipe)
    columns: dict[str, list[np.ndarray]] = {}

    def keep(name: str, value: Any) -> None:
        value = value.float().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        columns.setdefault(name, []).append(value)

    for start in tqdm(range(0, len(items), BATCH), desc="states", leave=False, disable=None):
        few = items[start : start + BATCH]
        batch = to_device(collate(list(few)), device)
        ragged = batch["ragged"]
        result, context = distillation_loss(model, batch, uniform, recipe)
        statistics = result.statistics
        keep("pooled", context.pooled)
        assert context.output is not None
        keep("last", context.output.eos_hidden)
        keep("alpha", compact.weights(statistics, context))
        compared = compact.compared(statistics)
        for name, sign in SIGNS.items():
            keep(name, getattr(statistics, name))
            keep(f"z_{name}", sign * question_zscore(getattr(compared, name), ragged))
        rationales = [rationale for item in few for rationale in item["rationales"]]
        keep("teacher", [rationale["teacher"] for rationale in rationales])
        keep("wrong", [rationale["wrong"] for rationale in rationales])
        evidence = statistics.tokens.evidence.float().cpu().numpy()
        offsets = ragged.host.cu_rows.tolist()
        jumps = [
            np.diff(evidence[first : first + rationale["body_length"] + 1])
            for first, rationale in zip(offsets, rationales)
        ]
        keep("peaks", [float((jump > PEAK).sum()) for jump in jumps])
        keep("sharpest", [float(jump.max(initial=0.0)) for jump in jumps])
        keep("rise", [float(jump.sum()) for jump in jumps])
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def summary(
    found: Mapping[str, Mapping[str, np.ndarray]], wrong: np.ndarray, teacher: np.ndarray, teachers: Sequence[str]
) -> dict[str, Any]:
    """The numbers of :func:`read_states`, from its arrays."""
    before, after = found["before"], found["after"]
    by_teacher: dict[str, Any] = {}
    for index, name in enumerate(teachers):
        own = teacher == index
        if own.any():
            by_teacher[name] = {
                "wrong": float(wrong[own].mean()),
                **{
                    when: {column: float(values[column][own].mean()) for column in _COLUMNS}
                    for when, values in found.items()
                },
            }
    return {
        "cka": {layer: linear_cka(before[layer], after[layer]) for layer in ("pooled", "last")},
        "cka_of_chance": {layer: chance_of_cka(before[layer], after[layer]) for layer in ("pooled", "last")},
        "pca_shift": {layer: pca_shift(before[layer], after[layer])["shift"] for layer in ("pooled", "last")},
        "trajectories": {
            when: {name: mean(values[name].tolist()) for name in ("peaks", "sharpest", "rise")}
            for when, values in found.items()
        },
        "teachers": by_teacher,
        "finds_wrong": {
            when: {name: auc(values[f"z_{name}"], wrong) for name in SIGNS} | {"alpha": auc(values["alpha"], wrong)}
            for when, values in found.items()
        },
    }


_COLUMNS = ("alpha", *(f"z_{name}" for name in SIGNS), *SIGNS, "peaks", "sharpest", "rise")
