"""Runs the cells of a study: as many at once as fit, each to be gone on with.

A worker process takes one cell after another, for imports, a CUDA context and compiled kernels may cost more than a
cell does; one that a cell broke is replaced.
"""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from compact.config import Recipe, from_dict
from compact.errors import UserError
from compact.files import write_atomically
from compact.run_folder import claim, stored_recipe
from compact.strategies import own_source
from compact.study.data import plain_student, recipe_of
from compact.study.grid import Cell, Grid
from compact.training_data import input_digest, input_files

CONTEXT = 1 << 30  # what a process takes of a GPU beside what torch reserves, roughly
MOST = 8  # processes of a GPU: they take turns
POLL = 0.2  # seconds


@dataclass(eq=False)
class Job:
    """A cell, or the evaluation of a student as it is."""

    name: str
    folder: Path
    arguments: list[str]
    needs: Job | None = None  # must be over before
    method: str = ""

    @property
    def error(self) -> Path:
        return self.folder / "failed.txt"

    @property
    def done(self) -> bool:
        return (self.folder / "cell.json").exists()


class Worker:
    """A process that runs one job after another: python -m compact.study.cell --serve."""

    def __init__(self, device: int | None, lock: int) -> None:
        self.device = device
        self.job: Job | None = None
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        if device is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device] if visible else str(device)
            environment.setdefault("OMP_NUM_THREADS", "2")
        command = [sys.executable, "-m", "compact.study.cell", "--serve"]
        # A session of its own: Ctrl-C is for the study alone, which stops its workers.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            pass_fds=[lock],
            start_new_session=True,
        )

    def start(self, job: Job, at_once: int) -> None:
        """Begin with a job, one of `at_once` on its device."""
        assert self.process.stdin is not None
        self.job = job
        words = [str(job.folder), *job.arguments, f"--at_once={at_once}"]
        with suppress(BrokenPipeError):  # its end is seen by code()
            self.process.stdin.write(json.dumps(words).encode() + b"\n")
            self.process.stdin.flush()

    def code(self) -> int | None:
        """The exit status of the job, once it is over; of the process, where it died."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], 0)[0]:
            return None
        answer = self.process.stdout.readline()
        return int(answer) if answer else self.process.wait() or 1

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """End the process: by itself, where it has nothing to do."""
        if self.job is not None:
            self.process.terminate()
        self.process.communicate()  # ends its input


def run_cells(
    grid: Grid,
    cells: Sequence[Cell],
    lock: int,
    minutes: float | None = None,
    agreed: Callable[[], None] = lambda: None,
) -> None:
    """Run what is not finished. A cell that fails says why in its folder, and the others go on.

    Args:
        lock: of :func:`compact.run_folder.locked`; workers hold it too, should this process be killed and they go on.
        minutes: no cell is started that would not be finished by then, at what cells of its method (of any method,
            where there is none yet) took so far. While nothing is known, cells are started whatever they take. Those
            that run are waited for.
        agreed: called before cells are run, once no finished one is against the grid.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    study = Path(grid.study)
    jobs = _jobs(grid, cells, study)
    agreed()
    waiting = [job for job in jobs if not job.done]
    devices: list[int | None] = [*range(torch.cuda.device_count())] or [None]
    failed = len(cells) - sum(bool(job.method) for job in jobs)  # those that are no job: why is in their folders
    missing = sum(bool(job.method) for job in waiting)  # the untrained student is no cell
    bar = tqdm(total=len(cells), initial=len(cells) - missing, desc="cells", dynamic_ncols=True)
    workers: list[Worker] = []
    state, ended = "", True
    try:
        while True:
            for worker in [worker for worker in workers if worker.job is not None]:
                if (code := worker.code()) is not None:
                    assert worker.job is not None
                    ended_well = _finish(worker.job, code)
                    failed += bool(worker.job.method) and not ended_well
                    bar.update(bool(worker.job.method))
                    if code == 2:  # a mistake of the recipe's: what waits for this has made it too
                        spared = [job for job in waiting if job.needs is worker.job]
                        _give_up(spared, worker.job)
                        failed += len(spared)
                        bar.update(len(spared))
                        waiting = [job for job in waiting if job not in spared]
                    if code not in (0, 2):
                        worker.stop()
                    worker.job, ended = None, True
            if ended:  # what cells took is read when one has ended, not at every look
                known, most, ended = _known(jobs), grid.parallel or _fitting(jobs), False
            workers = [worker for worker in workers if worker.job is not None or worker.alive]
            busy = [worker.job for worker in workers if worker.job is not None]
            left = deadline - time.monotonic()
            waiting = [job for job in waiting if _expected(job, known, 1) <= left]
            said, state = state, f"{len(busy)} running, {failed} failed"
            bar.set_postfix_str(state, refresh=state != said)
            if not waiting and not busy:
                break
            share = math.ceil((len(waiting) + len(busy)) / len(devices))
            for device in devices:
                there = sum(worker.device == device for worker in workers)
                # So that they are ready when what the cells wait for is over.
                workers += [Worker(device, lock) for _ in range(there, min(most, share))]
            idle = [worker for worker in workers if worker.job is None]
            while idle:
                running = Counter(worker.device for worker in workers if worker.job is not None)
                worker = min(idle, key=lambda worker: running[worker.device])
                idle.remove(worker)
                at_once = running[worker.device] + 1
                ready = (
                    job
                    for job in waiting
                    if (job.needs is None or job.needs not in [*waiting, *busy])
                    and _expected(job, known, at_once) <= left
                )
                if (job := next(ready, None)) is not None:
                    waiting.remove(job)
                    at_once = min(most, max(at_once, share))  # with those that are about to start
                    busy.append(job)
                    _prepare(job)
                    worker.start(job, at_once)
            time.sleep(POLL)
    finally:
        stop_all(workers)
        bar.close()


