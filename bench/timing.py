"""Interleaved rounds on a device, peak memory, and the floor that no head can go below."""

from __future__ import annotations

import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from bench.batches import Problem
from bench.shapes import Scale

Round = Callable[[], object]
CASE_SECONDS = 25.0
WARMUP_SECONDS = 40


@dataclass
class Runner:
    """One contender, built: a forward (and backward) pass, and what is to happen before each, untimed."""

    name: str
    run: Round
    before: Round = lambda: None
    note: str = ""
    error: str | None = None
    spin: int = 0  # cycles that a GPU waits before a round: its launches are then queued, as in a longer computation
    passes: int = 1  # of the contender in a round, for one whose passes are not alike: `seconds` are their mean
    seconds: list[float] = field(default_factory=list)

    def times_ms(self) -> dict[str, float]:
        ordered = sorted(1e3 * s for s in self.seconds)
        return {
            "median_ms": round(statistics.median(ordered), 4),
            "p20_ms": round(_quantile(ordered, 0.2), 4),
            "p80_ms": round(_quantile(ordered, 0.8), 4),
        }


def one_line(error: BaseException) -> str:
    """What a record says of a contender that cannot run."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:300]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(runner: Runner, work: Round) -> None:
    """Run `work`; whatever it raises becomes the runner's error, what it held is freed, and it is not run again."""
    if runner.error is not None:
        return
    try:
        work()
    except Exception as error:  # peers fail in their own ways, and one failure must not end the run
        runner.error = one_line(error)
    if runner.error is not None:
        free_memory()


def time_rounds(
    runners: list[Runner],
    rounds: int,
    warmup: int = 3,
    say: Callable[[str], None] = print,
    patience: int | None = None,
) -> None:
    """Warm up each, then take turns: in every round each contender runs once, so that clocks drift for all alike.

    Rounds are fewer, 5 at least, where all of them would take more than `CASE_SECONDS`.
    """
    for runner in runners:
        began = time.perf_counter()
        with _patience(runner, WARMUP_SECONDS if patience is None else patience):
            for _ in range(warmup):
                attempt(runner, lambda runner=runner: runner.seconds.append(_timed(runner)))  # type: ignore[misc]
        say(f"    {runner.name}: warm after {time.perf_counter() - began:.1f} s{_tail(runner)}")
    alive = [runner for runner in runners if runner.error is None]
    one_round = sum(runner.seconds[-1] * runner.passes for runner in alive)
    for runner in alive:
        runner.seconds.clear()
    for _ in range(min(rounds, max(5, int(CASE_SECONDS / max(one_round, 1e-9))))):
        for runner in alive:
            attempt(runner, lambda runner=runner: runner.seconds.append(_timed(runner)))  # type: ignore[misc]


@contextmanager
def _patience(runner: Runner, seconds: int) -> Iterator[None]:
    """Raises in what takes too long to warm up: a peer may tune its kernels for minutes at a shape it has not met."""

    def out_of_patience(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s to warm up")

    before = signal.signal(signal.SIGALRM, out_of_patience)
    signal.alarm(seconds)
    try:
        yield
    except TimeoutError as error:  # it came between two attempts
        runner.error = one_line(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _timed(runner: Runner) -> float:
    """Seconds of one pass: device events around it on a GPU, the host's clock on a CPU."""
    runner.before()
    synchronize()
    if not torch.cuda.is_available():
        began = time.perf_counter()
        runner.run()
        return (time.perf_counter() - began) / runner.passes
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if runner.spin:
        torch.cuda._sleep(runner.spin)
    start.record()
    runner.run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / runner.passes


def peak_bytes(runner: Runner, *, total: bool = False) -> int | None:
    """Most memory allocated in one round, beyond what was there before it, or in all with `total`; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    runner.before()
    gc.collect()  # what earlier contenders left in cycles is not to be freed while this one runs
    synchronize()
    before = 0 if total else torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner.run()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Floor:
    """Runners of the head's bare matrix products; the best of them is the floor, and four bytes a logit on top."""

    runners: list[Runner]
    copy: Runner
    copy_bytes: int  # read and written
    logits: int  # N·V

    def figures(self, *, with_logits: bool) -> dict[str, float | None]:
        gemms = min(
            (1e3 * statistics.median(runner.seconds) for runner in self.runners if runner.seconds), default=None
        )
        if gemms is None:
            return {"floor_ms": None, "gemm_floor_ms": None}
        if not with_logits or not self.copy.seconds:
            return {"floor_ms": round(gemms, 4), "gemm_floor_ms": round(gemms, 4)}
        bandwidth = self.copy_bytes / statistics.median(self.copy.seconds)  # bytes a second
        passes = 1e3 * 4 * self.logits / bandwidth
        return {
            "floor_ms": round(gemms + passes, 4),
            "gemm_floor_ms": round(gemms, 4),
            "copy_tb_s": round(bandwidth / 1e12, 3),
        }


def floor(problem: Problem, scale: Scale, products: int) -> Floor:
    """The head's `products` matrix products (1: logits; 2: and dX; 3: and dW) through cuBLAS, on the scored rows.

    In one piece where two (N, V) buffers fit into a fifth of the memory, and in chunks of 4096 rows. The products
    with G are of a true gradient, softmax minus one: products of random or of zero matrices run at other clocks.
    """
    x, w = problem.rows.detach(), problem.head.detach()
    count, vocabulary = x.shape[0], w.shape[0]
    sizes = [min(4096, count)]
    if torch.cuda.is_available() and 10 * count * vocabulary * x.element_size() < torch.cuda.mem_get_info()[1]:
        sizes = list(dict.fromkeys([*sizes, count]))
    runners = [Runner(f"floor, {size} rows", _products(x, w, problem.row_targets, size, products)) for size in sizes]
    source = torch.randn(scale.copy_mib << 18, device=x.device)
    copied = torch.empty_like(source)
    nbytes = 2 * source.numel() * source.element_size()
    return Floor(runners, Runner("copy", lambda: copied.copy_(source)), nbytes, count * vocabulary)


def _products(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, size: int, products: int) -> Round:
    logits = torch.empty(size, w.shape[0], device=x.device, dtype=x.dtype)
    dx, dw = torch.empty_like(x), torch.empty_like(w)
    gradient = torch.empty_like(logits)
    for a, b in _ranges(size, 512):  # of the first rows; in float32 for 512 at a time
        p = (x[a:b] @ w.T).float().softmax(-1)
        p[torch.arange(b - a, device=x.device), targets[a:b]] -= 1
        gradient[a:b] = p

    def run() -> None:
        for a, b in _ranges(x.shape[0], size):
            torch.mm(x[a:b], w.T, out=logits[: b - a])
            if products > 1:
                torch.mm(gradient[: b - a], w, out=dx[a:b])
            if products > 2 and a == 0:
                torch.mm(gradient[: b - a].T, x[a:b], out=dw)
            elif products > 2:
                dw.addmm_(gradient[: b - a].T, x[a:b])

    return run


def _ranges(count: int, size: int) -> list[tuple[int, int]]:
    return [(a, min(a + size, count)) for a in range(0, count, size)]


def _quantile(ordered: list[float], share: float) -> float:
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def _tail(runner: Runner) -> str:
    return "" if runner.error is None else f" — {runner.error}"
