"""Measure, write `<device>.json`, and draw the page: `python -m bench`."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # students are random: nothing is to be fetched

from bench import measure, norms, page, records, steps  # noqa: E402  after the environment
from bench.shapes import TINY, device, scale  # noqa: E402
from bench.targets import MODES  # noqa: E402
from bench.timing import free_memory, one_line, synchronize  # noqa: E402
from bench.works import WORKS  # noqa: E402

ALL = (*WORKS, *steps.STEPS, *norms.NORMS)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("--works", nargs="+", choices=ALL, default=list(ALL), metavar="WORK", help=", ".join(ALL))
    parser.add_argument("--heads", nargs="+", default=[], metavar="VxD", help="default: all; steps have their own")
    parser.add_argument("--contenders", nargs="+", default=[], metavar="NAME", help="default: all of each work")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="contenders to leave out")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds; fewer where a case would take long")
    parser.add_argument("--out", type=Path, default=records.RESULTS, metavar="FOLDER")
    parser.add_argument("--merge", action="store_true", help="add to the folder's results, replacing the same cases")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no case that would end after this")
    parser.add_argument(
        "--page", nargs="*", type=Path, metavar="JSON", help="measure nothing: join results, later ones win, and draw"
    )
    parser.add_argument("--commit", default=records.commit(), help="to record where this is not run in a checkout")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args(argv)
    unknown = set(parsed.heads) - {shape.label for shape in scale().heads}
    if unknown and not parsed.tiny:
        parser.error(f"--heads {' '.join(sorted(unknown))}: choose from {' '.join(s.label for s in scale().heads)}")
    names = {contender.name for work in WORKS.values() for contender in work.contenders} | {
        "compact",
        *steps.ARMS,
        *norms.ARMS,
    }
    known = names | {name + ending for name in names for ending in MODES}
    if unknown := {*parsed.contenders, *parsed.without} - known:
        parser.error(f"no contender {' '.join(sorted(unknown))}: choose from {' '.join(sorted(names))}")
    if parsed.rounds < 1:
        parser.error(f"--rounds {parsed.rounds}: at least 1")
    return parsed


def main(argv: list[str]) -> None:
    asked = arguments(argv)
    path = asked.out / f"{records.file_stem()}.json"
    if asked.page is not None:
        _join(asked.page or [path], asked.out)
        return
    began = time.monotonic()
    sizes = TINY if asked.tiny else scale()
    everything = records.load(path) if asked.merge else []
    common = {
        "device": records.device_name(),
        "versions": records.versions(),
        "commit": asked.commit,
        "compile_backend": sizes.compile_backend,
        "run": datetime.datetime.now().isoformat(timespec="seconds"),
    }
    say(f"{common['device']}, {common['versions']}, commit {common['commit']}")
    fresh: list[records.Record] = []
    skipped, failed, longest = [], [], 0.0
    for work, shape in measure.cases(asked.works, asked.heads, sizes):
        elapsed = time.monotonic() - began
        if asked.budget is not None and elapsed + longest > asked.budget:
            skipped.append(f"{work} {shape.label}")
            continue
        say(f"[{elapsed:6.0f} s] {work} {shape.label}")
        try:
            found = measure.measure(work, shape, sizes, device(), wanted=chosen(asked), rounds=asked.rounds, say=say)
            synchronize()
        except Exception as error:  # of the case, not of a contender; the other cases are still worth having
            failed.append(f"{work} {shape.label}: {one_line(error)}")
            say(f"    {failed[-1]}")
            continue
        free_memory()
        longest = max(longest, time.monotonic() - began - elapsed)
        fresh += [{**record, **common} for record in found]
        everything = records.merged(everything, fresh)
        records.save(everything, path)
    page.write(everything, path)
    say(page.plain_table(fresh))
    say(page.plain_targets(fresh))
    for what, names in (("skipped, out of budget", skipped), ("failed", failed)):
        if names:
            say(f"{what}: {'; '.join(names)}")
    say(f"{time.monotonic() - began:.0f} s; {path} and {path.with_suffix('.md')}")


def _join(sources: list[Path], out: Path) -> None:
    """The records of all `sources` in one file of `out`, named as the first, and its page."""
    everything: list[records.Record] = []
    for source in sources:
        if not source.exists():
            sys.exit(f"--page: no such file: {source}")
        everything = records.merged(everything, records.load(source))
    path = out / sources[0].name
    records.save(everything, path)
    page.write(everything, path)
    say(page.plain_targets(everything))


def chosen(asked: argparse.Namespace) -> Callable[[str], bool]:
    """Which contenders to run, by name; "liger" stands for "liger_frozen" and "liger_compiled" too."""

    def named(name: str, names: list[str]) -> bool:
        return name in names or any(name == other + ending for other in names for ending in MODES)

    return lambda name: (not asked.contenders or named(name, asked.contenders)) and not named(name, asked.without)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
