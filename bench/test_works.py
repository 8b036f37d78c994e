"""The cases of `python -m bench` under pytest-benchmark: `pytest bench --benchmark-only`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench import steps
from bench.measure import cases
from bench.shapes import Shape, device, scale
from bench.timing import Runner, free_memory, one_line, peak_bytes, synchronize
from bench.works import WORKS

pytest.importorskip("pytest_benchmark")

HEAD_CASES = [
    pytest.param(work, shape, contender, id=f"{work}-{shape.label}-{contender.name}")
    for work, shape in cases(list(WORKS), [], scale())
    for contender in WORKS[work].contenders
]
ARMS = [name + suffix for suffix in ("", "_compiled") for name in ("compact", *steps.ARMS)]


class Kept:
    """The last problem or student: building one takes longer than timing it, and the cases come in order."""

    key: object = None
    value: object = None

    def get(self, key: object, make):
        if key != self.key:
            self.key, self.value = None, None
            free_memory()
            self.key, self.value = key, make()
        return self.value


@pytest.fixture(scope="module")
def kept() -> Iterator[Kept]:
    kept = Kept()
    yield kept
    kept.value = None
    free_memory()


def run(benchmark, runner: Runner) -> None:
    """Time one contender; a peer that cannot run here is skipped with its reason, COMPACT fails."""
    give_up = pytest.fail if runner.name.startswith("compact") else pytest.skip
    if runner.error is not None:
        give_up(runner.error)

    def one_round() -> None:
        runner.run()
        synchronize()

    def before() -> None:
        runner.before()
        synchronize()

    try:
        before()
        one_round()
    except Exception as error:  # peers fail in their own ways
        give_up(one_line(error))
    benchmark.pedantic(one_round, setup=before, rounds=5, warmup_rounds=2)
    peak = peak_bytes(runner, total=True)
    if peak is not None:
        benchmark.extra_info["allocated_peak_mib"] = round(peak / 2**20, 1)


@pytest.mark.parametrize(("work", "shape", "contender"), HEAD_CASES)
def test_head(benchmark, kept, work: str, shape: Shape, contender) -> None:
    problem = kept.get((work, shape), lambda: WORKS[work].problem(shape, scale(), device()))
    benchmark.group = f"{work} {shape.label}"
    benchmark.extra_info.update(problem.facts)
    run(benchmark, contender.runner(problem, scale()))
    problem.clear()


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("work", steps.STEPS)
def test_step(benchmark, kept, work: str, name: str) -> None:
    def make() -> dict[str, Runner]:
        return {runner.name: runner for runner in steps.runners(steps.prepare_step(work, scale(), device()), scale())}

    benchmark.group = work
    run(benchmark, kept.get(work, make)[name])
