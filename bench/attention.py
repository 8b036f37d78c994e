"""Packed attention, path by path, checked and timed: `python -m bench.attention`.

Forward and backward of one causal attention layer over a packed batch. Errors are against float64 on every sequence
alone; a path passes where none of its errors is more than twice that of bfloat16 scaled-dot-product attention (SDPA)
on every sequence alone. Records join those of `python -m bench` in the same file and on the same page.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench import page, records
from bench.shapes import ATTENTION, device
from bench.timing import Runner, attempt, free_memory, one_line, peak_bytes, synchronize, time_rounds
from compact.attention import compact_varlen

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (T, H, d), (T, H_kv, d), (T, H_kv, d) -> (T, H, d)
RULE = 2.0  # times the error of SDPA alone
NAMES = ("output", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """One layer's shape and the lengths of the packed sequences."""

    heads: int
    key_value_heads: int
    d: int
    batch: str
    lengths: tuple[int, ...]

    @property
    def label(self) -> str:
        return f"{self.heads}x{self.d}/{self.key_value_heads} {self.batch}"

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def flop(self) -> int:
        """Two products forward and five backward, of the pairs that causality leaves."""
        pairs = sum(length * (length + 1) // 2 for length in self.lengths)
        return 7 * 2 * pairs * self.heads * self.d

    def bytes_moved(self, size: int) -> int:
        """Each tensor once: q, k, v, o forward; q, k, v, o, do, dq, dk, dv backward."""
        return self.tokens * self.d * size * (6 * self.heads + 6 * self.key_value_heads)


def ragged_lengths(count: int, total: int) -> tuple[int, ...]:
    """`count` lengths that sum to `total`, from a few tokens to several times the mean."""
    cuts = sorted(random.Random(0).sample(range(1, total), count - 1))
    return tuple(b - a for a, b in itertools.pairwise([0, *cuts, total]))


def cases(tiny: bool) -> list[Case]:
    """At full size the layers of Qwen2.5 0.5B and 1.5B."""
    if tiny:
        layers, batches = [(4, 2, 16)], {"3x32": (32,) * 3, "ragged": ragged_lengths(5, 96)}
    else:
        layers = [(14, 2, 64), (12, 2, 128)]
        batches = {"32x256": (256,) * 32, "8x2048": (2048,) * 8, "ragged": ragged_lengths(32, 8192)}
    return [Case(*layer, batch, lengths) for layer in layers for batch, lengths in batches.items()]


@dataclass
class Problem:
    """A case's tensors on the device, laid out as a model's projections leave them."""

    case: Case
    inputs: tuple[Tensor, Tensor, Tensor]  # (T, H, d), (T, H_kv, d) twice; require gradients
    direction: Tensor  # (T, H, d): the gradient of the output
    offsets: Tensor  # (S+1,) int32

    @classmethod
    def make(cls, case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
        generator = torch.Generator(device).manual_seed(0)

        def draw(heads: int) -> Tensor:
            return torch.randn(case.tokens, heads, case.d, generator=generator, device=device).to(dtype)

        inputs = tuple(draw(n).requires_grad_() for n in (case.heads, case.key_value_heads, case.key_value_heads))
        offsets = torch.tensor([0, *case.lengths], device=device).cumsum(0).int()
        return cls(case, cast(Any, inputs), draw(case.heads), offsets)

    @property
    def longest(self) -> int:
        return max(self.case.lengths)

    def sequence_of_token(self) -> Tensor:
        """(T,) int64"""
        return torch.repeat_interleave(self.offsets.diff(), output_size=self.case.tokens).long()

    def truth(self) -> list[Tensor]:
        """Output and gradients (:data:`NAMES`) in float64."""
        inputs = [tensor.detach().double().requires_grad_() for tensor in self.inputs]
        output = separate(self)(*inputs)
        return [output.detach(), *torch.autograd.grad(output, inputs, self.direction.double())]


class Layer(nn.Module):
    """What transformers' attention functions ask of their module."""

    is_causal = True

    def __init__(self, case: Case):
        super().__init__()
        self.num_key_value_groups = case.heads // case.key_value_heads


def heads_first(tensor: Tensor) -> Tensor:
    """(T, H, d) -> (1, H, T, d), a view."""
    return tensor.unsqueeze(0).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------ paths


def separate(problem: Problem) -> Attend:
    """SDPA on every sequence alone: the definition, and the error that is to be met."""
    lengths = problem.case.lengths

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(*(heads_first(tensor).split(lengths, dim=2) for tensor in (query, key, value)))
        outputs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in parts]
        return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)

    return run


