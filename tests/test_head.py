"""The fused head against the reference in float64: every mode, head and reduction, by Triton and by plain torch."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compact_kernels import (
    AdaptabilityOptions,
    CompatibilityRule,
    Statistics,
    linear_logprob,
    linear_token_stats,
)
from tests.head_cases import (
    CUDA,
    DEVICE,
    DTYPES,
    LARGEST_QUESTION,
    LAYOUT,
    LONG,
    assert_as_good_as_torch,
    choose_backend,
    errors,
    everything,
    leaves,
    limit_rows,
    logprob_gradients,
    loss_of,
    make_problem,
    poison_fresh_memory,
    round_bfloat16,
)
from tests.processes import environment


@pytest.fixture(params=["triton", "native", "torch"])
def backend(request) -> str:
    return choose_backend(request)


@pytest.fixture(autouse=True)
def poison(monkeypatch) -> None:
    poison_fresh_memory(monkeypatch)


def batch_rule(statistics: Statistics) -> Tensor:
    """A rule of one's own: α depends on every rationale of the batch."""
    return torch.softmax((statistics.adaptability - statistics.difficulty) / 10, 0)


def given(problem: Any) -> dict[str, Any]:
    count = problem.ragged.num_sequences
    return {"weights": torch.linspace(0.2, 1.7, count, device=DEVICE), "consensus": None}


# name: (options of the loss, what requires a gradient, rows that fit the workspace or None)
MODES: dict[str, tuple[Any, str, int | None]] = {
    "given": (given, "hwb", None),
    "given_by_fives": (given, "hwb", 5),
    "by_question": ({}, "hwb", None),
    "by_question_in_chunks": ({}, "hwb", LARGEST_QUESTION),
    "frozen_head": ({}, "h", None),
    "frozen_head_of_large_questions": ({}, "h", LARGEST_QUESTION - 1),
    "frozen_head_any_rule": ({"rule": batch_rule}, "h", 7),
    "two_passes_any_rule": ({"rule": batch_rule}, "hwb", None),
    "two_passes_of_large_questions": ({}, "hwb", LARGEST_QUESTION - 1),
    "statistics": ({}, "", 9),
}


def run_mode(monkeypatch: Any, mode: str, problem: Any) -> dict[str, Any]:
    """The options of the mode's call; limits the workspace as it asks."""
    options, wants, rows = MODES[mode]
    if rows is not None:
        limit_rows(monkeypatch, rows * LONG if CUDA else rows)
    return {"wants": wants} | (options(problem) if callable(options) else options)


def worth_it(mode: str, dtype: torch.dtype) -> bool:
    """float16 goes the way of two passes whatever the mode: once with a head that trains, once without."""
    return dtype != torch.float16 or mode in ("by_question", "frozen_head")


# ---- compatibility_loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "dtype"), [case for case in itertools.product(MODES, DTYPES) if worth_it(*case)])
def test_every_mode_errs_at_most_twice_as_much_as_torch(mode, dtype, backend, monkeypatch):
    problem = make_problem("bias")
    options = run_mode(monkeypatch, mode, problem)
    assert_as_good_as_torch(everything, problem, dtype, **options)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_exact_in_float64(mode, monkeypatch):
    problem = make_problem("capped")
    options = run_mode(monkeypatch, mode, problem)
    truth = everything(problem, implementation="reference", **options)
    for name, error in errors(everything(problem, **options), truth).items():
        assert error <= 1e-11 * float(truth[name].norm()), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["by_question", "frozen_head_any_rule", "two_passes_any_rule"])
def test_scale_softcap_and_temperature_go_through_every_pass(mode, dtype, backend, monkeypatch):
    layout = LAYOUT * 4 if dtype == torch.bfloat16 else None  # the rounding of few targets is luck
    problem = make_problem("capped", seed=1, layout=layout)
    options = run_mode(monkeypatch, mode, problem)
    assert_as_good_as_torch(everything, problem, dtype, **options)


@pytest.mark.parametrize(
    ("mode", "normalizer"), [("given_by_fives", None), ("given_by_fives", "tensor"), ("two_passes_any_rule", 0.3)]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "token"])
def test_a_row_weighs_what_the_reduction_and_the_normalizer_say(mode, reduction, normalizer, backend, monkeypatch):
    problem = make_problem(seed=2)
    options = run_mode(monkeypatch, mode, problem) | {"sft_reduction": reduction, "divergence_normalizer": 0.7}
    value = torch.tensor(0.3, device=DEVICE) if normalizer == "tensor" else normalizer
    assert_as_good_as_torch(everything, problem, torch.float32, normalizer=value, **options)


