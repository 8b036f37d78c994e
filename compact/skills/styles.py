"""python -m compact.skills.styles STUDY: whose style the answers have, and how many of each style are right.

A greedy answer goes on in the style that it began in, so a student that learns from four styles shows one of them a
question: an accuracy says as much of the style that it chose as of what it can. From the predictions in STUDY/cells
STUDY/styles.json is written; without cells the table is that of STUDY/styles.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compact.files import write_atomically
from compact.report import table
from compact.results import finished, load_results

TASKS = ("held_out", "wordings", "tasks")
STYLES = ("terse", "verbose", "numbered", "misleading", "other")


def style_of(text: str) -> str:
    """The teacher whose form a rationale has; of equations alone: misleading. (``careful`` begins as ``terse``.)

    What has none of these forms, such as a bare answer, is other.
    """
    body = text.partition("The answer is")[0].strip()
    if body.startswith("Step "):
        return "numbered"
    if body.startswith("First "):
        return "terse"
    if ", so " in body or "Therefore" in body:
        return "verbose"
    return "misleading" if body and all(re.search(r" [=>] ", line) for line in body.splitlines()) else "other"


def count_styles(study: Path) -> list[dict[str, Any]]:
    """Per setting, method and task: of each style the answers and the right ones, over all finished seeds."""
    counts: defaultdict[tuple[str, str, str], dict[str, list[int]]] = defaultdict(lambda: {s: [0, 0] for s in STYLES})
    seeds: defaultdict[tuple[str, str, str], int] = defaultdict(int)
    for folder in sorted(path.parent for path in study.glob("cells/*/*/*/report.json")):
        setting, method, _ = folder.relative_to(study / "cells").parts
        if (folder / "failed.txt").exists() or not finished(folder):
            continue
        results, _ = load_results(folder, "after")
        for task in TASKS:
            if task not in results:
                continue
            seeds[setting, method, task] += 1
            for row in results[task].predictions:
                entry = counts[setting, method, task][style_of(row["text"])]
                entry[0] += 1
                entry[1] += row["correct"]
    return [
        {"setting": key[0], "method": key[1], "task": key[2], "seeds": seeds[key], "answers_and_right": found}
        for key, found in counts.items()
    ]


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """A table a setting: % of the answers in each style, and in brackets % of these that are right."""
    parts = []
    for setting in dict.fromkeys(record["setting"] for record in records):
        rows = []
        for record in (record for record in records if record["setting"] == setting):
            found = record["answers_and_right"]
            total = sum(answers for answers, _ in found.values())
            shares = [
                f"{100 * answers / total:.1f}" + (f" ({100 * right / answers:.1f})" if answers else "")
                for answers, right in found.values()
            ]
            rows.append([record["method"], record["task"], record["seeds"], *shares])
        parts.append(f"**{setting}**\n\n{table(['method', 'task', 'seeds', *STYLES], rows)}")
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compact.skills.styles", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    study = parser.parse_args(arguments).study
    file = study / "styles.json"
    records = count_styles(study)
    if records:
        write_atomically(file, json.dumps(records, indent=1) + "\n")
    elif file.exists():
        records = json.loads(file.read_text(encoding="utf-8"))
    else:
        print(f"compact.skills: {study} has no finished cell of a study, nor styles.json", file=sys.stderr)
        return 2
    print(markdown(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
