"""One case (a work on a head) from start to records."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from bench import norms, steps
from bench.records import Record
from bench.shapes import Scale, Shape
from bench.targets import is_ours
from bench.timing import Runner, attempt, floor, free_memory, peak_bytes, time_rounds
from bench.works import WORKS, Contender, accumulator_mib

Say = Callable[[str], None]


def cases(works: Collection[str], heads: Collection[str], scale: Scale) -> Iterator[tuple[str, Shape]]:
    """(work, head) in the order they are run; a step has one head, its student's."""
    for work in works:
        if work in WORKS:
            yield from ((work, shape) for shape in scale.heads if not heads or shape.label in heads)
        else:
            yield work, steps.student_of(work, scale).head


def measure(
    work: str,
    shape: Shape,
    scale: Scale,
    device: torch.device,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    rounds: int = 20,
    say: Say = print,
) -> list[Record]:
    """Records of one case, without what is the same in a whole run (device, versions, commit).

    Args:
        wanted: whether to run the contender of this name.
    """
    if work in WORKS:
        return _measure_head(work, shape, scale, device, wanted, rounds, say)
    if work in norms.NORMS:
        return _measure_norms(work, shape, scale, device, wanted, rounds, say)
    return _measure_step(work, shape, scale, device, wanted, rounds, say)


def _measure_head(
    work: str, shape: Shape, scale: Scale, device: torch.device, wanted: Callable[[str], bool], rounds: int, say: Say
) -> list[Record]:
    case = WORKS[work]
    problem = case.problem(shape, scale, device)
    say(f"    {problem.rows.shape[0]} of {problem.dense.shape[0]} rows scored, {problem.facts}")
    chosen = [contender for contender in case.contenders if wanted(contender.name)]
    runners = [contender.runner(problem, scale) for contender in chosen]
    bound = floor(problem, scale, case.products)
    time_rounds([*bound.runners, bound.copy, *runners], rounds, say=say)
    floors = bound.figures(with_logits=case.products > 1)
    del bound
    free_memory()
    records = []
    for contender, runner in zip(chosen, runners, strict=True):
        memory: dict[str, float | None] = {}

        def weigh(contender: Contender = contender, runner: Runner = runner, memory: dict = memory) -> None:
            peak = peak_bytes(runner)
            accumulator = accumulator_mib(contender, problem)
            memory["peak_mib"] = None
            if peak is not None:
                whole = (peak - problem.gradient_bytes()) / 2**20
                memory["peak_mib"] = round(max(0.0, whole - accumulator), 1)
            memory["dw_accum_mib"] = round(accumulator, 1)

        attempt(runner, weigh)
        problem.clear()
        record: Record = {"work": work, "head": shape.label, "contender": runner.name}
        record |= _outcome(runner, memory)
        record |= floors
        record |= {"rows": problem.rows.shape[0], **problem.facts}
        if contender.workspace_mib is not None:
            record["workspace_mib"] = contender.workspace_mib
        if contender.note:
            record["note"] = contender.note
        records.append(record)
    return records


def _measure_step(
    work: str, shape: Shape, scale: Scale, device: torch.device, wanted: Callable[[str], bool], rounds: int, say: Say
) -> list[Record]:
    with steps.step(work, scale, device) as prepared:
        runners = [runner for runner in steps.runners(prepared, scale) if wanted(runner.name)]
        say(f"    {prepared.scored.numel()} of {prepared.targets.numel()} tokens scored")
        time_rounds(runners, rounds, say=say)
        records = []
        for runner in runners:
            memory: dict[str, Any] = {}

            def weigh(runner: Runner = runner, memory: dict = memory) -> None:
                peak = peak_bytes(runner, total=True)
                memory["peak_mib"] = None if peak is None else round(peak / 2**20, 1)
                memory["dw_accum_mib"] = 0.0

            attempt(runner, weigh)
            record: Record = {"work": work, "head": shape.label, "contender": runner.name}
            record |= _outcome(runner, memory) | {"floor_ms": None, "rows": prepared.scored.numel()}
            record["attention"] = steps.attention(prepared)
            if is_ours(record):
                record["workspace_mib"] = steps.CONFIG.workspace_mib
            if runner.note:
                record["note"] = runner.note
            records.append(record)
    return records


def _measure_norms(
    work: str, shape: Shape, scale: Scale, device: torch.device, wanted: Callable[[str], bool], rounds: int, say: Say
) -> list[Record]:
    return [
        record
        for mode in norms.BY_MODE
        for record in _measure_norms_mode(work, mode, shape, scale, device, wanted, rounds, say)
    ]


def _measure_norms_mode(
    work: str,
    mode: str,
    shape: Shape,
    scale: Scale,
    device: torch.device,
    wanted: Callable[[str], bool],
    rounds: int,
    say: Say,
) -> list[Record]:
    records = []
    with norms.arms(work, mode, scale, device, wanted) as (runners, held):
        time_rounds(runners, rounds, say=say, patience=norms.WARMUP_SECONDS)
        for runner in runners:
            memory: dict[str, Any] = {}

            def weigh(runner: Runner = runner, memory: dict = memory) -> None:
                for other in runners:  # gradients that the others' last rounds left are not this one's
                    other.before()
                peak = peak_bytes(runner, total=True)
                others = sum(size for name, size in held.items() if name != runner.name)
                captured = mode == "captured"  # a graph's memory is its own from capture on
                memory["peak_mib"] = None if peak is None or captured else round((peak - others) / 2**20, 1)
                memory["dw_accum_mib"] = 0.0

            if runner.error is None:
                attempt(runner, weigh)
            record: Record = {"work": work, "head": shape.label, "contender": runner.name}
            record |= _outcome(runner, memory) | {"floor_ms": None}
            if runner.note:
                record["note"] = runner.note
            records.append(record)
    return records


def _outcome(runner: Runner, memory: dict[str, Any]) -> Record:
    if runner.error is not None or not runner.seconds:
        return {"error": runner.error or "no round was run"}
    return {**runner.times_ms(), **memory}
