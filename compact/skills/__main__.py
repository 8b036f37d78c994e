"""python -m compact.skills FOLDER: the files of the skills study.

train.jsonl       questions with the rationales of four teachers
held_out.jsonl    in distribution: the same skills and wordings, other contents
wordings.jsonl    out of distribution: a wording of each skill that was never trained on
tasks.jsonl       out of distribution: tasks that were never trained on
gym.jsonl         the same, by reasoning-gym's generators and verifiers, where it is installed (--gym N)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from compact.commandline import positive
from compact.errors import UserError
from compact.files import write_atomically
from compact.skills.files import write_skills


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compact.skills", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=positive, default=1000, help="to train on (default: 1000)")
    parser.add_argument("--held_out", type=positive, default=400, help="in each held-out file (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="of the training questions (default: 0)")
    parser.add_argument("--part", choices=("test", "validation"), default="test")
    parser.add_argument("--honest", action="store_true", help="no misleading teacher")
    parser.add_argument("--one_style", action="store_true", help="all teachers write in the same style")
    parser.add_argument(
        "--held_out_wording", type=int, default=3, help="of each skill's wordings, 0 to 3 (default: 3)"
    )
    parser.add_argument("--gym", type=int, default=0, help="questions by reasoning-gym (default: none)")
    given = parser.parse_args(arguments)
    try:
        _keep_apart(given)
        files = write_skills(
            given.folder,
            questions=given.questions,
            held_out=given.held_out,
            seed=given.seed,
            part=given.part,
            misleading=not given.honest,
            one_style=given.one_style,
            held_out_wording=given.held_out_wording,
            gym=given.gym,
        )
    except (UserError, OSError) as error:
        print(f"compact.skills: {error}", file=sys.stderr)
        return 2
    for file in files.values():
        print(file)
    return 0


def _keep_apart(given: argparse.Namespace) -> None:
    """FOLDER/skills.json holds what its files were made of: those that are there are kept, and others refused."""
    note = given.folder / "skills.json"
    facts = {name: value for name, value in vars(given).items() if name != "folder"}
    files = [given.folder / f"{name}.jsonl" for name in ("train", "held_out", "wordings", "tasks", "gym")]
    there = [file for file in files if file.exists()]
    if there and (not note.exists() or json.loads(note.read_text()) != facts):
        made = f"by {note.read_text()}" if note.exists() else "by other words"
        raise UserError(f"{there[0]} was made {made}; choose another folder")
    write_atomically(note, json.dumps(facts))


if __name__ == "__main__":
    sys.exit(main())
