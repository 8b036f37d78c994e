"""What the tests of `python -m compact.train` share: a command line, its process' environment, what a run left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compact.metrics import read_metrics
from tests import processes

QUICK = {
    "data.max_length": 128,
    "student.lora.rank": 4,
    "training.per_device_train_batch_size": 2,
    "training.num_train_epochs": 2,
    "training.learning_rate": 0.01,
    "training.logging_steps": 2,
    "training.save_strategy": "steps",
    "training.save_steps": 2,
    "training.disable_tqdm": True,
    "evaluation.max_new_tokens": 4,
}


def flags(toy: Path, run: Path, **options: Any) -> list[str]:
    """The words of a command line. A key with dots is given as `student__model`; None leaves a key out."""
    given = {**QUICK, "student.model": toy / "student", "data.train": toy / "questions.jsonl", "run": run}
    given |= {name.replace("__", "."): value for name, value in options.items()}
    words = [str(toy / "recipe.yaml")]
    for name, value in given.items():
        if value is not None:
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value, default=str).strip('"')]
    return words


def environment(home: Path) -> dict[str, str]:
    """Of a process whose home and caches are in `home`, importing what this one imports."""
    names = "PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES", "PYTHONPATH"
    kept = {name: value for name in names if (value := processes.environment().get(name)) is not None}
    return {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def table(run: Path) -> list[dict[str, Any]]:
    """A run's rows without what a clock or the memory says."""
    rows = read_metrics(run / "metrics.jsonl")
    timed = ("seconds", "tokens_per_second", "peak_memory_bytes")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """Parameters, table and predictions, to the last bit."""
    assert table(one) == table(other)
    a, b = (load_file(run / "student" / "model.safetensors") for run in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for when in ("before", "after"):
        a, b = ((run / "evaluation" / when / "held_out.jsonl").read_text() for run in (one, other))
        assert a == b


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
