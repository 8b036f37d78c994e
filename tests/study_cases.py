"""What the tests of studies share: a small grid, and a study whose cells run in this process."""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml

import compact.analyze
from compact.study import cell, runner
from compact.study.__main__ import main

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
