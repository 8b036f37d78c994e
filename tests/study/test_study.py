"""A small study from end to end: what it leaves, how it goes on or is stopped, its price; a merge of branches."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import compact.analyze
from compact.config import Recipe, StudentConfig, from_dict
from compact.errors import UserError
from compact.results import load_results
from compact.run_folder import locked
from compact.study import cell, data, merge, runner, summary
from compact.study.data import plain_student, recipe_of
from compact.study.grid import load_grid
from tests.processes import ROOT
from tests.study_cases import grid_file, study
from tests.toy_run import toy_rows, write_rows


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


def test_finished_cells_that_a_grid_means_otherwise_are_refused_at_once_and_stay(finished, capsys):
    path, folder, _ = finished
    done = [folder / "study.md", folder / "grid.yaml", *(folder / "cells" / "few").glob("[cu]*/**/*")]
    kept = {file: file.stat().st_mtime_ns for file in done}
    assert study(path, "--set.training.learning_rate", "0.5") == 2
    said = capsys.readouterr().err
    assert "2 of the study's finished cells are not what the grid says now" in said
    assert "learning_rate" in said and "another folder with --study" in said
    assert len(kept) > 20 and kept == {file: file.stat().st_mtime_ns for file in done}
    assert study(path, "--seeds", "[7]", "--set.training.learning_rate", "0.5", "--minutes", "0") == 2
    assert f"{folder} holds another study, of 2 finished cells: its set is" in capsys.readouterr().err
    assert kept == {file: file.stat().st_mtime_ns for file in done}
    failure = folder / "cells" / "few" / "uniform" / "seed-0" / "failed.txt"
    failure.write_text("of an older version, which put it here then")
    grid, cells, _ = load_grid([str(path)])
    runner._jobs(grid, cells, folder)
    assert not failure.exists() and "uniform" in {entry["method"] for entry in summary._weights(folder, cells)}


def test_a_file_that_changed_since_the_first_cells_is_named(tmp_path):
    rows = tmp_path / "mine.jsonl"
    rows.write_text("{}\n")
    recipe = from_dict({"run": "r", "data": {"train": str(rows)}})
    study = tmp_path / "study"
    runner._check_unchanged(recipe, study, {})
    runner._check_unchanged(recipe, study, {})
    other = tmp_path / "other.jsonl"  # as a method's own
    other.write_text("{}\n{}\n")
    runner._check_unchanged(from_dict({"run": "r", "data": {"train": str(other)}}), study, {})
    rows.write_text("{}\n{}\n")
    with pytest.raises(UserError, match=f"data.train: {rows} has changed since .* --study"):
        runner._check_unchanged(recipe, study, {})
    recipe = from_dict(
        {"run": "r", "evaluation": {"tasks": {"more": str(other)}}, "student": {"model": str(tmp_path)}}
    )
    runner._check_unchanged(recipe, study, {})
    other.write_text("{}\n")
    with pytest.raises(UserError, match=f"evaluation.tasks.more: {other} has changed"):
        runner._check_unchanged(recipe, study, {})
    other.write_text("{}\n{}\n")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"student.model: {tmp_path} has changed"):
        runner._check_unchanged(recipe, study, {})


def test_each_gguf_file_is_a_student_of_its_own(tmp_path, monkeypatch):
    read = []

    def load(config, **_):
        read.append(Path(config.model).name)
        return None, None

    monkeypatch.setattr(data, "load_student", load)
    monkeypatch.setattr(data, "unwrap", lambda model: model)
    monkeypatch.setattr(data, "save_model", lambda model, tokenizer, folder: folder.mkdir(parents=True))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(name.encode() * 50)
    students = [
        plain_student(Recipe(student=StudentConfig(model=str(tmp_path / f"{name}.gguf"))), tmp_path / "study", {})
        for name in "abab"
    ]
    assert read == ["a.gguf", "b.gguf"] and students[:2] == students[2:] and students[0] != students[1]
    assert students[0] == str(tmp_path / "study" / "student")  # as in studies of older versions
    with pytest.raises(UserError, match="nobody.gguf: no such file"):
        plain_student(Recipe(student=StudentConfig(model="nobody.gguf")), tmp_path / "study", {})


def test_a_cell_that_failed_before_it_was_a_run_is_tried_again(toy, tmp_path):
    rows = tmp_path / "late.jsonl"
    changes = {"methods": ["uniform"], "settings": {"folds": {"folds": 2}}, "set": {"data.train": str(rows)}}
    path = grid_file(tmp_path, toy, recipe="demo", **changes)
    assert study(path) == 1
    failed = tmp_path / "study" / "cells" / "folds" / "uniform" / "seed-0-fold-0" / "failed.txt"
    assert f"there is no file {rows}" in failed.read_text()
    write_rows(rows, toy_rows(11))
    assert study(path) == 0
    assert not failed.exists() and (failed.parent / "report.json").exists()


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


def test_a_cell_whose_report_was_lost_is_in_no_number_until_it_is_analysed(finished, tmp_path, monkeypatch):
    path, folder, _ = finished
    there = shutil.copytree(folder, tmp_path / "study")
    _, cells, _ = load_grid([str(path)])
    lost = there / "cells" / "few" / "uniform" / "seed-0"
    (lost / "report.json").unlink()
    methods = lambda: {entry["method"] for entry in summary._weights(there, cells)}  # noqa: E731
    assert methods() == {"compact"}
    monkeypatch.setattr(compact.analyze, "_draw", lambda run, content: {})
    assert compact.analyze.main([str(lost), "--report_only"]) == 0
    assert methods() == {"compact", "uniform"}


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
    assert "4 missing: at the price of others" in (folder / "study.md").read_text()


def with_skills(path: Path, **changes) -> Path:
    """The grid of a file with other questions, beside it."""
    grid = yaml.safe_load(path.read_text())
    grid["settings"]["few"]["skills"] |= changes
    changed = path.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump(grid))
    return changed


def test_a_study_does_not_go_on_with_other_questions(finished, capsys):
    path, folder, _ = finished
    grid, cells, _ = load_grid([str(with_skills(path, questions=24)), "--seeds", "[7]"])
    assert runner._jobs(grid, cells, folder) == []
    said = (folder / "cells" / cells[0].name / "failed.txt").read_text()
    assert "skills: " in said and '"questions": 16' in said and '"questions": 24' in said and "--study" in said


def test_data_of_a_version_with_fewer_options_are_gone_on_with(finished):
    path, folder, _ = finished
    made = folder / "data" / "few" / "made.json"
    facts = json.loads(made.read_text())
    try:
        made.write_text(json.dumps({key: value for key, value in facts.items() if key != "held_out_wording"}))
        grid, cells, _ = load_grid([str(path), "--seeds", "[8]"])
        assert len(runner._jobs(grid, cells, folder)) > 0
        grid, cells, _ = load_grid([str(with_skills(path, held_out_wording=0)), "--seeds", "[8]"])
        assert runner._jobs(grid, cells, folder) == []
    finally:
        made.write_text(json.dumps(facts))


def test_no_cell_is_started_that_would_not_be_finished_in_time(finished):
    path, folder, _ = finished
    assert study(path, "--seeds", "[0, 1]", "--minutes", "1e-4") == 1
    content = json.loads((folder / "study.json").read_text())
    assert content["seconds"]["missing"] == 4 and list(content["failed"]) == ["few/single-nobody/seed-0"]
    assert not (folder / "cells" / "few" / "uniform" / "seed-1" / "log.txt").exists()


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


def test_branches_are_merged_by_the_mean_of_their_weights(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(compact.analyze, "_draw", lambda run, content: {})
    path = grid_file(
        tmp_path, toy, methods={"uniform": None, "merge_of_thought": None}, set={"training.disable_tqdm": True}
    )
    _, cells, _ = load_grid([str(path)])
    assert [cell.merge for cell in cells] == [0, 1]
    recipe = recipe_of(cells[1], tmp_path / "study")
    branches = []

    def remembered(folders, **options):
        model = averaged(folders, **options)
        branches.append(([AutoModelForCausalLM.from_pretrained(f).state_dict() for f in folders], model.state_dict()))
        return model

    averaged = merge.averaged
    monkeypatch.setattr(merge, "averaged", remembered)
    merge.run_merged(recipe, 1)
    (states, mean), run = branches[0], Path(recipe.run)
    assert len(states) == 4
    for name, value in mean.items():
        wanted = sum(state[name].double() for state in states) / 4
        torch.testing.assert_close(value, wanted.to(value.dtype), rtol=torch.finfo(value.dtype).eps, atol=1e-6)
    assert any(not torch.equal(states[0][name], states[1][name]) for name in mean)
    saved = AutoModelForCausalLM.from_pretrained(run / "student").state_dict()
    assert all(torch.equal(saved[name], mean[name]) for name in mean)
    assert "4 teachers (terse, verbose," in (run / "report.md").read_text()
    assert "| &nbsp;&nbsp;branches | " in (run / "report.md").read_text()
    assert cell._phases(run) > sum(
        json.loads((branch / "timing.json").read_text())["seconds"]["train"] for branch in run.glob("branches/*")
    )
    merge.run_merged(recipe, 1)
    merge.clear(run)
    assert not (run / "branches").exists() and not [*run.glob("round-*")] and len(branches) == 1
    assert load_results(run, "after")[0].keys() == {"held_out", "wordings", "tasks"}


def test_a_merged_student_is_evaluated_on_the_questions_that_its_branches_held_out(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(compact.analyze, "_draw", lambda run, content: {})
    path = grid_file(tmp_path, toy, methods=["merge_of_thought"], set={"training.disable_tqdm": True})
    _, cells, _ = load_grid([str(path), "--baseline", "merge_of_thought"])
    recipe = recipe_of(cells[0], tmp_path / "study")
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, held_out=None))
    merge.run_merged(recipe, 1)
    assert len(load_results(Path(recipe.run), "after")[0]["held_out"].predictions) > 0


def heed_signals() -> None:
    """Those that are ignored where nohup or a shell's & runs the tests."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def test_a_study_that_is_stopped_stops_its_cells_and_the_same_command_goes_on(toy, tmp_path):
    path = grid_file(
        tmp_path, toy, methods=["uniform"], settings={"few": {"skills": {"questions": 16, "held_out": 2}}}
    )
    folder = tmp_path / "study"
    command = [sys.executable, "-m", "compact.study", str(path)]
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=heed_signals,
        )  # fmt: skip
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
