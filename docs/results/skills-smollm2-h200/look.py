"""python look.py STUDY: the page's figures that the study's tables do not have, from STUDY/data and STUDY/cells."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

from transformers import AutoTokenizer

study = Path(sys.argv[1])
data = study / "data" / "misleading"


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def percent(values) -> str:
    return f"{100 * mean(values):.0f}%"


tokenizer = AutoTokenizer.from_pretrained(study / "student")
tokens, right = defaultdict(list), defaultdict(list)
trained = {row["prompt"] for file in data.glob("train-*.jsonl") for row in rows(file)}
for row in rows(data / "train-0.jsonl"):
    for told in row["rationales"]:
        tokens[told["teacher"]].append(len(tokenizer(told["completion"])["input_ids"]))
        right[told["teacher"]].append(told["answer"] == row["answer"])
inverse = {name: mean(1 / n for n in counts) for name, counts in tokens.items()}
for name, counts in tokens.items():
    share = inverse[name] / sum(inverse.values())
    print(f"{name}: {mean(counts):.0f} tokens, right {percent(right[name])}, {share:.0%} of the first tokens' weight")

asked = {task: {row["id"]: row for row in rows(data / f"{task}.jsonl")} for task in ("held_out", "wordings", "tasks")}
prompts = {row["prompt"] for task in asked.values() for row in task.values()}
print("held-out prompts in training:", len(prompts & trained))
unfinished = unclosed = differing = total = 0
for method in ("uniform", "uniform_token", "compact", "compact_token", "mind", "single:verbose"):
    cells = study / "cells" / "misleading" / method.replace(":", "-")
    after = [path / "evaluation" / "after" for path in sorted(cells.iterdir())]
    after = [folder for folder in after if folder.exists()]
    for task, questions in asked.items():
        skills, same = defaultdict(list), []
        for row in (row for folder in after for row in rows(folder / f"{task}.jsonl")):
            question = questions[row["id"]]
            skills[question["skill"]].append(row["correct"])
            if not row["correct"]:
                misled = next(told for told in question["rationales"] if told["teacher"] == "misleading")
                same.append(row["flexible"] == misled["answer"])
            total += 1
            unfinished += not row["finished"]
            unclosed += "The answer is" not in row["text"]
            differing += row["correct"] != row["strict_correct"]
        print(method, task, {name: percent(values) for name, values in skills.items()}, end="; ")
        print(f"the misleading teacher's own answer: {percent(same)} of the wrong ones")
    for task in ("strategyqa", "csqa"):
        for when, folders in (("before", after[:1]), ("after", after)):
            found = [row for folder in folders for row in rows(folder.parent / when / f"{task}.jsonl")]
            answers = [row for row in found if row["flexible"] is not None]
            held = percent(row["flexible"] is not None for row in found)
            correct = percent(row["correct"] for row in answers)
            print(method, task, when, f"{held} hold an answer, {correct} of them right")
print(f"{total} answers: {unfinished} unfinished, {unclosed} unclosed, {differing} read differently when strict")