def padded(problem: Problem) -> Attend:
    """SDPA on a batch padded to its longest sequence, padding and its removal included."""
    count, longest = len(problem.case.lengths), problem.longest
    equal = problem.case.tokens == count * longest
    sequence = problem.sequence_of_token()
    position = torch.arange(problem.case.tokens, device=sequence.device) - problem.offsets[sequence]
    where = sequence * longest + position

    def pad(tensor: Tensor) -> Tensor:
        if not equal:
            tensor = tensor.new_zeros(count * longest, *tensor.shape[1:]).index_copy(0, where, tensor)
        return tensor.unflatten(0, (count, longest)).transpose(1, 2)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = F.scaled_dot_product_attention(
            pad(query), pad(key), pad(value), is_causal=True, enable_gqa=True
        )  # (S, H, longest, d)
        output = output.transpose(1, 2).flatten(0, 1)
        return output if equal else output.index_select(0, where)

    return run


def masked(problem: Problem) -> Attend:
    """SDPA over the packed row with a mask of all tokens by all tokens, made beforehand."""
    sequence, layer = problem.sequence_of_token(), Layer(problem.case)
    mask = (sequence[:, None] == sequence).tril_()[None, None]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = heads_first(query), heads_first(key), heads_first(value)
        return sdpa_attention_forward(layer, *rows, mask)[0].squeeze(0)

    return run


def varlen(problem: Problem) -> Attend:
    """The package's own: torch's varlen kernel on a GPU, SDPA sequence by sequence on a CPU."""
    layer = Layer(problem.case)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = heads_first(query), heads_first(key), heads_first(value)
        offsets, longest = problem.offsets, problem.longest
        return compact_varlen(layer, *rows, None, cu_seq_lens_q=offsets, max_length_q=longest)[0].squeeze(0)

    return run


def flex(problem: Problem) -> Attend:
    """Flex attention as transformers compiles it; the block mask, which all layers share, is made beforehand."""
    _need_gpu()
    mask, layer = block_mask(problem)[0], Layer(problem.case)
    options = {"FORCE_USE_FLEX_ATTENTION": True}

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = heads_first(query), heads_first(key), heads_first(value)
        return flex_attention_forward(layer, *rows, mask, kernel_options=options)[0].squeeze(0)

    return run


_masks: dict[tuple[int, ...], tuple[Any, float]] = {}


def block_mask(problem: Problem) -> tuple[Any, float]:
    """Flex's mask of causality within sequences, which no head enters, and the ms that making it again takes."""
    from torch.nn.attention.flex_attention import create_block_mask

    if problem.case.lengths not in _masks:
        sequence, tokens = problem.sequence_of_token(), problem.case.tokens

        def within(b, h, q, k):
            return (sequence[q] == sequence[k]) & (q >= k)

        def make() -> Any:
            return create_block_mask(within, 1, None, tokens, tokens, device=str(sequence.device), _compile=True)

        runner = Runner("block mask", make)
        time_rounds([runner], 5, warmup=1, say=lambda line: None)
        if runner.error is not None:
            raise RuntimeError(f"block mask: {runner.error}")
        _masks[problem.case.lengths] = make(), runner.times_ms()["median_ms"]
    return _masks[problem.case.lengths]


FLASH = {  # name of the contender: the module that has flash_attn_varlen_func
    "flash_attn_2": "flash_attn",
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute",
}


def flash(name: str) -> Callable[[Problem], Attend]:
    """flash-attention's own function, of the version `name`."""

    def build(problem: Problem) -> Attend:
        function = importlib.import_module(FLASH[name]).flash_attn_varlen_func
        _need_gpu()
        ends: dict[str, Any] = {f"cu_seqlens_{side}": problem.offsets for side in "qk"}
        ends |= {f"max_seqlen_{side}": problem.longest for side in "qk"}

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            output = function(query, key, value, causal=True, **ends)
            return output[0] if isinstance(output, tuple) else output

        return run

    return build


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("needs a CUDA GPU")


def paths() -> dict[str, Callable[[Problem], Attend]]:
    """By name of the contender; of flash-attention the versions installed here, or version 4 with its error."""
    found = {name: flash(name) for name, module in FLASH.items() if _has_varlen(module)}
    return {
        "sdpa_separate": separate,
        "sdpa_padded": padded,
        "sdpa_masked": masked,
        "compact_varlen": varlen,
        "flex": flex,
        **(found or {"flash_attn_4": flash("flash_attn_4")}),
    }


