"""python -m compact.study GRID.yaml [--price] [--minutes N] [--key value …]: run a study, or go on with it.

The same command goes on with an interrupted study, cell by cell. STUDY/study.md and study.json hold the result, or
what there is of it. --price runs the first cell alone and says what the others would take; --minutes N starts no cell
that would not be finished by then.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from compact.errors import UserError
from compact.options import Given, plain
from compact.run_folder import locked
from compact.study.data import check_folds
from compact.study.grid import Cell, grid_help, load_grid
from compact.study.runner import run_cells
from compact.study.summary import write_summary
from compact.yamlfile import read_file, write_file


def _minutes(text: str) -> float:
    with suppress(ValueError):
        if (minutes := float(text)) >= 0:
            return minutes
    raise argparse.ArgumentTypeError(f"{text} is no number of minutes, 0 or more")


def _check_same(study: Path, tree: Given, cells: Sequence[Cell]) -> None:
    """
    Raises:
        UserError: the folder holds another study, which this one would write its grid and its table over.
    """
    done = {path.parent.relative_to(study / "cells").as_posix() for path in study.glob("cells/*/*/*/cell.json")}
    if not done or done & {cell.name for cell in cells}:  # what both have is compared cell by cell
        return
    known, given = plain(read_file(study / "grid.yaml")), plain(tree)
    for key in ("recipe", "set", "settings"):
        ours, theirs = given.get(key) or {}, known.get(key) or {}
        if key == "settings":  # one may have more of them
            ours, theirs = ({name: some[name] for name in ours.keys() & theirs.keys()} for some in (ours, theirs))
        if ours != theirs:
            raise UserError(
                f"{study} holds another study, of {len(done)} finished cells: its {key} is {theirs!r}, this one's "
                f"{ours!r}. Choose another folder with --study"
            )


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if "--help" in words or "-h" in words:
        print(grid_help())
        return 0
    parser = argparse.ArgumentParser(prog="compact.study", add_help=False, allow_abbrev=False)
    parser.add_argument("--price", action="store_true")
    parser.add_argument("--minutes", type=_minutes)
    given, words = parser.parse_known_args(words)
    try:
        grid, cells, tree = load_grid(words)
        check_folds(grid, cells)
        study = Path(grid.study)
        there = {path.name for path in study.iterdir()} - {".lock"} if study.is_dir() else set()
        if there and "grid.yaml" not in there:
            raise UserError(f"{study} is not empty and holds no study: choose another folder with --study")
        for number in (signal.SIGTERM, signal.SIGHUP):  # what ends this process ends its cells
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, signal.default_int_handler)
        with locked(study, "study", "--study") as lock:
            if there:
                _check_same(study, tree, cells)
            keep = partial(write_file, plain(tree), study / "grid.yaml")
            if not there:  # it is a study from now on, should it be stopped while its data are made
                keep()
            try:
                run_cells(grid, cells[:1] if given.price else cells, lock, given.minutes, agreed=keep)
            except KeyboardInterrupt:  # of a study that is stopped, what there is
                write_summary(grid, cells)
                raise
            failed = write_summary(grid, cells)
    except UserError as error:
        print(f"compact.study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ncompact.study: stopped; the same command goes on with it; study.md there has what is finished",
            file=sys.stderr,
        )
        return 130
    print((study / "study.md").read_text(encoding="utf-8"))
    print(study / "study.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
