"""Studies: grids and their mistakes, cells that go on, the statistics, and a small study from end to end."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from compact.errors import UserError
from compact.results import load_results
from compact.study.__main__ import main
from compact.study.grid import embedded_grids, load_grid
from compact.study.runner import locked
from compact.study.statistics import crossed, t_quantile
from tests.test_train import ROOT, save_student, write_rows
from tests.toy_run import toy_rows

SMALL = {
    "recipe": "skills",
    "set": {
        "student.lora.rank": 2,
        "data.max_length": 250,
        "training.max_steps": 2,
        "training.per_device_train_batch_size": 2,
        "training.use_cpu": True,
        "evaluation.max_new_tokens": 2,
    },
    "settings": {"few": {"skills": {"questions": 16, "held_out": 4}}},
    "methods": {"compact": None, "uniform": None, "single:nobody": None},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    save_student(folder / "student", max_position_embeddings=512)
    write_rows(folder / "held.jsonl", [{"question": "How many?", "explanation": "Two and two are four."}] * 3)
    return folder


def grid_file(folder: Path, toy: Path, **changes) -> Path:
    content = {**SMALL, "study": str(folder / "study"), **changes}
    content["set"] = {
        **SMALL["set"],
        "student.model": str(toy / "student"),
        "evaluation.held_text": str(toy / "held.jsonl"),
        **changes.get("set", {}),
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory) -> tuple[Path, Path, int]:
    folder = tmp_path_factory.mktemp("finished")
    path = grid_file(folder, toy)
    return path, folder / "study", main([str(path), "--parallel", "2"])


def test_a_study_ends_in_records_and_a_table_although_a_cell_failed(finished):
    _, study, code = finished
    content = json.loads((study / "study.json").read_text())
    assert code == 1 and list(content["failed"]) == ["few/single-nobody/seed-0"]
    assert "nobody" in content["failed"]["few/single-nobody/seed-0"]
    records = content["records"]
    fields = {"setting", "method", "task", "split", "mean", "se", "seeds", "diff_vs_uniform", "diff_ci95"}
    assert all(fields <= record.keys() for record in records)
    by_key = {(r["method"], r["task"], r["measure"]): r for r in records}
    assert {r["method"] for r in records} == {"before training", "compact", "uniform"}
    assert {r["split"] for r in records} == {"id", "ood", "forgetting"}
    assert by_key["uniform", "held_out", "accuracy"]["diff_vs_uniform"] is None
    ours, theirs = by_key["compact", "tasks", "answer_logprob"], by_key["uniform", "tasks", "answer_logprob"]
    assert ours["diff_vs_uniform"] == pytest.approx(ours["mean"] - theirs["mean"], abs=1e-9)
    assert ours["diff_ci95"][0] < ours["diff_vs_uniform"] < ours["diff_ci95"][1]
    assert by_key["compact", "held_text", "kl"]["mean"] > 0
    text = (study / "study.md").read_text()
    assert "1 cells failed" in text and "nobody" in text and "| compact |" in text


def test_cells_are_runs_whose_evaluation_before_training_was_made_once(finished):
    _, study, _ = finished
    cells = study / "cells" / "few"
    base = (study / "base" / "few" / "evaluation" / "before" / "tasks.jsonl").read_bytes()
    for method in ("compact", "uniform"):
        run = cells / method / "seed-0"
        assert (run / "report.md").exists() and (run / "student" / "config.json").exists()
        assert (run / "evaluation" / "before" / "tasks.jsonl").read_bytes() == base
        assert not (run / "checkpoints").exists()


def test_a_finished_study_trains_nothing_again_and_a_failed_cell_is_tried_again(finished):
    path, study, _ = finished
    before = {file: file.stat().st_mtime_ns for file in (study / "cells").rglob("metrics.jsonl")}
    failure = study / "cells" / "few" / "single-nobody" / "seed-0" / "failed.txt"
    old = failure.stat().st_mtime_ns
    assert len(before) == 2 and main([str(path)]) == 1
    assert before == {file: file.stat().st_mtime_ns for file in (study / "cells").rglob("metrics.jsonl")}
    assert failure.stat().st_mtime_ns > old


def test_two_studies_do_not_write_to_one_folder(tmp_path):
    with locked(tmp_path / "study"):
        with pytest.raises(UserError, match="another study is writing to it.*--study"):
            with locked(tmp_path / "study"):
                pass
    with locked(tmp_path / "study"):
        pass


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"methods": ["compcat", "uniform"]}, r"grid.yaml:\d+: methods: 'compcat' is no known method.*mean compact\?"),
        ({"methods": {"mine": {"strtegy": "uniform"}, "uniform": None}}, r"grid.yaml:\d+: .*strtegy.*mean strategy"),
        ({"sedes": [1]}, r"grid.yaml:\d+: sedes: unknown key.*mean seeds"),
        ({"baseline": "compcat"}, r"grid.yaml:\d+: baseline: 'compcat' is none of the methods"),
        ({"seeds": [0, 0]}, "seeds: .*each once"),
        ({"recipe": "skils"}, "skils: no such file.*mean skills"),
        ({"settings": {"a": {"skills": {"questoins": 9}}}}, "skills.questoins: unknown key.*skills.questions"),
        ({"settings": {"a": {"folds": 1}}}, "folds: 1 is not a whole number of at least 2"),
        ({"methods": []}, "methods: name at least one"),
    ],
)
def test_a_mistaken_grid_is_named_with_its_line(toy, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_grid([str(grid_file(tmp_path, toy, **changes))])


def test_a_value_that_no_recipe_can_have_fails_its_cell_alone(toy, tmp_path):
    from compact.study.runner import _jobs

    methods = {"uniform": None, "broken": {"weights.temperature": -1}}
    grid, cells, _ = load_grid([str(grid_file(tmp_path, toy, methods=methods))])
    jobs = _jobs(grid, cells, Path(grid.study))
    assert [job.name for job in jobs] == ["base of few", "few/uniform/seed-0"]
    other, _, _ = load_grid([str(grid_file(tmp_path, toy, methods=["no_consensus", "uniform"])), "--seeds", "[5]"])
    again = _jobs(other, load_grid([str(tmp_path / "grid.yaml"), "--seeds", "[5]"])[1], Path(grid.study))
    assert [job.name for job in again] == ["base of few", "few/no_consensus/seed-5", "few/uniform/seed-5"]
    assert all(job.needs is again[0] for job in again[1:])  # whatever methods and seeds come later
    said = (Path(grid.study) / "cells" / "few" / "broken" / "seed-0" / "failed.txt").read_text()
    assert "weights.temperature: -1 is out of range" in said


def test_a_line_of_yaml_adds_a_method_and_flags_reach_every_cell(toy, tmp_path):
    path = grid_file(tmp_path, toy, methods={"uniform": None, "hot": {"weights": {"temperature": 3}}})
    grid, cells, _ = load_grid([str(path), "--seeds", "[3, 4]", "--set.training.learning_rate", "0.5"])
    from compact.study.data import recipe_of

    assert [cell.name for cell in cells] == [f"few/{m}/seed-{s}" for s in (3, 4) for m in ("uniform", "hot")]
    recipe = recipe_of(cells[1], tmp_path / "study")
    assert recipe.weights.temperature == 3 and recipe.training["learning_rate"] == 0.5 and recipe.seed == 3
    assert Path(recipe.data.train).name == "train-3.jsonl"
    held_out = Path(recipe.data.held_out).read_bytes()
    assert held_out == Path(recipe_of(cells[3], tmp_path / "study").data.held_out).read_bytes()


def test_folds_hold_every_question_out_once(toy, tmp_path):
    from compact.study.data import recipe_of

    write_rows(tmp_path / "questions.jsonl", toy_rows(11))
    path = grid_file(
        tmp_path,
        toy,
        settings={"f": {"folds": 3}},
        methods=["uniform"],
        set={"data.train": str(tmp_path / "questions.jsonl")},
    )
    _, cells, _ = load_grid([str(path)])
    held = []
    for cell in cells:
        recipe = recipe_of(cell, tmp_path / "study")
        parts = [
            [json.loads(line)["prompt"] for line in Path(file).read_text().splitlines()]
            for file in (recipe.data.train, recipe.data.held_out)
        ]
        assert not set(parts[0]) & set(parts[1]) and len(parts[0]) + len(parts[1]) == 11
        held += parts[1]
    assert len(cells) == 3 and sorted(held) == sorted(row["prompt"] for row in toy_rows(11))


@pytest.mark.parametrize("name", embedded_grids())
def test_the_grids_of_the_package_are_grids(name, tmp_path):
    flags = ["--set.student.model", "x", "--set.data.train", "y.jsonl"]
    _, cells, _ = load_grid([name, *flags])
    assert cells and all(cell.tree.value["student"].value["model"].value == "x" for cell in cells)


def test_quantiles_are_student_s():
    # From printed tables.
    for dof, expected in ((1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (100, 1.984)):
        assert t_quantile(0.975, dof) == pytest.approx(expected, abs=2e-3)


def test_intervals_of_crossed_samples_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits, naive = 0, 0
    for _ in range(300):
        table = rng.normal(0, 0.5, (5, 1)) + rng.normal(0, 1, (1, 40)) + rng.normal(0, 1, (5, 40))
        estimate = crossed(table)
        low, high = estimate.interval()
        hits += low < 0 < high
        half = 1.96 * table.std() / math.sqrt(table.size)
        naive += abs(table.mean()) < half
    assert 0.92 <= hits / 300 <= 1 and naive / 300 < 0.8


def test_one_seed_or_one_question_leaves_an_ordinary_mean():
    values = np.array([[1.0, 2.0, 4.0]])
    assert crossed(values).se == pytest.approx(values.std(ddof=1) / 3**0.5)
    assert crossed(values.T).se == crossed(values).se
    assert crossed(np.ones((1, 1))).se is None and crossed(np.ones((3, 4))).interval() == [1, 1]


def test_branches_are_merged_by_the_mean_of_their_weights(toy, tmp_path, monkeypatch):
    import compact.analyze
    from compact.study import cell as cells_module
    from compact.study.data import recipe_of

    monkeypatch.setattr(compact.analyze, "_draw", lambda run, content: {})
    path = grid_file(
        tmp_path, toy, methods={"uniform": None, "merge_of_thought": None}, set={"training.disable_tqdm": True}
    )
    _, cells, _ = load_grid([str(path)])
    assert [cell.merge for cell in cells] == [0, 1]
    recipe = recipe_of(cells[1], tmp_path / "study")
    branches = []

    def remembered(folders):
        model = averaged(folders)
        branches.append(([AutoModelForCausalLM.from_pretrained(f).state_dict() for f in folders], model.state_dict()))
        return model

    averaged = cells_module.averaged
    monkeypatch.setattr(cells_module, "averaged", remembered)
    cells_module.run_merged(recipe, 1)
    (states, mean), run = branches[0], Path(recipe.run)
    assert len(states) == 4
    for name, value in mean.items():
        assert torch.allclose(value, sum(state[name] for state in states) / 4, atol=1e-6)
    assert any(not torch.equal(states[0][name], states[1][name]) for name in mean)
    saved = AutoModelForCausalLM.from_pretrained(run / "student").state_dict()
    assert all(torch.equal(saved[name], mean[name]) for name in mean)
    assert (run / "report.md").exists() and not (run / "branches").exists()
    assert load_results(run, "after")[0].keys() == {"held_out", "wordings", "tasks"}


def test_a_study_that_is_stopped_stops_its_cells_and_the_same_command_goes_on(toy, tmp_path):
    path = grid_file(
        tmp_path, toy, methods=["uniform"], settings={"few": {"skills": {"questions": 16, "held_out": 2}}}
    )
    study = tmp_path / "study"
    command = [sys.executable, "-m", "compact.study", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 240
    while not (study / "base" / "few" / "log.txt").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in said
    with locked(study):  # no cell is left to hold it
        assert not (study / "study.json").exists()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode == 0
    assert json.loads((study / "study.json").read_text())["failed"] == {}