def _has_varlen(module: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), "flash_attn_varlen_func")
    except Exception:  # not installed, or not for this torch
        return False


# ---------------------------------------------------------------------------------------------------------- figures


def relative_errors(found: list[Tensor], truth: list[Tensor]) -> dict[str, list[float]]:
    """Of output and gradients: [error's norm over the norm, largest error over the largest value]."""
    errors = {}
    for name, value, exact in zip(NAMES, found, truth, strict=True):
        if value.shape != exact.shape:
            raise RuntimeError(f"{name} is {tuple(value.shape)}, not {tuple(exact.shape)}")
        gap = value.double() - exact
        figures = (gap.norm() / exact.norm(), gap.abs().max() / exact.abs().max())
        errors[name] = [float(f"{figure.item():.4g}") for figure in figures]
    return errors


def measure(
    case: Case, dtype: torch.dtype, rounds: int, wanted: Callable[[str], bool], say: Callable[[str], None]
) -> list[records.Record]:
    """Records of one case, without what is the same in a whole run."""
    problem = Problem.make(case, dtype, device())
    truth = problem.truth()
    errors: dict[str, dict[str, list[float]]] = {}
    runners = []
    for name, build in paths().items():
        if not wanted(name):
            continue
        runner = Runner(name, lambda: None)
        runners.append(runner)
        attempt(runner, lambda runner=runner, build=build: _prepare(runner, build(problem), problem))  # type: ignore[misc]

        def check(runner: Runner = runner) -> None:
            errors[runner.name] = relative_errors(cast(Any, runner.run()), truth)

        attempt(runner, check)
    truth.clear()
    free_memory()
    product, copy = _bounds(dtype)
    everyone = [*runners, product, copy]
    time_rounds(everyone, rounds, say=say)
    alone = {runner.name: runner.times_ms()["median_ms"] for runner in everyone if runner.seconds}
    for runner in everyone:  # once more, with the launches queued before the device begins
        attempt(runner, lambda runner=runner: _queue(runner))  # type: ignore[misc]
    time_rounds(everyone, rounds, warmup=1, say=lambda line: None)
    rate = 2 * 8192**3 / statistics.median(product.seconds) if device().type == "cuda" else None  # flop a second
    floor = None
    if rate:
        moved = case.bytes_moved(problem.direction.element_size())
        bandwidth = 2 * _COPY_BYTES / statistics.median(copy.seconds)
        floor = round(1e3 * max(case.flop / rate, moved / bandwidth), 4)
    del product, copy, everyone
    free_memory()
    found = []
    for runner in runners:
        record: records.Record = {"work": ATTENTION, "head": case.label, "contender": runner.name}
        peak: dict[str, float | None] = {}
        attempt(runner, lambda runner=runner, peak=peak: peak.update(_peak(runner, problem)))  # type: ignore[misc]
        if runner.error is not None or not runner.seconds:
            found.append(record | {"error": runner.error or "no round was run"})
            continue
        seconds = statistics.median(runner.seconds)
        record |= runner.times_ms() | peak
        record |= {"dw_accum_mib": 0.0, "floor_ms": floor, "synchronized_ms": alone[runner.name]}
        record["tflops"] = round(case.flop / seconds / 1e12, 1)
        record["share_of_gemm"] = round(case.flop / seconds / rate, 4) if rate else None
        record["errors"] = errors[runner.name]
        if "sdpa_separate" in errors:
            record |= against(errors[runner.name], errors["sdpa_separate"])
        if runner.name == "flex":
            record["mask_ms"] = block_mask(problem)[1]
        found.append(record)
    return found


