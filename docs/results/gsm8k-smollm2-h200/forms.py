"""python forms.py STUDY/cells/gsm8k METHOD …: in what form held-out questions are answered, and how many right."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path


def form(text: str) -> str:
    """equations: no word before the closing; paragraph: one line; lines: sentences, one a line."""
    body = text.partition("The answer is")[0].strip()
    if not re.search("[A-Za-z]{3}", body):
        return "equations"
    return "lines" if "\n" in body else "paragraph"


for method in sys.argv[2:]:
    folders = sorted((Path(sys.argv[1]) / method).glob("seed-0-fold-*/evaluation/after"))
    found = [json.loads(line) for folder in folders for line in (folder / "held_out.jsonl").read_text().splitlines()]
    print(f"{method}: {len(found)} answers, {sum(row['correct'] for row in found)} right")
    print(f"  unfinished {sum(not row['finished'] for row in found) / len(found):.1%}")
    for name in ("lines", "paragraph", "equations"):
        some = [row["correct"] for row in found if form(row["text"]) == name]
        print(f"  {name} {len(some) / len(found):.1%}, {sum(some)} right")
