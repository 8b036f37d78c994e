"""What the tests of the fused head share: batches, what an op gives for them, and the rule that judges its error."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compact_kernels import Ragged, compatibility_loss, dispatch, linear_logprob, native_cuda
from compact_kernels.head.linear import LinearHead
from compact_kernels.native import LIBRARY, Library, cuda_trouble

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NEEDS_CUDA = pytest.mark.skipif(not CUDA, reason="needs a GPU")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRADIENTS = ("dhidden", "dweight", "dbias")

# (scored rows, rows of the answer) of every rationale of every question: two spans that align and one that does not;
# one rationale alone, with a single row and no answer; a pair.
LAYOUT = (((4, 2), (3, 2), (2, 1)), ((1, 0),), ((2, 1), (4, 1)))
LARGEST_QUESTION = 9
LONG = 23  # how much longer completions are on a GPU

# What is allowed beyond twice torch's own error, relative to the norm of the truth: the rounding of sums that run in
# another order, where torch's happens to be exact (a scalar's error may be 0 by luck). An order above 2^-24.
FLOOR = 4e-6 if CUDA else 1e-6  # a GPU's exponential errs by 2^-22, and the terms of a sum may cancel

# Where the truth is 0 (the entropy of a vocabulary of one) no share of it says anything: the rounding of a logit of 1.
ZERO_FLOOR = 1e-7


def divergence_floor(dtype: torch.dtype) -> float:
    """The same for D = Σ α_k α_j KL, a scalar: one α may be a hundredth of the other, and its rounding is relative to
    the larger one; bfloat16 reads it from probabilities that are stored in it (2^-9 each, many of them)."""
    return max(1e-5, torch.finfo(dtype).eps / 8)


@dataclass(frozen=True)
class Problem:
    """A batch and a head, on the device."""

    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (T,)
    ragged: Ragged
    consensus: Tensor  # (S,)
    bias: Tensor | None = None  # (V,)
    options: dict[str, Any] = field(default_factory=dict)  # logit_scale, softcap, temperature

    def to(self, dtype: torch.dtype) -> Problem:
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    @property
    def head(self) -> dict[str, Any]:
        return self.options if self.bias is None else self.options | {"bias": self.bias}


def make_ragged(layout: Any = LAYOUT, vocabulary: int = 100, scale: int = 1, seed: int = 0) -> Ragged:
    """The layout's questions with the answer in the middle of the completion; the gold answer of question q has
    1 + q mod 2 ids, and none where the first rationale has no answer rows. Completions are `scale` times as long."""
    rng = random.Random(seed)
    flat = [(rows * scale, span) for question in layout for rows, span in question]
    prompts = [rng.randint(1, 3) for _ in flat]
    starts = [(rows - span) // 2 for rows, span in flat]
    evidence: list[list[int]] = []
    for q, question in enumerate(layout):
        ids = [rng.randrange(vocabulary) for _ in range(1 + (q + 1) % 2 if question[0][1] else 0)]
        evidence += [ids] * len(question)
    return Ragged.build(
        sequence_lengths=[prompt + rows for prompt, (rows, _) in zip(prompts, flat)],
        prompt_lengths=prompts,
        rationales_per_question=[len(question) for question in layout],
        body_lengths=[rows - 1 for rows, _ in flat],
        evidence_ids=evidence,
        answer_spans=[(start, span) for start, (_, span) in zip(starts, flat)],
        thinking=[[rng.random() < 0.4 for _ in range(rows)] for rows, _ in flat],
    )


def make_problem(
    kind: str = "plain",
    vocabulary: int | None = None,
    width: int | None = None,
    *,
    layout: Any = None,
    seed: int = 0,
    ignored: float = 0.2,
) -> Problem:
    """A random float64 problem; kind: "plain", "bias", or "capped" (bias, scale, softcap and temperature).

    A fifth of the targets is ignored, one of them inside an answer. A GPU gets long rationales, many questions and a
    larger head unless they are given.
    """
    vocabulary = vocabulary or (5003 if CUDA else 100)
    width = width or (130 if CUDA else 17)
    if layout is None:
        layout = LAYOUT * 4 if CUDA else LAYOUT
    ragged = make_ragged(layout, vocabulary, LONG if CUDA else 1, seed)
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    total = int(ragged.cu_seqlens[-1])
    targets = torch.randint(vocabulary, (total,), generator=generator)
    drop = torch.rand(total, generator=generator) < ignored
    if ignored and ragged.span_rows.numel():
        drop[ragged.rows[ragged.span_rows[0]]] = True
    targets[drop] = -100
    options: dict[str, Any] = {}
    if kind == "capped":
        options = {"logit_scale": 0.8, "softcap": 4.0, "temperature": 1.3}
    problem = Problem(
        hidden=randn(total, width),
        weight=randn(vocabulary, width) * 2 / width**0.5,  # logits with a deviation of 2
        targets=targets,
        ragged=ragged,
        consensus=torch.rand(ragged.num_sequences, generator=generator),
        bias=None if kind == "plain" else randn(vocabulary),
        options=options,
    )
    return on_device(problem)


def identity_problem(logits: Tensor, targets: Tensor, layout: Any = None) -> Problem:
    """A head that is the identity: the given logits (n, V) of the scored rows are the hidden states, exact in any
    precision that holds them, and the gradient of the hidden states is that of the logits. Prompts have one token."""
    rows = logits.shape[0]
    ragged = Ragged.build(
        sequence_lengths=[1 + rows] if layout is None else [1 + count for count in layout],
        prompt_lengths=[1] if layout is None else [1 for _ in layout],
        rationales_per_question=[1] if layout is None else [len(layout)],
    )
    total = int(ragged.cu_seqlens[-1])
    hidden, ids = torch.zeros(total, logits.shape[1], dtype=torch.float64), torch.full((total,), -100)
    hidden[ragged.rows], ids[ragged.rows] = logits.double(), targets
    eye = torch.eye(logits.shape[1], dtype=torch.float64)
    return on_device(Problem(hidden, eye, ids, ragged, torch.zeros(ragged.num_sequences)))


def on_device(problem: Problem) -> Problem:
    moved = {
        name: getattr(problem, name).to(DEVICE) for name in ("hidden", "weight", "targets", "ragged", "consensus")
    }
    return replace(problem, bias=None if problem.bias is None else problem.bias.to(DEVICE), **moved)


def leaves(problem: Problem, wants: str) -> tuple[Problem, dict[str, Tensor]]:
    """The problem with fresh leaves, and those of them, by name, whose initial is in `wants` ("hwb")."""
    fresh = {
        name: tensor.detach().requires_grad_(name[0] in wants)
        for name in ("hidden", "weight", "bias")
        if (tensor := getattr(problem, name)) is not None
    }
    return replace(problem, **fresh), {name: leaf for name, leaf in fresh.items() if leaf.requires_grad}


def loss_of(problem: Problem, **options: Any) -> Any:
    options.setdefault("consensus", problem.consensus)
    hidden, weight, targets = problem.hidden, problem.weight, problem.targets
    return compatibility_loss(hidden, weight, targets, problem.ragged, **problem.head, **options)


def logprob_of(problem: Problem, **options: Any) -> tuple[Tensor, Tensor]:
    return linear_logprob(problem.hidden, problem.weight, problem.targets, **problem.head, **options)


def everything(problem: Problem, wants: str = "hwb", upstream: float = 1.0, **options: Any) -> dict[str, Tensor]:
    """Every output of compatibility_loss, and under "d…" the gradients of what `wants` names."""
    problem, wanted = leaves(problem, wants)
    output = loss_of(problem, **options)
    statistics = output.statistics
    result = {name: getattr(output, name).detach() for name in ("loss", "alpha", "sft", "divergence")}
    result |= statistics.tokens._asdict() | {n: getattr(statistics, n) for n in ("adaptability", "difficulty")}
    if wanted:
        (output.loss * upstream).backward()
    for name, leaf in wanted.items():
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype, name
        result["d" + name] = leaf.grad
    return result


def logprob_gradients(
    problem: Problem, wants: str = "hwb", which: str = "le", implementation: str = "auto"
) -> dict[str, Tensor]:
    """Both outputs of linear_logprob and the gradients under arbitrary upstream ones of log-prob and/or entropy."""
    problem, wanted = leaves(problem, wants)
    logprob, entropy = logprob_of(problem, implementation=implementation)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(2, *logprob.shape, generator=generator, dtype=torch.float64).to(logprob)
    outputs = [tensor for tensor, letter in ((logprob, "l"), (entropy, "e")) if letter in which]
    seeds = [seed for seed, letter in zip(upstream, "le") if letter in which]
    gradients = torch.autograd.grad(outputs, list(wanted.values()), seeds)
    result = {"logprob": logprob.detach(), "entropy": entropy.detach()}
    return result | {"d" + name: gradient for name, gradient in zip(wanted, gradients)}


def errors(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference, in float64; NaN where either has one."""
    assert actual.keys() == truth.keys()
    return {name: float((actual[name].double() - truth[name].double()).norm()) for name in truth}


