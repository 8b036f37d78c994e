"""A toy student and a finished run, which no test changes: made once for all files here. Commands that are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import compact.analyze
from compact.train import main
from tests.toy_run import save_student, toy_rows, write_rows
from tests.train_cases import environment, flags


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than a toy run; `finished`, in a process of its own, has them."""
    monkeypatch.setattr(compact.analyze, "_draw", lambda run, content: {})


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A folder with a student, its twin with a long context, 11 questions and a recipe that says hardly anything."""
    folder = tmp_path_factory.mktemp("toy")
    save_student(folder / "student")
    save_student(folder / "long", max_position_embeddings=1024)
    write_rows(folder / "questions.jsonl", toy_rows(11))
    (folder / "recipe.yaml").write_text("strategy: compact\nstudent: {dtype: float32}\n")  # on a GPU too
    return folder


@pytest.fixture(scope="session")
def finished(toy, tmp_path_factory) -> Path:
    """The folder of a run in a process of its own, whose home and working folder were empty."""
    folder = tmp_path_factory.mktemp("finished")
    for name in ("home", "here"):
        (folder / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "compact.train", *flags(toy, folder / "run", training__disable_tqdm=False)],
        cwd=folder / "here",
        env=environment(folder / "home"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


@pytest.fixture
def refused(toy, tmp_path, capsys):
    """Run with options; expect exit code 2, one message that holds every needle, and no training."""

    def check(*needles: str, rows: list[Any] | None = None, trained: bool = False, **options: Any) -> str:
        if rows is not None:
            options["data__train"] = write_rows(tmp_path / "bad.jsonl", rows)
        run = Path(options.pop("run", tmp_path / "run"))
        capsys.readouterr()
        assert main(flags(toy, run, **options)) == 2
        out, err = capsys.readouterr()
        said = err[err.index("compact.train: ") :]
        assert "Traceback" not in err and said.count("compact.train: ") == 1
        for needle in needles:
            assert needle in said, said
        assert trained or not (run / "metrics.jsonl").exists()
        return said

    return check
