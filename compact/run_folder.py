"""A run's folder: whose it is, how long its phases took, and the student it ends with."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compact import demo
from compact.config import Recipe, from_dict, read_recipe, save_recipe, to_dict
from compact.errors import UserError
from compact.files import save_model, write_atomically
from compact.options import plain
from compact.results import finished, versions


def claim(folder: Path, recipe: Recipe, *, flag: str = "--run") -> None:
    """Make `folder` this recipe's run, or find that it is already.

    A run that stopped before its first evaluation has nothing to lose: it takes the recipe as it is now. One that has
    been moved goes on with what was moved along. Keys that an older version did not write are at their defaults.

    Args:
        flag: what the user chooses another folder with.

    Raises:
        UserError: the folder holds another run, or something that is no run, or cannot be written.
    """
    stored = folder / "recipe.yaml"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and a run needs a folder: choose another one with {flag}")
    begun = finished(folder) or any((folder / name).exists() for name in ("evaluation", "metrics.jsonl", "student"))
    if stored.exists() and begun:
        theirs, ours = (_leaves(to_dict(one)) for one in (from_dict(stored_recipe(folder)), recipe))
        apart = ("run", "demo.arms")  # however the folder is called from here; arms are runs of their own
        differing = [key for key in ours | theirs if key not in apart and not _same(theirs.get(key), ours.get(key))]
        if differing:
            shown = "; ".join(f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here" for key in differing)
            raise UserError(
                f"{folder} holds another run: {shown}. Choose another folder with {flag}, or remove that one "
                "(the same recipe would go on with it)"
            )
        return
    if not stored.exists() and folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run: choose another folder with {flag}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, stored)
        (folder / "cache" / "questions.json").unlink(missing_ok=True)  # nothing was trained on them
    except OSError as error:
        raise UserError(f"the run's folder {folder} cannot be written: {error}") from error


def stored_recipe(folder: Path) -> dict[str, Any]:
    """What RUN/recipe.yaml holds; where the folder has been moved, so has what its paths name, if it is there."""
    values = plain(read_recipe(str(folder / "recipe.yaml")))
    if not isinstance(values, dict) or "run" not in values:
        raise UserError(f"{folder / 'recipe.yaml'} is damaged: it has no key run; bring it back")
    old, new = Path(str(values["run"])), folder
    if old.is_absolute() and old != new.absolute():
        while old.name and old.name == new.name:
            old, new = old.parent, new.parent
        here = _moved(values, old, new)
        if here != values:
            save_recipe(from_dict(here), folder / "recipe.yaml")
        return here
    return values


def finished_recipe(run: Path) -> Recipe:
    """A run's recipe, wherever the run lies now, with the files of the embedded example where it asks for these."""
    recipe = replace(from_dict(stored_recipe(run)), run=str(run))
    return demo.build(recipe) if demo.is_embedded(recipe) else recipe


def _moved(value: Any, old: Path, new: Path) -> Any:
    """The same with those paths below `old` below `new` that exist there."""
    if isinstance(value, dict):
        return {key: _moved(item, old, new) for key, item in value.items()}
    if isinstance(value, str) and Path(value).is_relative_to(old):
        there = new / Path(value).relative_to(old)
        return str(there) if there.exists() else value
    return value


def _same(one: Any, other: Any) -> bool:
    """Equal, or one file named in two ways."""
    if one == other:
        return True
    texts = isinstance(one, str) and isinstance(other, str) and os.sep in one + other
    return texts and Path(one).resolve() == Path(other).resolve()


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@contextmanager
def locked(folder: Path, what: str = "run", flag: str = "--run") -> Iterator[int]:
    """The folder is this process's, and that of the processes that inherit the lock: it goes with the last of them.

    Yields:
        The lock's file descriptor.

    Raises:
        UserError: another one is writing to it (where the file system has locks), or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"the {what}'s folder {folder} cannot be written: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):  # others: no locks here, as Lustre can be mounted
                file.seek(0)
                process, _, host = file.read().strip().partition(" ")
                who = f"process {process or 'unknown'}"
                if host == socket.gethostname() and not psutil.pid_exists(int(process)):
                    who = f"one that process {process}, which has ended, had started"
                raise UserError(
                    f"{folder}: another {what} is writing to it ({who}); wait for it, or choose another folder with "
                    f"{flag}"
                ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}")
        file.flush()
        yield file.fileno()


class Phases:
    """Seconds of each phase of a run, kept in RUN/timing.json; a phase that is resumed adds up.

    The first, `start`, is what the process took until now: imports, above all.
    """

    _started = False

    def __init__(self, folder: Path) -> None:
        self.path = folder / "timing.json"
        self.seconds = json.loads(self.path.read_text())["seconds"] if self.path.exists() else {}
        if not Phases._started:  # the arms of one process share their start
            Phases._started = True
            self.seconds["start"] = self.seconds.get("start", 0.0) + time.time() - psutil.Process().create_time()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except BaseException:
            with suppress(UserError):  # what stopped the phase is what matters
                self._add(name, started)
            raise
        self._add(name, started)

    def _add(self, name: str, started: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        if PartialState().is_main_process:
            write_atomically(self.path, json.dumps({"seconds": self.seconds, "versions": versions()}))


def save_student(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """RUN/student: plain weights, tokenizer and generation config.

    Raises:
        UserError: it could not be written.
    """
    try:
        save_model(student, tokenizer, folder / "student")
    except Exception as error:
        raise UserError(
            f"the student could not be written to {folder / 'student'}: {error}. Make room and run the same command "
            "again: training is done and its last checkpoint is whole."
        ) from error
