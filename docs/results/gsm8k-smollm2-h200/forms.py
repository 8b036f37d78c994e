"""python forms.py STUDY/cells/gsm8k METHOD …: in what form held-out questions are answered, and how many right.

Before training too; of all seeds that are whole.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path


def form(text: str) -> str:
    """equations: no word before the closing; paragraph: one line; lines: sentences, one a line."""
    body = text.partition("The answer is")[0].strip()
    if not re.search("[A-Za-z]{3}", body):
        return "equations"
    return "lines" if "\n" in body else "paragraph"


def tell(title: str, files: list[Path]) -> None:
    found = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    print(f"{title}: {len(found)} answers, {sum(row['correct'] for row in found)} right")
    print(f"  unfinished {sum(not row['finished'] for row in found) / len(found):.1%}")
    for name in ("lines", "paragraph", "equations"):
        some = [row["correct"] for row in found if form(row["text"]) == name]
        print(f"  {name} {len(some) / len(found):.1%}, {sum(some)} right")


cells = Path(sys.argv[1])
before = sorted((cells.parent.parent / "base").glob(f"{cells.name}-fold-*/evaluation/before/held_out.jsonl"))
tell("before training", before)
for method in sys.argv[2:]:
    seeds = defaultdict(list)
    for file in sorted((cells / method).glob("seed-*-fold-*/evaluation/after/held_out.jsonl")):
        seeds[file.parents[2].name.partition("-fold-")[0]].append(file)
    tell(method, [file for files in seeds.values() if len(files) == len(before) for file in files])
