"""What a run did to its student's inside: the measures against their definitions, and a toy run looked into."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch

import compact.analyze
from compact import influence
from compact.controls import controlled
from compact.data import load_questions, split
from compact.drift import read_texts, token_divergences
from compact.evaluate import load_run
from compact.run_folder import finished_recipe
from compact.states import run_items
from compact.statistics import auc, chance_of_cka, linear_cka, pca_shift
from compact.train import main
from tests.toy_run import save_student, toy_model, toy_rows, toy_trainer, write_rows
from tests.train_cases import flags


def test_cka_is_one_for_a_rotation_and_small_for_what_has_nothing_to_do_with_it():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 8))
    rotation, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    assert linear_cka(x, rng.normal(size=(400, 8))) < 0.1
    assert linear_cka(x, np.ones((400, 3))) is None
    few, others = rng.normal(size=(2, 24, 32))  # fewer items than dimensions: far above 0 by chance
    assert 0.4 < linear_cka(few, others) == pytest.approx(chance_of_cka(few, few), abs=0.1)


def test_the_shift_is_measured_in_the_spread_of_the_states_before():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 5)) * [10, 5, 1, 1, 1]
    _, _, directions = np.linalg.svd(x - x.mean(0), full_matrices=False)
    spread = np.sqrt((((x - x.mean(0)) @ directions[:2].T) ** 2).sum(1).mean())
    assert pca_shift(x, x)["shift"] == pytest.approx(0, abs=1e-9)
    assert pca_shift(x, x + 3 * spread * directions[0])["shift"] == pytest.approx(3)
    assert pca_shift(x, x + 100 * directions[4])["shift"] == pytest.approx(0, abs=1e-9)


def test_auc_is_the_share_of_pairs_in_the_right_order():
    assert auc(np.array([1.0, 2.0, 3.0, 2.0]), np.array([0, 1, 0, 0])) == pytest.approx((0 + 1 + 0.5) / 3)
    assert auc(np.array([1.0, 2.0]), np.array([0, 0])) is None


def test_the_distance_from_the_base_is_the_divergence_of_the_distributions():
    base, student = toy_model(0).eval(), toy_model(1).eval()
    ids = [[5, 6, 7, 8, 9], [10, 11]]
    got = token_divergences(base, student, ids)
    for row, value in zip(ids, got):
        with torch.no_grad():
            p, q = (m(torch.tensor([row])).logits[0].double().log_softmax(-1) for m in (base, student))
        assert value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert token_divergences(base, base, ids) == [0, 0]


def test_held_text_is_of_every_kind_of_row_and_counts_only_what_says_something(tmp_path):
    rows = [{"text": ""}, {"prompt": [{"role": "user", "content": "hi"}], "answer": 3}, {"text": "a", "answer": "b"}]
    for suffix in ("jsonl", "ndjson", "json"):
        path = tmp_path / f"held.{suffix}"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert read_texts(path) == ["hi", "a\nb"] and read_texts(path, limit=1) == ["hi"]


def test_controls_spoil_what_they_name_and_nothing_else(tmp_path):
    dataset = toy_trainer(tmp_path).train_dataset
    shuffled, wrong = controlled(dataset, "shuffled_mask"), controlled(dataset, "wrong_answer")
    moved = 0
    for item, other, false in zip(dataset, shuffled, wrong):
        assert item["evidence_ids"] == other["evidence_ids"] != false["evidence_ids"]
        assert item["rationales"] == false["rationales"]
        for a, b in zip(item["rationales"], other["rationales"]):
            assert sum(a["thinking"]) == sum(b["thinking"])
            assert a["thinking"][a["body_length"] :] == b["thinking"][a["body_length"] :]
            moved += a["thinking"] != b["thinking"]
            assert {k: v for k, v in a.items() if k != "thinking"} == {k: v for k, v in b.items() if k != "thinking"}
    assert moved > 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    save_student(folder / "student")
    write_rows(folder / "questions.jsonl", toy_rows(31))  # of which 6 are held out
    (folder / "recipe.yaml").write_text("strategy: compact\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact.analyze, "_draw", lambda run, content: {})
        options = {"training__max_steps": 3, "student__lora": None, "student__lora__rank": None}
        assert main(flags(folder, folder / "run", **options)) == 0
    return folder / "run"


def test_analyze_looks_into_the_student_and_the_report_tells(run):
    assert compact.analyze.main([str(run)]) == 0
    states = json.loads((run / "analysis" / "states.json").read_text())
    arrays = np.load(run / "analysis" / "states.npz", allow_pickle=False)
    assert 0 < states["cka"]["pooled"] <= 1 and states["pca_shift"]["pooled"] > 0
    teacher, alpha = arrays["teacher_after"], arrays["alpha_after"]
    assert alpha.sum() == pytest.approx(states["questions"], abs=1e-4)
    assert set(states["teachers"]) == {"terse", "wordy", "wrong"}
    for index, name in enumerate(("terse", "wordy", "wrong")):
        of = states["teachers"][name]
        assert of["wrong"] == (name == "wrong")
        assert of["after"]["alpha"] == pytest.approx(alpha[teacher == index].mean(), abs=1e-6)
    score = sum(arrays[f"z_{name}_after"] for name in ("adaptability", "consensus", "difficulty"))
    assert (alpha[score == score.max()] > 1 / 3).all()
    assert states["finds_wrong"]["after"]["alpha"] is not None
    text = (run / "report.md").read_text()
    assert "Inside the student" in text and "Linear CKA" in text
    assert f"shuffled: {states['cka_of_chance']['pooled']:.3f}" in text
    pictures = {path.stem for path in (run / "pictures").iterdir()}
    assert {"latent", "metrics", "evidence", "weights"} <= pictures
    assert ("tsne" in pictures) == _has_sklearn() != ("scikit-learn is not installed" in text)


def test_teachers_keep_the_run_s_order_and_what_was_held_out_is_read(run, tmp_path):
    """Whoever stands first in the few questions that are read."""
    recipe = finished_recipe(run)
    report = json.loads((run / "data_report.json").read_text())
    shutil.copytree(run, tmp_path / "run")
    report["teachers"] = report["teachers"][::-1]
    (tmp_path / "run" / "data_report.json").write_text(json.dumps(report))
    _, tokenizer = load_run(run)
    (items, names), (other, reversed_names) = (run_items(recipe, tokenizer, f, 9) for f in (run, tmp_path / "run"))
    assert names == reversed_names[::-1]
    for one, two in zip(items, other, strict=True):
        ours, theirs = ([rationale["teacher"] for rationale in item["rationales"]] for item in (one, two))
        assert [names[index] for index in ours] == [reversed_names[index] for index in theirs]
    questions, _ = load_questions(recipe.data.train, cache_dir=tmp_path / "cache")
    held_out = {row["id"] for row in split(questions, recipe.data.holdout, recipe.seed)[1]}
    assert items and {item["id"] for item in items} <= held_out


def test_norms_are_read_of_both_students_and_correlated_without_length(run):
    assert influence.main([str(run), "--questions", "6"]) == 0
    content = json.loads((run / "analysis" / "influence.json").read_text())
    arrays = np.load(run / "analysis" / "influence.npz", allow_pickle=False)
    assert content["questions"] == 6 and set(content["after"]["teachers"]) == {"terse", "wordy", "wrong"}
    one = arrays["alpha_after"] > 0
    assert (arrays["n_after"] > 0).all() and (arrays["u_after"][one] > 0).all()
    assert content["after"]["correlations"]["wrong"]["without_length"] is not None
    text = (run / "report.md").read_text()
    assert "## Gradient norms" in text and "with length partialled out" in text
    assert (run / "pictures" / "norms.png").stat().st_size > 10_000


def test_a_correlation_that_length_makes_is_gone_without_it():
    rng = np.random.default_rng(0)
    length = rng.integers(5, 60, 400).astype(float)
    one, other = length + rng.normal(size=400), length + rng.normal(size=400)
    assert influence.spearman(one, other) > 0.98
    assert abs(influence.partial_spearman(one, other, length)) < 0.15
    assert influence.partial_spearman(one + other, other, length) > 0.3
    assert influence.spearman(one, np.ones(400)) is None
    assert influence.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]


def test_without_scikit_learn_the_message_says_how_to_get_it(monkeypatch):
    from compact.pictures.states import tsne

    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        tsne(np.ones((5, 3)))


def _has_sklearn() -> bool:
    import importlib.util

    return importlib.util.find_spec("sklearn") is not None