@pytest.mark.parametrize(
    ("mode", "divergence", "dtype"),
    [(mode, "kl", torch.float32) for mode in MODES if "large" not in mode and mode != "given"]
    + [(mode, "jsd", torch.float32) for mode in ("by_question", "two_passes_any_rule")]
    + [("by_question", divergence, torch.bfloat16) for divergence in ("kl", "jsd")]
    + [("by_question", "kl", torch.float16)],
)
def test_the_divergence_is_part_of_every_mode(mode, divergence, dtype, backend, monkeypatch):
    # An answer's row whose target is ignored has no part in L_SFT, but in the divergence.
    problem = make_problem("bias" if divergence == "kl" else "plain", seed=3)
    options = run_mode(monkeypatch, mode, problem) | {"divergence": divergence, "divergence_weight": 0.8}
    result = assert_as_good_as_torch(everything, problem, dtype, **options)
    assert float(result["divergence"]) > 0


@pytest.mark.parametrize(("kind", "reduction"), [("plain", "mean"), ("plain", "token"), ("capped", "sum")])
def test_the_divergence_keeps_its_own_normalizer(kind, reduction, backend, monkeypatch):
    problem = make_problem(kind, seed=4)
    options = run_mode(monkeypatch, "by_question_in_chunks", problem) | {"sft_reduction": reduction}
    options |= {"normalizer": 0.11, "divergence_normalizer": torch.tensor(0.43, device=DEVICE)}
    assert_as_good_as_torch(everything, problem, torch.float32, divergence_weight=1.5, **options)


def test_the_options_of_the_rule_reach_it(backend, monkeypatch):
    problem = make_problem(seed=5)
    options = {
        "rule": CompatibilityRule(adaptability=0.5, consensus=2.0, difficulty=0.3, temperature=0.7),
        "adaptability": AdaptabilityOptions(epsilon=0.4, span="all", length_norm="mean"),
        "difficulty_reference": torch.linspace(0.5, 2.0, problem.ragged.num_sequences, device=DEVICE),
    }
    assert_as_good_as_torch(everything, problem, torch.float32, **options)


@pytest.mark.parametrize("mode", ["by_question", "two_passes_any_rule"])
def test_chunks_change_nothing_but_rounding(mode, backend, monkeypatch):
    problem = make_problem("bias", seed=6).to(torch.float32)
    options = run_mode(monkeypatch, mode, problem) | {"divergence_weight": 0.6}
    most = problem.ragged.num_rows
    limit_rows(monkeypatch, most)
    whole = everything(problem, **options)
    for rows in (most // 2 + 2, most // 5):
        limit_rows(monkeypatch, rows)
        for name, error in errors(everything(problem, **options), whole).items():
            assert error <= 2e-6 * float(whole[name].norm()), (name, rows)


def test_two_passes_write_every_block_of_a_vocabulary_once(backend, monkeypatch):
    problem = make_problem("bias", vocabulary=600, width=9, seed=7)
    limit_rows(monkeypatch, 10)
    options = {"rule": batch_rule, "workspace_mib": 0}  # blocks of 256 columns
    assert_as_good_as_torch(everything, problem, torch.float32, **options)


@pytest.mark.parametrize("mode", ["by_question", "frozen_head_any_rule"])
def test_an_upstream_gradient_scales_the_gradients(mode, backend, monkeypatch):
    problem = make_problem("bias", seed=8)
    options = run_mode(monkeypatch, mode, problem) | {"divergence_weight": 0.3}
    assert_as_good_as_torch(everything, problem, torch.bfloat16, upstream=-2.7, **options)


def test_another_ignore_index_is_heeded(backend):
    problem = make_problem(seed=9).to(torch.float32)
    usual = everything(problem)
    problem.targets[problem.targets == -100] = -1
    for name, value in everything(problem, ignore_index=-1).items():
        assert torch.equal(value, usual[name]), name


@pytest.mark.parametrize("mode", ["by_question_in_chunks"])
def test_two_runs_agree_to_the_last_bit(mode, backend, monkeypatch):
    problem = make_problem("bias", seed=10).to(torch.bfloat16)
    options = run_mode(monkeypatch, mode, problem) | {"divergence_weight": 0.3}
    one, other = everything(problem, **options), everything(problem, **options)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("width", [24, 300])  # tiles can be stored to rows of 16 bytes' multiple, and not
@pytest.mark.parametrize("mode", ["by_question_in_chunks", "given_by_fives"])
def test_a_trained_head_gets_its_gradient_over_chunks_in_bfloat16(mode, width, backend, monkeypatch):
    problem = make_problem("plain", width=width, seed=15)
    options = run_mode(monkeypatch, mode, problem) | {"wants": "hw"}
    assert_as_good_as_torch(everything, problem, torch.bfloat16, **options)


@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(1, 7, 8), (33, 130, 40), (70, 301, 136), (64, 32, 64)])
def test_the_last_product_adds_and_rounds_once(rows, vocabulary, width, triton_kernels, monkeypatch):
    from compact_kernels.head.rows import row_buffer
    from compact_kernels.head.triton_rows import last_product

    if not CUDA:
        round_bfloat16(monkeypatch)
    scale = 8 if CUDA else 1
    rows, vocabulary, width = rows * scale, vocabulary * scale + 1, width * scale
    generator = torch.Generator().manual_seed(rows)
    e, x, sums = (torch.randn(*size, generator=generator) for size in ((rows, vocabulary), (rows, width), (1, 1)))
    e, x, sums = e.bfloat16().to(DEVICE), x.bfloat16().to(DEVICE), sums.to(DEVICE).repeat(vocabulary, width)
    stored = row_buffer(rows, vocabulary, e).copy_(e)
    truth = sums.double() + e.double().T @ x.double()
    bound = truth.abs() * 2**-8 + rows * 1e-5
    assert bool(((last_product(stored, x, sums, torch.bfloat16).double() - truth).abs() <= bound).all())