def against(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> dict[str, Any]:
    """The worst quotient of norms of error, that of largest errors, and whether the rule holds for both."""
    worst = [max(ours[name][at] / max(theirs[name][at], 1e-30) for name in NAMES) for at in (0, 1)]
    return {
        "error_ratio": round(worst[0], 3),
        "max_error_ratio": round(worst[1], 3),
        "exact": all(ratio <= RULE for ratio in worst),
    }


def _prepare(runner: Runner, path: Attend, problem: Problem) -> None:
    def run() -> list[Tensor]:
        output = path(*problem.inputs)
        return [output.detach(), *torch.autograd.grad(output, problem.inputs, problem.direction)]

    runner.run = run


def _queue(runner: Runner) -> None:
    """Have the device spin before each round for twice as long as the host takes to launch it."""
    if not torch.cuda.is_available():
        return
    synchronize()
    began = time.perf_counter()
    runner.run()
    seconds = time.perf_counter() - began
    synchronize()
    runner.spin = int(2 * seconds * 2e9)  # at 2 GHz


_COPY_BYTES = 1 << 30


def _bounds(dtype: torch.dtype) -> tuple[Runner, Runner]:
    """A large square matrix product, the rate that shares are of, and a copy; next to nothing on a CPU."""
    on_gpu = device().type == "cuda"
    a, b = (torch.randn((8192 if on_gpu else 8,) * 2, device=device(), dtype=dtype) for _ in range(2))
    source = torch.empty(_COPY_BYTES if on_gpu else 8, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return Runner("matrix product", lambda: a @ b), Runner("copy", lambda: target.copy_(source))


def _peak(runner: Runner, problem: Problem) -> dict[str, float | None]:
    peak = peak_bytes(runner)
    if peak is None:
        return {"peak_mib": None}
    returned = sum(tensor.numel() * tensor.element_size() for tensor in problem.inputs)
    return {"peak_mib": round(max(0, peak - returned) / 2**20, 1)}


def table(found: list[records.Record]) -> Iterator[str]:
    """For a terminal."""
    yield (
        f"{'layer and batch':20}{'path':22}{'ms':>8}{'p20':>8}{'p80':>8}{'synced':>8}{'peak MiB':>10}{'TFLOP/s':>9}"
        f"{'share':>7}  error ÷ SDPA alone (norm, largest)"
    )
    for record in found:
        where = f"{record['head']:20}{record['contender']:22}"
        if "error" in record:
            yield f"{where}{record['error']}"
            continue
        times = "".join(f"{record[name]:8.3f}" for name in ("median_ms", "p20_ms", "p80_ms", "synchronized_ms"))
        peak = "–" if record["peak_mib"] is None else f"{record['peak_mib']:.1f}"
        share = "–" if record["share_of_gemm"] is None else f"{record['share_of_gemm']:.2f}"
        ratios = ""
        if "exact" in record:
            ratios = f"{record['error_ratio']:.2f} {record['max_error_ratio']:.2f} "
            ratios += "ok" if record["exact"] else f"TOO LARGE {record['errors']}"
        mask = f"  block mask {record['mask_ms']:.2f} ms" if "mask_ms" in record else ""
        yield f"{where}{times}{peak:>10}{record['tflops']:9.1f}{share:>7}  {ratios}{mask}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m bench.attention", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=[], metavar="TEXT", help="those whose label has one of these")
    parser.add_argument("--contenders", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="contenders to leave out")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=records.RESULTS, metavar="FOLDER", help="records are added there")
    parser.add_argument("--commit", default=records.commit(), help="to record where this is not run in a checkout")
    asked = parser.parse_args(argv)
    began = time.monotonic()
    on_gpu = device().type == "cuda"
    common = {
        "device": records.device_name(),
        "versions": records.versions(),
        "commit": asked.commit,
        "run": datetime.datetime.now().isoformat(timespec="seconds"),
    }
    say(f"{common['device']}, {common['versions']}, commit {common['commit']}")
    path = asked.out / f"{records.file_stem()}.json"
    fresh: list[records.Record] = []

    def wanted(name: str) -> bool:
        return (not asked.contenders or name in asked.contenders) and name not in asked.without

    layer = None
    for case in cases(tiny=not on_gpu):
        if asked.cases and not any(text in case.label for text in asked.cases):
            continue
        say(f"[{time.monotonic() - began:5.1f} s] {case.label}, {case.tokens} tokens, {case.flop / 1e9:.1f} GFLOP")
        if layer != (layer := (case.heads, case.d)):
            torch._dynamo.reset()  # graphs of static shapes, not of shapes that two layers share
        try:
            found = measure(case, torch.bfloat16 if on_gpu else torch.float32, asked.rounds, wanted, say)
        except Exception as error:  # of the case, not of a path; the other cases are still worth having
            say(f"    {one_line(error)}")
            continue
        fresh += [{**record, **common} for record in found]
        records.save(records.merged(records.load(path), fresh), path)
        free_memory()
    page.write(records.load(path), path)
    for line in table(fresh):
        say(line)
    say(f"{time.monotonic() - began:.0f} s; {path} and {path.with_suffix('.md')}")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
