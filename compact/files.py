"""Files that are whole or not there, whatever stops the process that writes them, and digests of what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compact.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file aside and rename it, so that a reader sees the old one or the new one, never half of it.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; make room there, then run again") from error


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add JSON lines to a table of a run under way.

    Raises:
        UserError: the disk is full, or the folder cannot be written any more.
    """
    try:
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}. Checkpoints so far are whole: make room and run the same command "
            "again to go on from the last one."
        ) from error


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A model with its tokenizer and generation config, in place of what was at `folder`."""
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    aside.replace(folder)


_OF_A_STUDENT = re.compile(
    r".*\.(safetensors|bin|gguf|model)|(config|generation_config|tokenizer.*|special_tokens_map|added_tokens|vocab"
    r"|.*\.index)\.json"
)


def fingerprint(path: Path) -> str:
    """A digest of a student's file, or of those in its folder; of what is larger than 64 MiB 1024 places are read."""
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if _OF_A_STUDENT.fullmatch(f.name))
    found = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        found.update(f"{'' if file is path else file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for place in range(0, size, max(1 << 16, size // 1024)):
                stream.seek(place)
                found.update(stream.read(1 << 16))
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """Of a file, read whole."""
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def digest(content: Any) -> str:
    """Of plain values."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
