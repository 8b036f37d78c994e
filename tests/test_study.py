"""Studies: grids and their mistakes, cells that go on, the statistics, and a small study from end to end."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import compact.analyze
from compact.errors import UserError
from compact.results import TaskResult, load_results, store_results
from compact.study import cell, runner, summary
from compact.study.__main__ import main
from compact.study.data import recipe_of
from compact.study.grid import Cell, embedded_grids, load_grid
from compact.study.runner import locked
from compact.study.statistics import crossed, t_quantile
from tests.toy_run import save_student, toy_rows, write_rows
from tests.train_cases import ROOT

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


class InProcess:
    """A worker in this process and without pictures: imports and pictures are what a tiny cell spends its time on."""

    alive = True

    def __init__(self, device, lock):
        self.device, self.job = device, None

    def start(self, job, at_once):
        self.job = job
        with pytest.MonkeyPatch.context() as patch, (job.folder / "log.txt").open("w") as log:
            patch.setattr(compact.analyze, "_draw", lambda run, content: {})
            with redirect_stdout(log), redirect_stderr(log):
                self.returncode = cell.main([str(job.folder), *job.arguments, f"--at_once={at_once}"])

    def code(self) -> int:
        return self.returncode

    def stop(self):
        pass


def study(*words) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "Worker", InProcess)
        return main([str(word) for word in words])


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory) -> tuple[Path, Path, int]:
    folder = tmp_path_factory.mktemp("finished")
    path = grid_file(folder, toy, keep_students=False, parallel=2)
    return path, folder / "study", study(path)


def test_a_study_ends_in_records_and_a_table_although_a_cell_failed(finished):
    _, folder, code = finished
    content = json.loads((folder / "study.json").read_text())
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
    text = (folder / "study.md").read_text()
    assert "1 cells failed" in text and "nobody" in text and "| compact |" in text


def test_the_page_is_made_of_study_json_alone(finished, tmp_path, capsys):
    _, folder, _ = finished
    shutil.copy(folder / "study.json", tmp_path)
    assert summary.main([str(tmp_path)]) == 0
    assert (tmp_path / "study.md").read_text() == (folder / "study.md").read_text()
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["few.png"]
    assert summary.main([str(folder / "cells")]) == 2 and "study.json" in capsys.readouterr().err


def test_cells_are_runs_whose_evaluation_before_training_was_made_once(finished):
    _, folder, _ = finished
    cells = folder / "cells" / "few"
    base = (folder / "base" / "few" / "evaluation" / "before" / "tasks.jsonl").read_bytes()
    for method in ("compact", "uniform"):
        run = cells / method / "seed-0"
        assert (run / "report.md").exists() and not (run / "student").exists()
        assert "cka" in json.loads((run / "analysis" / "states.json").read_text())  # looked into before it went
        assert (run / "evaluation" / "before" / "tasks.jsonl").read_bytes() == base
        assert not (run / "checkpoints").exists()


def test_a_finished_study_trains_nothing_again_and_a_failed_cell_is_tried_again(finished, capsys):
    path, folder, _ = finished
    before = {file: file.stat().st_mtime_ns for file in (folder / "cells").rglob("metrics.jsonl")}
    failure = folder / "cells" / "few" / "single-nobody" / "seed-0" / "failed.txt"
    old = failure.stat().st_mtime_ns
    assert len(before) == 2 and study(path) == 1
    assert before == {file: file.stat().st_mtime_ns for file in (folder / "cells").rglob("metrics.jsonl")}
    assert failure.stat().st_mtime_ns > old
    told = capsys.readouterr()
    assert "3/3 [" in told.err and "1 failed" in told.err  # cells, not what the untrained student was asked
    assert told.out.endswith(f"{folder / 'study.md'}\n")


def test_a_cell_that_another_grid_meant_otherwise_counts_again_under_its_own(finished):
    path, folder, _ = finished
    failure = folder / "cells" / "few" / "uniform" / "seed-0" / "failed.txt"
    other, cells, _ = load_grid([str(path), "--set.training.learning_rate", "0.5"])
    runner._jobs(other, cells, folder)
    said = failure.read_text()
    assert "uniform" not in {entry["method"] for entry in summary._weights(folder, cells)}
    assert "learning_rate" in said and "another folder with --study" in said
    grid, cells, _ = load_grid([str(path)])
    runner._jobs(grid, cells, folder)
    assert not failure.exists() and "uniform" in {entry["method"] for entry in summary._weights(folder, cells)}


def test_cells_that_failed_alike_are_told_together():
    content = {"study": "s", "cells": 3, "recipe": "r", "seeds": [0], "baseline": "uniform", "records": []}
    content |= {"weights": [], "seconds": None, "failed": {"a": "no such key", "b": "signal 9", "c": "no such key"}}
    told = summary._markdown(content, [])
    assert "**3 cells failed**" in told and "- `a`, `c`: no such key\n- `b`: signal 9" in told


def test_a_study_that_was_moved_goes_on_where_it_is(finished, toy, tmp_path):
    _, folder, _ = finished
    there = tmp_path / "moved" / "study"
    shutil.copytree(folder, there)
    kept = (there / "cells" / "few" / "uniform" / "seed-0" / "report.json").stat().st_mtime_ns
    shutil.rmtree(there / "cells" / "few" / "compact")
    path = grid_file(tmp_path / "moved", toy, keep_students=False, methods=["uniform", "compact"])
    assert study(path) == 0
    assert json.loads((there / "study.json").read_text())["failed"] == {}
    assert (there / "cells" / "few" / "uniform" / "seed-0" / "report.json").stat().st_mtime_ns == kept
    assert (there / "cells" / "few" / "compact" / "seed-0" / "report.json").exists()
    for cell_folder in (*(there / "cells" / "few").glob("[cu]*/seed-0"), there / "base" / "few"):
        assert str(folder) not in (cell_folder / "recipe.yaml").read_text()


def test_a_price_is_that_of_the_first_cell_times_what_is_missing(finished):
    path, folder, _ = finished
    failure = folder / "cells" / "few" / "single-nobody" / "seed-0" / "failed.txt"
    old = failure.stat().st_mtime_ns
    seconds = json.loads((folder / "study.json").read_text())["seconds"]
    assert seconds["missing"] == 1 and seconds["to_come"] == seconds["median"] > 0
    assert study(path, "--price", "--seeds", "[0, 1]") == 1
    assert failure.stat().st_mtime_ns == old  # the first cell alone
    seconds = json.loads((folder / "study.json").read_text())["seconds"]
    assert seconds["missing"] == 4 and seconds["to_come"] == 4 * seconds["median"]
    assert "4 are missing: at that price" in (folder / "study.md").read_text()


def test_a_study_does_not_go_on_with_other_questions(finished, capsys):
    path, folder, _ = finished
    other = yaml.safe_load(path.read_text())
    other["settings"]["few"]["skills"]["questions"] = 24
    changed = path.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump(other))
    grid, cells, _ = load_grid([str(changed), "--seeds", "[7]"])
    assert runner._jobs(grid, cells, folder) == []
    said = (folder / "cells" / cells[0].name / "failed.txt").read_text()
    assert "skills: " in said and '"questions": 16' in said and '"questions": 24' in said and "--study" in said


def test_what_every_fold_was_asked_counts_once_and_a_failed_fold_takes_its_seed_along(tmp_path):
    made = [Cell("s", "m", seed, fold, None, None, 2, 0) for seed in (0, 1) for fold in (0, 1)]
    for at in made:
        folder = tmp_path / "cells" / at.name
        answer = {"id": "x", "correct": at.fold == 0, "strict_correct": True, "answer_logprob": None, "options": 1}
        answer |= {"solution_logprob": None, "finished": True, "tokens": 1}
        results = {split: TaskResult(split, split, "number", [answer]) for split in ("id", "forgetting")}
        store_results(results, {}, folder, "after")
        (folder / "report.json").write_text("{}")
    (tmp_path / "cells" / made[3].name / "failed.txt").write_text("it ended with signal 9")
    found = summary._by_seed(tmp_path, made, "after")
    held_out, forgotten = ("id", "id", "accuracy"), ("forgetting", "forgetting", "accuracy")
    assert found == {0: {held_out: {"0/x": 100.0, "1/x": 0.0}, forgotten: {"x": 50.0}}}


def test_no_cell_is_started_that_would_not_be_finished_in_time(finished):
    path, folder, _ = finished
    assert study(path, "--seeds", "[0, 1]", "--minutes", "1e-4") == 1
    content = json.loads((folder / "study.json").read_text())
    assert content["seconds"]["missing"] == 4 and list(content["failed"]) == ["few/single-nobody/seed-0"]
    assert not (folder / "cells" / "few" / "uniform" / "seed-1" / "log.txt").exists()


def test_fewer_cells_at_once_are_expected_to_take_less_and_the_slowest_of_a_kind_speaks_for_it(tmp_path):
    job = runner.Job("mine", tmp_path, [], method="mine")
    known = [("mine", 100.0, 8), ("mine", 60.0, 4), ("other", 1000.0, 1)]
    assert runner._expected(job, known, 8) == 100 and runner._expected(job, known, 4) == 75
    assert runner._expected(job, [("other", 90.0, None)], 8) == 90 and runner._expected(job, [], 8) == 0


def test_the_cells_that_still_fit_are_started_when_all_at_once_would_not(toy, tmp_path, monkeypatch):
    """Of four at once each would take 16 s and of two 12 s: with 13 s left, two are begun."""

    class Started:
        alive, names = True, []

        def __init__(self, device, lock):
            self.device, self.job = device, None

        def start(self, job, at_once):
            self.job = job
            self.names.append(job.name)

        def code(self):
            return 2

        def stop(self):
            pass

    monkeypatch.setattr(runner, "Worker", Started)
    path = grid_file(tmp_path, toy, methods=["uniform"], parallel=4)
    grid, cells, _ = load_grid([str(path), "--seeds", "[0, 1, 2, 3, 4]"])
    monkeypatch.setattr(runner, "_known", lambda jobs: [("uniform", 16.0, 4)])
    monkeypatch.setattr(runner, "_jobs", lambda *_: [runner.Job(c.name, tmp_path, [], method=c.method) for c in cells])
    first_round = iter([0.0, 0.0])
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(first_round, 1e9))
    runner.run_cells(grid, cells, 0, minutes=13 / 60)
    assert Started.names == [c.name for c in cells[:2]]


def test_a_cell_that_was_stopped_during_its_analysis_is_finished(finished, tmp_path, monkeypatch, capsys):
    """Its student gone, as in an archive: it goes on with what its report says, at the price that it had."""
    _, folder, _ = finished
    cell_folder = tmp_path / "seed-0"
    shutil.copytree(folder / "cells" / "few" / "uniform" / "seed-0", cell_folder)
    recipe = cell_folder / "recipe.yaml"
    price = json.loads((cell_folder / "cell.json").read_text())
    recipe.write_text(re.sub(r"(?m)^run: .*$", f"run: {cell_folder}", recipe.read_text()))
    (cell_folder / "cell.json").unlink()
    assert cell.main([str(cell_folder), "--analyze", "--drop_student"]) == 0
    again = json.loads((cell_folder / "cell.json").read_text())
    assert again["seconds"] == pytest.approx(price["seconds"], rel=0.5) and again["at_once"] == 1

    (cell_folder / "cell.json").unlink()
    (cell_folder / "student").mkdir()

    def broken(_):
        assert (cell_folder / "cell.json").exists()
        raise MemoryError("all of it")

    monkeypatch.setattr(compact.analyze, "main", broken)
    assert cell.main([str(cell_folder), "--analyze"]) == 0  # what breaks an analysis breaks no cell
    assert "MemoryError: all of it" in capsys.readouterr().err


def test_a_worker_runs_cell_after_cell_until_one_breaks_it(tmp_path, monkeypatch, capfd):
    def main(arguments):
        print("at work on", arguments[1])
        if arguments[1] == "2":
            raise MemoryError("all of it")
        return 0

    asked = [[str(tmp_path / number), number] for number in "123"]
    for folder, _ in asked:
        Path(folder).mkdir()
    kept = [os.dup(1), os.dup(2)]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(cell, "main", main)
            patch.setattr(sys, "stdin", [json.dumps(words) for words in asked])
            for number, name in enumerate(("stdout", "stderr"), 1):
                patch.setattr(sys, name, os.fdopen(number, "w", closefd=False))
            assert cell.serve() == 1
    finally:
        for number, old in enumerate(kept, 1):
            os.dup2(old, number)
            os.close(old)
    assert capfd.readouterr().out == "0\n1\n"
    assert (tmp_path / "1" / "log.txt").read_text() == "at work on 1\n"
    assert "MemoryError: all of it" in (tmp_path / "2" / "log.txt").read_text()
    assert not (tmp_path / "3" / "log.txt").exists()


def test_a_worker_that_dies_costs_its_cell_and_no_other(toy, tmp_path, monkeypatch):
    stub = tmp_path / "python"  # what the runner starts in place of Python: it dies of the second cell
    stub.write_text(
        f"""#!/bin/sh
