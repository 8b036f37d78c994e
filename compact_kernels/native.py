"""Loads the native library (csrc/, built by setup.py); says what is there and why not.

Set COMPACT_KERNELS_NATIVE=0 to do without. Whatever is wrong with the library, the ops still work, in plain torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
REPAIR = "install this package again to build it anew; until then plain torch computes"


@dataclass(frozen=True)
class Library:
    """What became of the library."""

    loaded: bool
    reason: str = ""  # why it is not loaded
    cuda: bool = False  # its CUDA part is there
    record: dict[str, Any] = field(default_factory=dict)  # what the build wrote down


def source_digest(sources: Path) -> str:
    """As in setup.py."""
    digest = hashlib.sha256()
    for path in sorted(sources.rglob("*")):
        if path.suffix in (".cpp", ".cu", ".h"):
            digest.update(path.relative_to(sources.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def load(folder: Path = FOLDER) -> Library:
    """Load the library of a folder; one warning if there is one that cannot be used."""
    path, note = folder / "_native.so", folder / "_native.json"
    if os.environ.get("COMPACT_KERNELS_NATIVE") == "0":
        return Library(False, "COMPACT_KERNELS_NATIVE is 0 in the environment")
    try:
        record = json.loads(note.read_text())
    except (OSError, ValueError):
        record = None
    record = record if isinstance(record, dict) else {}
    if not path.exists():
        reason = record.get("not_built") or f'not built in {folder.parent}: "pip install -e ." there builds it'
        return Library(False, reason, record=record)
    reason = _mismatch(path, record) or _open(path, record)
    if reason:
        warnings.warn(f"compact_kernels' native library is left aside: {reason}; {REPAIR}", stacklevel=2)
        return Library(False, reason, record=record)
    return Library(True, cuda=bool(record.get("cuda_archs")), record=record)


def _mismatch(path: Path, record: dict[str, Any]) -> str:
    """Why a library cannot fit, as far as that is known without opening it."""
    if not record:
        return f"{path.with_suffix('.json')}, which says what it was built from, cannot be read"
    here = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if here and (int(here[1]), int(here[2])) < OLDEST_TORCH:
        return f"it needs torch 2.11 or newer, this is {torch.__version__}"
    sources = path.parent.parent / "csrc"  # in a checkout; installed, some other package's may be there
    if (sources / "registration.cpp").is_file() and record.get("sources") != source_digest(sources):
        return f"{sources} has changed since it was built"
    if path.is_file() and _is_cut_short(path):
        return f"{path} is cut short"
    return ""


def _is_cut_short(path: Path) -> bool:
    """Whether the table at an ELF file's end is missing: opening such a file may kill the process."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False  # the loader says so itself
    (table,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < table + size * count


def _open(path: Path, record: dict[str, Any]) -> str:
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        words = (str(error.__cause__ or error).splitlines() or ["no message"])[0]
        made = record.get("torch", "unknown")
        return f"it was built with torch {made}, and torch {torch.__version__} cannot load it ({words})"
    return ""


LIBRARY = load()


@functools.cache
def cuda_trouble(device: int) -> str:
    """Why the library's CUDA part cannot run on a device; empty if it can."""
    if not LIBRARY.loaded:
        return "the native library is not loaded"
    if not LIBRARY.cuda:
        return LIBRARY.record.get("no_cuda", "the library was built without its CUDA part")
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return torch.ops.compact_native.cuda_trouble(device)


def run(op: Callable[..., Tensor], *arguments: Any) -> None:
    """Call an op of the library, which writes into its arguments.

    Raises:
        RuntimeError: the op refuses them; it says so in its answer, since no exception may leave the library
            (csrc/ops.h).
    """
    answer = op(*arguments)
    if answer.numel():
        raise RuntimeError(f"{op}: {bytes(answer.tolist()).decode()}")


def _no_refusal(*arguments: Any) -> Tensor:
    """In a traced graph, what an op answers."""
    return torch.empty(0, dtype=torch.uint8, device="cpu")


if LIBRARY.loaded:
    for _op in ("row_statistics", "gradient_block", "answer_divergence", "decide_questions", "question_in_degree"):
        torch.library.register_fake(f"compact_native::{_op}", _no_refusal)