# ---- linear_token_stats and linear_logprob ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "capped"])
def test_statistics_alone_err_at_most_twice_as_much_as_torch(kind, dtype, backend, monkeypatch):
    limit_rows(monkeypatch, 10)

    def statistics(problem: Any, **options: Any) -> dict[str, Tensor]:
        hidden, weight = problem.hidden.requires_grad_(), problem.weight
        tokens = linear_token_stats(hidden, weight, problem.targets, problem.ragged, **problem.head, **options)
        assert not any(tensor.requires_grad for tensor in tokens)
        return tokens._asdict()

    assert_as_good_as_torch(statistics, make_problem(kind, seed=11), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "wants", "which"),
    [("plain", "h", "l"), ("plain", "hwb", "le"), ("capped", "h", "l"), ("capped", "h", "le"), ("capped", "hwb", "e")],
)
def test_logprob_takes_any_upstream_gradient(kind, wants, which, dtype, backend, monkeypatch):
    limit_rows(monkeypatch, 10)
    problem = make_problem(kind, seed=12, layout=LAYOUT[1:])
    assert_as_good_as_torch(logprob_gradients, problem, dtype, wants=wants, which=which)


def test_logprob_keeps_the_shape_of_a_batch(backend):
    problem = make_problem(seed=13, ignored=0.4).to(torch.float32)
    hidden, targets = problem.hidden[:24].view(3, 8, -1).requires_grad_(), problem.targets[:24].view(3, 8)
    logprob, entropy = linear_logprob(hidden, problem.weight, targets)
    flat = linear_logprob(problem.hidden[:24], problem.weight, problem.targets[:24])
    assert logprob.shape == entropy.shape == (3, 8)
    assert torch.equal(logprob.flatten(), flat[0]) and torch.equal(entropy.flatten(), flat[1])
    assert not logprob[targets == -100].any() and not entropy[targets == -100].any()
    (logprob.sum() + entropy.sum()).backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
    assert not hidden.grad[targets == -100].any() and hidden.grad[targets != -100].any(-1).all()


# ---- under autocast ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["by_question", "by_question_in_chunks", "two_passes_any_rule", "frozen_head"])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_tensors_own(mode, backend, monkeypatch):
    problem = make_problem("bias", seed=14).to(torch.bfloat16)  # converting changes nothing, for the truth neither
    options = run_mode(monkeypatch, mode, problem)

    def cast(problem: Any, implementation: str = "auto", **options: Any) -> dict[str, Tensor]:
        inside = problem.hidden.dtype != torch.float64
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=inside):
            return everything(problem, implementation=implementation, **options)

    assert_as_good_as_torch(cast, problem, torch.float32, **options)


def test_autocast_equals_a_conversion_by_hand(triton_kernels, monkeypatch):
    if not CUDA:
        round_bfloat16(monkeypatch)
    problem = make_problem("bias", seed=15).to(torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = everything(problem)
    by_hand = everything(problem.to(torch.bfloat16))
    for name, value in by_hand.items():
        if name in ("dhidden", "dweight", "dbias"):  # rounded by hand only
            assert cast[name].dtype == torch.float32
            assert float((value - cast[name]).norm()) <= 2**-8 * float(value.norm()), name
        else:
            assert torch.equal(value, cast[name]), name
    mixed, wanted = leaves(problem, "hw")
    mixed.hidden.data = mixed.hidden.data.bfloat16()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss_of(mixed).loss.backward()
    gradients = [leaf.grad for leaf in wanted.values()]
    assert [g.dtype for g in gradients if g is not None] == [torch.bfloat16, torch.float32]


def test_a_rule_of_ones_own_decides_without_autocast():
    problem, seen = make_problem("plain", seed=16).to(torch.float32), []

    def rule(statistics):
        seen.append((statistics.difficulty[None] @ statistics.difficulty[:, None]).dtype)
        return CompatibilityRule(consensus=0)(statistics)

    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss_of(problem, rule=rule)
    assert seen == [torch.float32]


# ---- compilation ------------------------------------------------------------------------------------------------


def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    pytest.importorskip("triton", reason="needs Triton")
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, str(script)],
        env=environment() | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = {"logits_kernel", "probe_kernel", "finish_kernel", "last_product_kernel", "target_kernel"}
    kernels |= {"scale_rows_kernel", "rescale_kernel", "value_kernel", "reduce_kernel", "gradient_kernel"}
    kernels |= {"gram_kernel", "product_kernel", "stored_kernel", "scale_kernel", "token_rows_kernel"}
    assert set(run.stdout.split()) == kernels | {"_decide_kernel", "_in_degree_kernel", "stored", "tf32x3"}