echo >> {tmp_path}/started
while read -r line; do
    folder=$(echo "$line" | sed 's/^."//; s/".*//')
    case $folder in *seed-1) kill -9 $$;; esac
    echo '{{"seconds": 1, "peak_reserved": 0}}' > "$folder/cell.json"
    echo 0
done
"""
    )
    stub.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(stub))
    path = grid_file(tmp_path, toy, methods=["uniform"], parallel=1)
    grid, cells, _ = load_grid([str(path), "--seeds", "[0, 1, 2]"])
    with locked(Path(grid.study)) as lock:
        runner.run_cells(grid, cells, lock)
    assert (tmp_path / "started").read_text().count("\n") == 2
    reasons = [tmp_path / "study" / "cells" / one.name / "failed.txt" for one in cells]
    assert [file.exists() for file in reasons] == [False, True, False]
    assert "signal 9" in reasons[1].read_text()


def test_a_grid_may_put_a_method_s_seeds_first(toy, tmp_path):
    path = grid_file(tmp_path, toy, methods=["uniform", "compact"], seeds=[1, 0], order="methods")
    names = [one.name for one in load_grid([str(path)])[1]]
    assert names == [f"few/{method}/seed-{seed}" for method in ("uniform", "compact") for seed in (1, 0)]


@pytest.mark.parametrize(
    "code, log, expected",
    [
        (2, "compact.study: no such teacher\n", "no such teacher"),
        (1, "Traceback\nMemoryError: all of it\n", "it ended with status 1 .*after: MemoryError: all of it"),
        (-9, "", "it ended with signal 9 .*after: nothing"),
    ],
)
def test_a_failed_cell_says_why(tmp_path, code, log, expected):
    job = runner.Job("cell", tmp_path, [])
    (tmp_path / "log.txt").write_text(log)
    assert not runner._finish(job, code)
    assert re.match(expected, job.error.read_text())


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
        ({"methods": {"mine": 0.3, "uniform": None}}, r"grid.yaml:\d+: methods.mine: a method is a mapping"),
        ({"sedes": [1]}, r"grid.yaml:\d+: sedes: unknown key.*mean seeds"),
        ({"baseline": "compcat"}, r"grid.yaml:\d+: baseline: 'compcat' is none of the methods"),
        ({"seeds": [0, 0]}, "seeds: .*each once"),
        ({"recipe": "skils"}, "skils: no such file.*mean skills"),
        ({"settings": {"a": {"skills": {"questoins": 9}}}}, "skills.questoins: unknown key.*skills.questions"),
        ({"settings": {"a.skills.questions": 9}}, r"settings.a.skills.questions: a setting is a mapping"),
        ({"settings": {"a": {"folds": 1}}}, "folds: 1 is not a whole number of at least 2"),
        ({"methods": []}, "methods: name at least one"),
    ],
)
def test_a_mistaken_grid_is_named_with_its_line(toy, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_grid([str(grid_file(tmp_path, toy, **changes))])


def test_a_value_that_no_recipe_can_have_fails_its_cell_alone(toy, tmp_path):
    methods = {"uniform": None, "broken": {"weights.temperature": -1}}
    grid, cells, _ = load_grid([str(grid_file(tmp_path, toy, methods=methods))])
    jobs = runner._jobs(grid, cells, Path(grid.study))
    assert [job.name for job in jobs] == ["base of few", "few/uniform/seed-0"]
    other, _, _ = load_grid([str(grid_file(tmp_path, toy, methods=["no_consensus", "uniform"])), "--seeds", "[5]"])
    again = runner._jobs(other, load_grid([str(tmp_path / "grid.yaml"), "--seeds", "[5]"])[1], Path(grid.study))
    assert [job.name for job in again] == ["base of few", "few/no_consensus/seed-5", "few/uniform/seed-5"]
    assert all(job.needs is again[0] for job in again[1:])  # whatever methods and seeds come later
    said = (Path(grid.study) / "cells" / "few" / "broken" / "seed-0" / "failed.txt").read_text()
    assert "weights.temperature: -1 is out of range" in said


def test_a_line_of_yaml_adds_a_method_and_flags_reach_every_cell(toy, tmp_path):
    path = grid_file(tmp_path, toy, methods={"uniform": None, "hot": {"weights": {"temperature": 3}}})
    grid, cells, _ = load_grid([str(path), "--seeds", "[3, 4]", "--set.training.learning_rate", "0.5"])
    assert [cell.name for cell in cells] == [f"few/{m}/seed-{s}" for s in (3, 4) for m in ("uniform", "hot")]
    recipe = recipe_of(cells[1], tmp_path / "study")
    assert recipe.weights.temperature == 3 and recipe.training["learning_rate"] == 0.5 and recipe.seed == 3
    assert Path(recipe.data.train).name == "train-3.jsonl"
    held_out = Path(recipe.data.held_out).read_bytes()
    assert held_out == Path(recipe_of(cells[3], tmp_path / "study").data.held_out).read_bytes()


def test_folds_hold_every_question_out_once(toy, tmp_path):
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
    for one in cells:
        recipe = recipe_of(one, tmp_path / "study")
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

    averaged = cell.averaged
    monkeypatch.setattr(cell, "averaged", remembered)
    cell.run_merged(recipe, 1)
    (states, mean), run = branches[0], Path(recipe.run)
    assert len(states) == 4
    for name, value in mean.items():
        assert torch.allclose(value, sum(state[name] for state in states) / 4, atol=1e-6)
    assert any(not torch.equal(states[0][name], states[1][name]) for name in mean)
    saved = AutoModelForCausalLM.from_pretrained(run / "student").state_dict()
    assert all(torch.equal(saved[name], mean[name]) for name in mean)
    assert (run / "report.md").exists() and not (run / "branches").exists()
    assert load_results(run, "after")[0].keys() == {"held_out", "wordings", "tasks"}


def test_a_second_ctrl_c_leaves_no_cell_that_was_not_told_to_end(monkeypatch):
    def interrupted(worker):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Worker, "stop", interrupted)
    workers = []
    for _ in range(2):
        worker = runner.Worker.__new__(runner.Worker)
        worker.job, worker.process = runner.Job("", Path(), []), subprocess.Popen(["sleep", "600"])
        workers.append(worker)
    with pytest.raises(KeyboardInterrupt):
        runner.stop_all(workers)
    assert [worker.process.wait(60) for worker in workers] == [-signal.SIGTERM] * 2


def test_a_study_that_is_stopped_stops_its_cells_and_the_same_command_goes_on(toy, tmp_path):
    path = grid_file(
        tmp_path, toy, methods=["uniform"], settings={"few": {"skills": {"questions": 16, "held_out": 2}}}
    )
    folder = tmp_path / "study"
    command = [sys.executable, "-m", "compact.study", str(path)]
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        deadline = time.time() + 240
        while not (folder / "base" / "few" / "recipe.yaml").exists():  # the worker is on its way
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, stop)  # as a terminal does: all that belong to the command
        _, said = process.communicate(timeout=120)
        assert process.returncode == 130 and "the same command goes on" in said and "Traceback" not in said
        with locked(folder):  # no cell is left to hold it
            assert json.loads((folder / "study.json").read_text())["records"] == []
        (folder / "base" / "few" / "recipe.yaml").unlink()
    assert study(path) == 0
    assert json.loads((folder / "study.json").read_text())["failed"] == {}
