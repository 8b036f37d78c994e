"""python -m compact.study GRID.yaml [--key value …]: run a study, or go on with it, and say what came out.

The same command goes on with an interrupted study, cell by cell. STUDY/study.md and study.json hold the result.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from compact.errors import UserError
from compact.options import plain
from compact.study.grid import grid_help, load_grid
from compact.study.runner import locked, run_cells
from compact.study.summary import write_summary
from compact.yamlfile import write_file


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if "--help" in words or "-h" in words:
        print(grid_help())
        return 0
    try:
        grid, cells, tree = load_grid(words)
        study = Path(grid.study)
        if study.exists() and any(study.iterdir()) and not (study / "grid.yaml").exists():
            raise UserError(f"{study} is not empty and holds no study: choose another folder with --study")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what ends this process ends its cells
        with locked(study) as lock:
            write_file(plain(tree), study / "grid.yaml")
            run_cells(grid, cells, lock)
            failed = write_summary(grid, cells)
    except UserError as error:
        print(f"compact.study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncompact.study: stopped; the same command goes on with it", file=sys.stderr)
        return 130
    print((study / "study.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
