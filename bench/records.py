"""The results file: a list of records, one a (work, head, contender)."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    *("torch", "triton", "transformers", "peft", "liger-kernel", "cut-cross-entropy", "quack-kernels"),
    *("flash-attn", "flash-attn-3", "flash-attn-4"),
)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"


def file_stem() -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str:
    """Of the code that is measured; "+" where files differ from it, "unknown" outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def key(record: Record) -> tuple[str, str, str]:
    return record["work"], record["head"], record["contender"]


def merged(old: list[Record], new: list[Record]) -> list[Record]:
    """`old` with the records of `new` in place of those of the same work, head and contender."""
    table = {key(record): record for record in old}
    table.update({key(record): record for record in new})
    return list(table.values())


def load(path: Path) -> list[Record]:
    return json.loads(path.read_text()) if path.exists() else []


def save(records: list[Record], path: Path) -> None:
    """One record a line; the file is replaced whole, so that an interrupted run leaves a readable one."""
    lines = ",\n".join(json.dumps(record, sort_keys=False) for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(f"[\n{lines}\n]\n" if records else "[]\n")
    partial.replace(path)
