"""Whose gradients move a student, rationale by rationale: norms beside what else is known of a rationale.

python -m compact.influence RUN      writes RUN/analysis/influence.json and .npz, and pictures/norms.png

Length moves a gradient's norm by itself (a mean over more tokens cancels more), so every correlation is given twice:
as it is, and with length partialled out.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from compact.collate import Collator, to_device
from compact.commandline import positive
from compact.config import Recipe
from compact.drift import base_student
from compact.errors import UserError
from compact.evaluate import load_run
from compact.files import write_atomically
from compact.loss import Denominators, distillation_loss
from compact.run_folder import finished_recipe
from compact.states import BATCH, QUESTIONS, run_items, without_encoder
from compact.statistics import partial_spearman, ranks, residual, spearman
from compact.strategies.compact import Compact
from compact.student import prepare
from compact_kernels import SampleGradNorms

COLUMNS = ("difficulty", "adaptability", "wrong")  # what a norm is correlated with


def read_influence(run: Path, questions: int = QUESTIONS) -> dict[str, Any]:
    """Norms of both students of a finished run on its questions; gives the content of influence.json.

    Of every rationale: n, the norm of its own loss's gradient over all parameters, α by COMPACT's rule, and u, the
    norm of what flows through it under α, each question by itself (Q = 1).

    Raises:
        UserError: the run is not finished, or has parameters whose norms are not covered.
    """
    student, tokenizer = load_run(run)
    recipe = finished_recipe(run)
    items, teachers = run_items(recipe, tokenizer, run, questions)
    models = {"before": base_student(recipe, student), "after": student}
    arrays: dict[str, np.ndarray] = {}
    content: dict[str, Any] = {"questions": len(items), "teachers": teachers}
    recipe = without_encoder(recipe)
    projections = recipe.consensus.affinity == "attention"
    for when, model in models.items():
        prepared = prepare(model.requires_grad_(True).eval(), projections=projections)
        found = _measure(prepared, items, recipe, teachers, Collator(tokenizer))
        arrays |= {f"{name}_{when}": value for name, value in found.items()}
        content[when] = summary(found, teachers)
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
    write_atomically(run / "analysis" / "influence.npz", packed.getvalue())
    write_atomically(run / "analysis" / "influence.json", json.dumps(content, indent=1))
    return content


def _measure(
    model: nn.Module, items: Sequence[dict[str, Any]], recipe: Recipe, teachers: Sequence[str], collate: Collator
) -> dict[str, np.ndarray]:
    """(S,) each, of all rationales."""
    device = next(model.parameters()).device
    plain_gradients = replace(recipe.gradients, cap=None, cap_by="hidden", norms="off")
    recipe = replace(recipe, gradients=plain_gradients, difficulty=replace(recipe.difficulty, kind="loss"))
    alone = replace(recipe, divergence=replace(recipe.divergence, weight=0.0))
    strategy, one = Compact(recipe, teachers), Denominators(1.0, 1.0)
    try:
        recorder = SampleGradNorms(model)
    except ValueError as error:
        raise UserError(f"compact.influence: {error}") from error
    parts: dict[str, list[torch.Tensor]] = {}
    for start in tqdm(range(0, len(items), BATCH), desc="norms", leave=False, disable=None):
        few = items[start : start + BATCH]
        batch = to_device(collate(list(few)), device)
        ragged = batch["ragged"]
        with recorder.record(ragged) as own:
            weights = torch.ones(ragged.num_sequences, device=device)
            distillation_loss(model, batch, None, alone, weights=weights, denominators=one)[0].loss.backward()
        model.zero_grad(set_to_none=True)
        n = own.norms
        with recorder.record(ragged) as flowed:
            result = distillation_loss(model, batch, strategy, recipe, denominators=one)[0]
            result.loss.backward()
        statistics = result.statistics
        columns = {"n": n, "u": flowed.norms, "alpha": result.alpha, "tokens": ragged.cu_rows.diff()}
        columns |= {"difficulty": statistics.difficulty, "adaptability": statistics.adaptability}
        columns["teacher"] = batch["teachers"]
        columns["wrong"] = torch.tensor([rationale["wrong"] for item in few for rationale in item["rationales"]])
        for name, value in columns.items():
            parts.setdefault(name, []).append(value.detach().float().cpu())
        model.zero_grad(set_to_none=True)
    recorder.remove()
    return {name: torch.cat(values).numpy() for name, values in parts.items()}


def summary(found: Mapping[str, np.ndarray], teachers: Sequence[str]) -> dict[str, Any]:
    """Correlations of the norms, raw and with length partialled out, and each teacher's means."""
    n, length = found["n"], found["tokens"]
    left = residual(ranks(n), ranks(length)) / len(n)
    by_teacher = {}
    for index, name in enumerate(teachers):
        own = found["teacher"] == index
        if own.any():
            by_teacher[name] = {key: float(found[key][own].mean()) for key in ("tokens", "n", "alpha", "u")}
            by_teacher[name]["n_without_length"] = float(left[own].mean())
    return {
        "length": spearman(n, length),
        "correlations": {
            key: {
                "raw": spearman(n, found[key]),
                "without_length": partial_spearman(n, found[key], length),
                "without_length_and_loss": None
                if key == "difficulty"
                else partial_spearman(n, found[key], length, found["difficulty"]),
            }
            for key in COLUMNS
        },
        "alpha_and_influence": spearman(found["alpha"], found["u"]),
        "teachers": by_teacher,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compact.influence", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--questions", type=positive, default=QUESTIONS, help="how many to read; default: %(default)s")
    options = parser.parse_args(arguments)
    from compact.analyze import write_report

    try:
        read_influence(options.run, options.questions)
        write_report(options.run)
    except UserError as error:
        print(f"compact.influence: {error}", file=sys.stderr)
        return 2
    print(options.run / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