def stop_all(workers: Sequence[Worker]) -> None:
    """All are told before one is waited for, which another Ctrl-C may cut short."""
    for worker in workers:
        if worker.job is not None:
            worker.process.terminate()
    for worker in workers:
        worker.stop()


def _known(jobs: Sequence[Job]) -> list[tuple[str, float, int | None]]:
    """Of the finished cells: method, seconds, and how many there were at once."""
    prices = [(job, json.loads((job.folder / "cell.json").read_text())) for job in jobs if job.method and job.done]
    return [(job.method, price["seconds"], price.get("at_once")) for job, price in prices]


def _expected(job: Job, known: Sequence[tuple[str, float, int | None]], at_once: int) -> float:
    """Seconds that a job will take as one of so many, as the slowest of its like; 0 where nothing is known.

    Half of them are taken to grow with what runs beside it: 93 s of 4 at once and 137 s of 8 were seen (135M, H100).
    """
    like = [price for price in known if price[0] == job.method] or known
    return max((seconds * (1 + at_once / (then or at_once)) / 2 for _, seconds, then in like), default=0.0)


def _jobs(grid: Grid, cells: Sequence[Cell], study: Path) -> list[Job]:
    """A job for each student as it is, and one a cell, which waits for it and takes its evaluation over.

    Raises:
        UserError: finished cells are of other keys: a mistake in the command, of which no cell is to suffer.
    """
    bases: dict[str, tuple[Job, Any]] = {}
    jobs: list[Job] = []
    others = []
    digests: dict[Path, str] = {}
    for cell in cells:
        folder = study / "cells" / cell.name
        job = Job(cell.name, folder, [f"--merge={cell.merge}"] if cell.merge else [], method=cell.method)
        if not grid.keep_students:
            job.arguments.append("--drop_student")
            if cell.seed == grid.seeds[0] and not cell.fold:
                job.arguments.append("--analyze")
        try:
            recipe = recipe_of(cell, study)
            _check_unchanged(recipe, study, digests)
            recipe = replace(recipe, student=replace(recipe.student, model=plain_student(recipe, study, digests)))
            if not (folder / "recipe.yaml").exists():
                job.error.unlink(missing_ok=True)  # of a try that did not come to be a run
            key = cell.setting if cell.fold is None else f"{cell.setting}-fold-{cell.fold}"
            claim(folder, recipe, flag="--study")
            if job.done:
                _check_source(recipe, folder)
            if recipe.data.held_out is not None:  # else each seed holds out questions of its own
                if key not in bases:
                    bases[key] = _base(recipe, study / "base" / key)
                    jobs.append(bases[key][0])
                base, asked = bases[key]
                job.needs = base if asked == _asked(recipe) else None
        except UserError as error:
            if job.done:
                others.append(str(error))
            else:
                write_atomically(job.error, str(error))
            continue
        if job.done:
            job.error.unlink(missing_ok=True)  # of a grid that meant another recipe by this name
        jobs.append(job)
    if others:
        raise UserError(f"{len(others)} of the study's finished cells are not what the grid says now: {others[0]}")
    return jobs