def errors_of_torch(
    function: Callable[..., dict[str, Tensor]], problem: Problem, truth: dict[str, Tensor], **options: Any
) -> dict[str, float]:
    """Those of the reference in the problem's dtype; with a bias, the larger ones of two ways to add it.

    F.linear rounds h Wᵀ + b to the dtype; a row pass reads h Wᵀ, rounded, and adds b in float32. These are two draws
    of one error, and in a sum of them, as the loss is, either may cancel: of two such numbers, one exceeds twice the
    other in 3 of 10 batches.
    """

    def bias_after_the_product(head: LinearHead, hidden: Tensor) -> Tensor:
        return head.of_raw(F.linear(hidden, head.weight).float() + head.bias)

    result = errors(function(problem, implementation="reference", **options), truth)
    if problem.bias is not None:
        with patch.object(LinearHead, "__call__", bias_after_the_product):
            other = errors(function(problem, implementation="reference", **options), truth)
        result = {name: max(error, other[name]) for name, error in result.items()}
    return result


def assert_as_good_as_torch(
    function: Callable[..., dict[str, Tensor]],
    problem: Problem,
    dtype: torch.dtype,
    floor: float = FLOOR,
    **options: Any,
) -> dict[str, Tensor]:
    """The rule: in every output at most twice the error of the reference in the same dtype, by float64's measure."""
    problem = problem.to(dtype)
    truth = function(problem.to(torch.float64), implementation="reference", **options)
    plain = errors_of_torch(function, problem, truth, **options)
    result = function(problem, **options)
    ours = errors(result, truth)
    for name, exact in truth.items():
        least, size = divergence_floor(dtype) if name == "divergence" else floor, float(exact.double().norm())
        allowed = 2 * plain[name] + (least * size if size else ZERO_FLOOR)
        assert ours[name] <= allowed, f"{name}: error {ours[name]:.3g}, torch's {plain[name]:.3g}, norm {size:.3g}"
    return result


