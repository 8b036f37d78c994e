"""python -m compact.study.cell FOLDER: one cell of a study; FOLDER/recipe.yaml is its recipe.

With --base the student is only evaluated as it is; with --merge N a branch a teacher is trained and merged, N times.
The cell is finished then. With --analyze compact.analyze looks into the student afterwards, before --drop_student
deletes it. With --serve alone the arguments of one cell after another come as lines of JSON, and each one's exit
status is the answer.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import compact.analyze
from compact.config import from_dict, read_recipe
from compact.errors import UserError
from compact.files import write_atomically
from compact.options import plain
from compact.results import load_results
from compact.strategies import own_source
from compact.study.merge import clear, run_merged
from compact.train import run


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compact.study.cell", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", action="store_true")
    parser.add_argument("--merge", type=int, default=0)
    parser.add_argument("--analyze", action="store_true")
    parser.add_argument("--drop_student", action="store_true")
    parser.add_argument("--at_once", type=int, default=1, help="cells that run beside each other, itself included")
    given = parser.parse_args(argv)
    started = time.time()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    folder = given.folder
    try:
        recipe = from_dict(plain(read_recipe(str(folder / "recipe.yaml"))))
        recipe = replace(recipe, run=str(folder))  # wherever the study was begun
        source = own_source(recipe.strategy)
        if given.base:
            if not load_results(folder, "before")[0]:
                run(recipe, only_before=True)
        elif given.merge:
            run_merged(recipe, given.merge)
        else:
            run(recipe)
    except UserError as error:
        print(f"\ncompact.study: {error}", file=sys.stderr)  # a line of its own, below a progress bar
        return 2
    peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    price = {"seconds": max(time.time() - started, _phases(folder)), "at_once": given.at_once, "peak_reserved": peak}
    clear(folder)
    write_atomically(folder / "cell.json", json.dumps({**price, "strategy_source": source}))
    if given.analyze and (folder / "student").exists():  # other seeds do without: it is no part of the result or price
        try:
            compact.analyze.main([str(folder)])
        except Exception:  # the result stands
            traceback.print_exc()
    # Optimizer states are many times the student's size, and a finished cell goes on with none of them.
    for part in ["checkpoints", "cache", *(["student"] if given.drop_student else [])]:
        shutil.rmtree(folder / part, ignore_errors=True)
    return 0


def _phases(folder: Path) -> float:
    """Seconds that the phases of a run took, in whichever processes: this one may have gone on with it."""
    timing = folder / "timing.json"
    seconds = json.loads(timing.read_text())["seconds"] if timing.exists() else {}
    return sum(value for name, value in seconds.items() if name != "start")


def serve() -> int:
    """Run cells as they are asked for; give up after one that broke, for it may have broken this process too."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        arguments = json.loads(line)
        with (Path(arguments[0]) / "log.txt").open("wb") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        try:
            code = main(arguments)
        except Exception:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        print(code, file=answers, flush=True)
        if code not in (0, 2):
            return code
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["--serve"] else main())