def _check_unchanged(recipe: Recipe, study: Path, digests: dict[Path, str]) -> None:
    """STUDY/files.json holds what the student and the files of questions were when the first cell of each was begun.

    Args:
        digests: of those that were looked at before.

    Raises:
        UserError: one has changed: the study's cells would be of different questions.
    """
    path = study / "files.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    found = dict(known)
    for key, file in input_files(recipe).items():
        if file.is_relative_to(study.resolve()):  # what a study makes, it looks after
            continue
        if file not in digests:
            digests[file] = input_digest(key, file)
        if found.setdefault(str(file), digests[file]) != digests[file]:
            raise UserError(
                f"{key}: {file} has changed since the study's first cells; bring it back, or choose another folder "
                "with --study"
            )
    if found != known:
        write_atomically(path, json.dumps(found, indent=1))


def _check_source(recipe: Recipe, folder: Path) -> None:
    """
    Raises:
        UserError: the finished cell's weights came from another source. Of other cells it may be mended.
    """
    source = own_source(recipe.strategy)
    if json.loads((folder / "cell.json").read_text()).get("strategy_source", source) != source:
        raise UserError(
            f"strategy: the file of {recipe.strategy} has changed since {folder} was trained; bring it back, or "
            "choose another folder with --study"
        )


def _base(recipe: Recipe, folder: Path) -> tuple[Job, Any]:
    """What the untrained student does: once for all methods and seeds, which are asked the same; and what it is asked.

    What there is of it stays as it was asked then.
    """
    if not (folder / "evaluation").exists():
        plain_recipe = Recipe(run=str(folder), strategy="uniform", training=recipe.training)
        claim(
            folder,
            replace(plain_recipe, student=recipe.student, data=recipe.data, evaluation=recipe.evaluation),
            flag="--study",
        )
    stored = from_dict(stored_recipe(folder))
    return Job(f"base of {folder.name}", folder, ["--base"]), _asked(stored)


def _asked(recipe: Recipe) -> tuple[Any, ...]:
    """All that an evaluation before training depends on: whose these are equal, one stands for all."""
    data, student = recipe.data, recipe.student
    prompts = data.held_out, data.answer_kind, data.prompt_template, data.suffix, data.max_length
    return student.model, student.dtype, student.attention, prompts, replace(recipe.evaluation, held_text=None)


def _prepare(job: Job) -> None:
    """Nothing is left of an older try, and the evaluation before training, made once, is the cell's too.

    The same files, where the disk can do that.
    """
    for leftover in (job.error, job.folder / "log.txt"):
        leftover.unlink(missing_ok=True)
    if job.needs is None:
        return
    theirs, ours = job.needs.folder / "evaluation" / "before", job.folder / "evaluation" / "before"
    if theirs.exists() and not ours.exists():
        aside = ours.with_name(".before.writing")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(theirs, aside, copy_function=_link)
        aside.replace(ours)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _finish(job: Job, code: int) -> bool:
    if code == 0 and job.done:
        return True
    log = job.folder / "log.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    own = [number for number, line in enumerate(lines) if line.startswith("compact.study: ")]
    if own:  # a mistake's own words end the log
        said = "\n".join(lines[own[-1] :]).removeprefix("compact.study: ")
    else:
        ending = f"status {code}" if code >= 0 else f"signal {-code}"
        said = f"it ended with {ending} ({log}), after: {lines[-1] if lines else 'nothing'}"
    write_atomically(job.error, said)
    return False


def _give_up(jobs: Sequence[Job], failed: Job) -> None:
    """They fail as `failed` did, without a start."""
    for job in jobs:
        write_atomically(job.error, failed.error.read_text(encoding="utf-8"))


def _fitting(jobs: Sequence[Job]) -> int:
    """Cells at once on a GPU: as many of the largest seen so far as its memory holds; one until one was seen."""
    if not torch.cuda.is_available():
        return 1
    peaks = [
        json.loads((job.folder / "cell.json").read_text())["peak_reserved"] for job in jobs if job.method and job.done
    ]
    if not any(peaks):  # none that this machine's memory has seen
        return 1
    total = torch.cuda.get_device_properties(0).total_memory
    return max(1, min(MOST, (os.cpu_count() or 2) // 2, int(0.9 * total // (1.1 * max(peaks) + CONTEXT))))
