"""What the native library's ops take beside what they replace: `python -m bench.native`.

On a GPU the rule and the consensus, under graph replay and ungraphed, against Triton's launches and eager torch.
On a CPU the head's loss, forward and backward with every statistic of every row, against torch's plain cross entropy
and against its three matrix products alone; the same pass in chunks of plain torch; and the answers' divergence.
Memory is the process's peak beyond what was there before the call, less the gradients that the call returns.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from compact_kernels import (
    AdaptabilityOptions,
    CompatibilityRule,
    Ragged,
    TokenStatistics,
    answer_divergence,
    compatibility_loss,
    divergence_torch,
    native,
    native_cuda,
    reference,
)
from compact_kernels import divergence as divergence_module
from compact_kernels.dispatch import TRITON_FOUND
from compact_kernels.head import backend
from compact_kernels.weighting import Decision, Weighting
from compact_kernels.weighting import decide as plain_decide

V, D = 49152, 576
QUESTIONS, RATIONALES, ROWS, SPAN = 8, 4, 64, 5
CPU_TARGETS = {torch.float32: (0.80, 1.12), torch.bfloat16: (0.70, 1.20)}  # of eager, of the products
MEMORY_TARGET = 0.10  # of eager's


def make_batch(rows: int = ROWS) -> Ragged:
    """Questions of alike rationales with an answer of two ids in a span of five rows."""
    count = QUESTIONS * RATIONALES
    return Ragged.build(
        sequence_lengths=[1 + rows] * count,
        prompt_lengths=[1] * count,
        rationales_per_question=[RATIONALES] * QUESTIONS,
        body_lengths=[rows - 1] * count,
        evidence_ids=[[11, 12]] * count,
        answer_spans=[(rows - SPAN - 1, SPAN)] * count,
        thinking=[[i % 3 == 0 for i in range(rows)]] * count,
    )


def peak_mib(run: Callable[[], object]) -> float:
    """How much more than before this process held, at most, while `run` ran."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed counts as free

    def field(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = field("VmRSS")
    kept = run()
    peak = field("VmHWM")
    del kept
    return (peak - before) / 1024


def interleaved_ms(works: dict[str, Callable[[], object]], rounds: int, slowest: float) -> dict[str, float]:
    """Median of each, in turns; what takes longer than `slowest` seconds is run once."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(1 + rounds):
        for name, run in works.items():
            if times[name] and times[name][0] > slowest:
                continue
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: round(1e3 * statistics.median(took[1:] or took), 1) for name, took in times.items()}


def without_native(run: Callable[[], object]) -> Callable[[], object]:
    modules = (backend, divergence_module, divergence_torch)

    def plain() -> object:
        kept = backend.native_applies
        for module in modules:
            module.native_applies = lambda *_: False
        try:
            return run()
        finally:
            for module in modules:
                module.native_applies = kept

    return plain


def cpu_works(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    ragged = make_batch()
    packed = ragged.num_rows + ragged.num_sequences
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(packed, D, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) * 0.05).to(dtype).requires_grad_()
    targets = torch.randint(V, (packed,), generator=generator)
    rows, row_targets = hidden.detach()[ragged.rows], targets[ragged.rows]
    leaf = rows.clone().requires_grad_()
    alpha = torch.full((ragged.num_sequences,), 1 / RATIONALES)

    def compact() -> object:
        loss = compatibility_loss(hidden, weight, targets, ragged, rule=CompatibilityRule(consensus=0)).loss
        return torch.autograd.grad(loss, (hidden, weight))

    def eager() -> object:
        return torch.autograd.grad(F.cross_entropy(leaf @ weight.t(), row_targets), (leaf, weight))

    def products() -> object:
        with torch.no_grad():
            z = rows @ weight.t()
            return z @ weight, z.t() @ rows

    def divergence() -> object:
        value = answer_divergence(hidden, weight, ragged, alpha).sum()
        return torch.autograd.grad(value, (hidden, weight))

    works = {"compact": compact, "compact in plain torch": without_native(compact), "divergence": divergence}
    works["divergence in plain torch"] = without_native(divergence)
    return {"eager": eager, "products": products} | works


def cpu(rounds: int, dtypes: list[torch.dtype], slowest: float) -> list[dict[str, Any]]:
    found = []
    for dtype in dtypes:
        works = cpu_works(dtype)
        returned = (V * D + QUESTIONS * RATIONALES * (ROWS + 1) * D) * dtype.itemsize / 2**20
        times = interleaved_ms(works, rounds, slowest)
        for name, run in works.items():
            record = {"device": "cpu", "dtype": str(dtype)[6:], "work": name, "threads": torch.get_num_threads()}
            record |= {"ms": times[name], "beyond_gradients_mib": round(peak_mib(run) - returned, 1)}
            found.append(record)
            print(json.dumps(record), flush=True)
        named = {record["work"]: record for record in found if record["dtype"] == str(dtype)[6:]}
        ours, plain = named["compact"], named["eager"]
        most_eager, most_products = CPU_TARGETS[dtype]
        for what, share, most in (
            ("of eager's time", ours["ms"] / plain["ms"], most_eager),
            ("of the products' time", ours["ms"] / named["products"]["ms"], most_products),
            ("of eager's memory", ours["beyond_gradients_mib"] / plain["beyond_gradients_mib"], MEMORY_TARGET),
        ):
            print(f"{dtype}: {share:.2f} {what} (target {most:.2f}, {'met' if share <= most else 'missed'})")
    return found


def cuda_works() -> dict[str, Callable[[], object]]:
    """The rule and the consensus of 64 questions × 4 rationales × 512 tokens, 14 heads of 64 in bfloat16."""
    questions, rationales, rows = 64, 4, 512
    count = questions * rationales
    ragged = Ragged.build(
        sequence_lengths=[1 + rows] * count,
        prompt_lengths=[1] * count,
        rationales_per_question=[rationales] * questions,
        body_lengths=[rows - 1] * count,
        thinking=[[i % 3 == 0 for i in range(rows)]] * count,
    ).to("cuda")
    _ = ragged.sizes  # made once a batch, on the host
    generator = torch.Generator(device="cuda").manual_seed(0)
    statistics_ = [-torch.rand(ragged.num_rows, generator=generator, device="cuda") for _ in range(4)]
    tokens = TokenStatistics(*statistics_)
    targets = torch.zeros(ragged.num_rows, dtype=torch.int64, device="cuda")
    query, key = torch.randn(2, count, 14, 64, generator=generator, device="cuda").bfloat16()
    weighting = Weighting(
        CompatibilityRule(), None, torch.rand(count, device="cuda"), None, AdaptabilityOptions(), "kl", 0.0, "mean",
        None, None, -100,
    ).with_normalizers(*torch.full((2, 1), 1 / questions, device="cuda").unbind())  # fmt: skip
    out = Decision.empty(ragged)

    def rule(launch: Callable[..., None]) -> Callable[[], object]:
        arguments = (0, questions, ragged, tokens.logprob, tokens.evidence, targets)
        return lambda: launch(*arguments, **weighting.for_one_launch, out=out)

    works: dict[str, Callable[[], object]] = {
        "rule eager": lambda: plain_decide(tokens, targets, ragged, weighting),
        "consensus eager": lambda: reference.question_consensus(query, key, ragged),
    }
    if not native.cuda_trouble(0):
        works["rule cuda"] = rule(native_cuda.decide)
        works["consensus cuda"] = lambda: native_cuda.in_degree(query, key, ragged)
    if TRITON_FOUND:
        from compact_kernels import consensus, rule_triton

        works["rule triton"] = rule(rule_triton.decide)
        works["consensus triton"] = lambda: consensus.in_degree(query, key, ragged)
    for how in ("eager", "cuda", "triton"):
        if f"rule {how}" in works:
            one, other = works[f"rule {how}"], works[f"consensus {how}"]
            works[f"both {how}"] = lambda one=one, other=other: (one(), other())  # type: ignore[misc]
    return dict(sorted(works.items(), key=lambda work: "eager" in work[0]))  # what may spoil a capture comes last


def replay_us(run: Callable[[], object], calls: int = 20, rounds: int = 30) -> float | None:
    """Device time of a call, `calls` of them in one CUDA graph; None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    return round(statistics.median(times), 2)


def ungraphed_us(run: Callable[[], object], calls: int = 100, rounds: int = 7) -> tuple[float, float]:
    """Wall time of a call, and the host's share of it, in a row of them."""
    whole, host = [], []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            run()
        launched = time.perf_counter()
        torch.cuda.synchronize()
        host.append(1e6 * (launched - began) / calls)
        whole.append(1e6 * (time.perf_counter() - began) / calls)
    return round(statistics.median(whole), 1), round(statistics.median(host), 1)


def cuda() -> list[dict[str, Any]]:
    found = []
    for name, run in cuda_works().items():
        for _ in range(3):
            run()
        whole, host = ungraphed_us(run)
        device = torch.cuda.get_device_name()
        record = {"device": device, "work": name, "replay_us": replay_us(run), "call_us": whole, "host_us": host}
        found.append(record)
        print(json.dumps(record), flush=True)
    named = {record["work"]: record for record in found}
    for how in ("cuda", "triton"):
        if f"both {how}" in named:
            ours, eager = named[f"both {how}"], named["both eager"]
            print(f"both {how}: {ours['replay_us']} us of device time under replay (target 25)")
            print(f"both {how}: {eager['call_us'] / ours['call_us']:.1f} times faster than eager torch (target 15)")
    return found


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.native", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--slowest", type=float, default=20.0, help="seconds: what takes longer is run once")
    parser.add_argument("--out", type=Path, help="a JSON file")
    asked = parser.parse_args()
    found = (
        cuda()
        if torch.cuda.is_available()
        else cpu(asked.rounds, [getattr(torch, name) for name in asked.dtypes], asked.slowest)
    )
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
