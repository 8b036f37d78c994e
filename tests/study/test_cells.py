"""The runner of cells: which are started, workers that break or die, one study a folder."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from compact.errors import UserError
from compact.run_folder import claim, locked
from compact.strategies import own_source
from compact.study import cell, runner
from compact.study.data import recipe_of
from compact.study.grid import load_grid
from tests.study_cases import InProcess, grid_file, study


def test_fewer_cells_at_once_are_expected_to_take_less_and_the_slowest_of_a_kind_speaks_for_it(tmp_path):
    job = runner.Job("mine", tmp_path, [], method="mine")
    known = [("mine", 100.0, 8), ("mine", 60.0, 4), ("other", 1000.0, 1)]
    assert runner._expected(job, known, 8) == 100 and runner._expected(job, known, 4) == 75
    assert runner._expected(job, [("other", 90.0, None)], 8) == 90 and runner._expected(job, [], 8) == 0


@pytest.fixture
def begun(monkeypatch):
    """What workers were given, all of which fails, (device, cell, how many at once); and the devices of those made."""
    begun = SimpleNamespace(cells=[], made=[])

    class Started:
        alive = True

        def __init__(self, device, lock):
            self.device, self.job = device, None
            begun.made.append(device)

        def start(self, job, at_once):
            self.job = job
            begun.cells.append((self.device, job.name, at_once))

        def code(self):
            return 2

        def stop(self):
            pass

    monkeypatch.setattr(runner, "Worker", Started)
    return begun


def test_the_cells_that_still_fit_are_started_when_all_at_once_would_not(toy, tmp_path, monkeypatch, begun):
    """Of four at once each would take 16 s and of two 12 s: with 13 s left, two are begun."""
    path = grid_file(tmp_path, toy, methods=["uniform"], parallel=4)
    grid, cells, _ = load_grid([str(path), "--seeds", "[0, 1, 2, 3, 4]"])
    monkeypatch.setattr(runner, "_known", lambda jobs: [("uniform", 16.0, 4)])
    monkeypatch.setattr(runner, "_jobs", lambda *_: [runner.Job(c.name, tmp_path, [], method=c.method) for c in cells])
    first_round = iter([0.0, 0.0])
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(first_round, 1e9))
    runner.run_cells(grid, cells, 0, minutes=13 / 60)
    assert [name for _, name, _ in begun.cells] == [c.name for c in cells[:2]]


def test_cells_are_spread_over_gpus(toy, tmp_path, monkeypatch, begun):
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 4)
    path = grid_file(tmp_path, toy, methods=["uniform"], parallel=4)
    grid, cells, _ = load_grid([str(path), "--seeds", "[0, 1, 2, 3, 4, 5]"])
    monkeypatch.setattr(runner, "_jobs", lambda *_: [runner.Job(c.name, tmp_path, [], method=c.method) for c in cells])
    runner.run_cells(grid, cells, 0)
    assert begun.made == [0, 0, 1, 1, 2, 2, 3, 3]  # no more than there is work for
    assert [(device, at_once) for device, _, at_once in begun.cells] == [
        (0, 2),
        (1, 2),
        (2, 2),
        (3, 2),
        (0, 2),
        (1, 2),
    ]


def test_a_cell_is_run_where_it_lies(toy, tmp_path, monkeypatch):
    path = grid_file(tmp_path, toy, methods=["uniform"])
    grid, cells, _ = load_grid([str(path)])
    recipe = recipe_of(cells[0], tmp_path / "study")
    folder = tmp_path / "study" / "cells" / cells[0].name
    claim(folder, dataclasses.replace(recipe, run="study/cells/of/another/directory"))
    ran = []
    monkeypatch.setattr(cell, "run", lambda recipe: ran.append(recipe.run))
    assert cell.main([str(folder)]) == 0 and ran == [str(folder)]


def test_a_strategy_of_one_s_own_may_be_mended_until_a_cell_is_finished_by_it(toy, tmp_path, monkeypatch):
    source = tmp_path / "mended_later.py"
    source.write_text("from compact.strategies.baselines import Uniform\n\n\nclass Mine(Uniform):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cell, "run", lambda recipe: None)
    path = grid_file(tmp_path, toy, methods={"uniform": None, "mine": {"strategy": "mended_later:Mine"}})
    grid, cells, _ = load_grid([str(path)])
    folders = [tmp_path / "study" / "cells" / one.name for one in cells]
    runner._jobs(grid, cells, tmp_path / "study")
    assert [cell.main([str(folder)]) for folder in folders] == [0, 0]
    source.write_text(source.read_text() + "    twice = True\n")
    own_source.cache_clear()  # another process
    with pytest.raises(UserError, match="1 of the study's .* the file of mended_later:Mine has changed since .*mine"):
        runner._jobs(grid, cells, tmp_path / "study")
    (folders[1] / "cell.json").unlink()
    assert [job.done for job in runner._jobs(grid, cells, tmp_path / "study")] == [False, True, False]


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


@pytest.mark.parametrize(
    "code, log, expected",
    [
        (2, "compact.study: no such teacher\n", "no such teacher"),
        (1, "Traceback\nMemoryError: all of it\n", "it ended with status 1 .*after: MemoryError: all of it"),
        (-9, "", "it ended with signal 9 .*after: nothing"),
        (2, "50%|\n\ncompact.study: no causal LM.\nGive a folder.\n", "no causal LM.\nGive a folder.$"),
    ],
)
def test_a_failed_cell_says_why(tmp_path, code, log, expected):
    job = runner.Job("cell", tmp_path, [])
    (tmp_path / "log.txt").write_text(log)
    assert not runner._finish(job, code)
    assert re.match(expected, job.error.read_text())


def test_where_the_untrained_student_fails_by_a_mistake_no_cell_is_started(toy, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(InProcess, "begin", InProcess.start, raising=False)
    monkeypatch.setattr(
        InProcess, "start", lambda self, job, at_once: (started.append(job.name), self.begin(job, at_once))
    )
    path = grid_file(tmp_path, toy, methods=["uniform"], set={"student.model": str(tmp_path / "nobody")})
    assert study(path, "--seeds", "[0, 1]") == 1
    assert started == ["base of few"]
    for seed in (0, 1):
        folder = tmp_path / "study" / "cells" / "few" / "uniform" / f"seed-{seed}"
        assert "nobody" in (folder / "failed.txt").read_text()
    told = (tmp_path / "study" / "study.md").read_text()
    assert "**2 cells failed**" in told


def test_two_studies_do_not_write_to_one_folder(tmp_path):
    with locked(tmp_path / "study", "study", "--study"):
        with pytest.raises(UserError, match="another study is writing to it.*--study"):
            with locked(tmp_path / "study", "study", "--study"):
                pass
    with locked(tmp_path / "study", "study", "--study"):
        pass


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