def limit_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """As if the workspace held so many rows of logits."""
    from compact_kernels.head import planner, tokens

    for module in (planner, tokens):
        monkeypatch.setattr(module, "rows_that_fit", lambda *_: rows)


def choose_backend(request: pytest.FixtureRequest) -> str:
    """The body of a fixture with params among "triton", "native" and "torch": who does the row passes and the
    divergence."""
    if request.param == "triton":
        request.getfixturevalue("triton_kernels")
        if not CUDA:
            round_bfloat16(request.getfixturevalue("monkeypatch"))
        return "triton"
    monkeypatch = request.getfixturevalue("monkeypatch")
    monkeypatch.setattr(dispatch, "TRITON_FOUND", False)
    if request.param == "native":
        if CUDA or not LIBRARY.loaded:
            pytest.skip("needs CPU tensors" if CUDA else f"needs the native library: {LIBRARY.reason}")
        return "native"
    without_library(monkeypatch)
    return "torch"


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the native library were not there."""
    monkeypatch.setattr(dispatch, "LIBRARY", Library(False, "a test goes without it"))


def use_native_cuda(monkeypatch: pytest.MonkeyPatch, module: str, function: str) -> None:
    """The native library's function in place of a Triton module's; skips where it cannot run."""
    if not CUDA or cuda_trouble(0):
        pytest.skip(f"needs the native library on a GPU: {cuda_trouble(0) if CUDA else 'there is none'}")
    triton_module = importlib.import_module(f"compact_kernels.{module}")
    monkeypatch.setattr(triton_module, function, getattr(native_cuda, function))


def round_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts float32 off where GPUs round it to bfloat16: here it rounds too."""
    from triton import language as tl
    from triton.runtime import interpreter

    cut_off = interpreter._convert_float

    def convert(value: np.ndarray, given: Any, wanted: Any, mode: Any) -> np.ndarray:
        if given != tl.float32 or wanted != tl.bfloat16:
            return cut_off(value, given, wanted, mode)
        rounded = torch.from_numpy(np.array(value, dtype=np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN (or the largest integer): an element that nobody writes shows in the result."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def fresh(*arguments: Any, **options: Any) -> Tensor:
            tensor = make(*arguments, **options)
            if tensor.dtype != torch.bool:
                floats = tensor.is_floating_point()
                tensor.detach().fill_(float("nan") if floats else torch.iinfo(tensor.dtype).max)
            return tensor

        return fresh

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
