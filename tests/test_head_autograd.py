"""The fused head as a citizen of autograd, CUDA graphs and large sizes; what it refuses, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compact_kernels import CompatibilityRule, Ragged, compatibility_loss, linear_logprob, linear_token_stats
from tests.head_cases import (
    DEVICE,
    FLOOR,
    LAYOUT,
    NEEDS_CUDA,
    Problem,
    choose_backend,
    errors,
    everything,
    leaves,
    logprob_of,
    loss_of,
    make_problem,
    poison_fresh_memory,
)


@pytest.fixture(params=["triton", "native", "torch"])
def backend(request) -> str:
    return choose_backend(request)


@pytest.fixture(autouse=True)
def poison(monkeypatch) -> None:
    poison_fresh_memory(monkeypatch)


def whole_batch(statistics: Any) -> Tensor:
    return torch.softmax(-statistics.difficulty / 10, 0)


def by_question(problem: Problem) -> Tensor:
    return loss_of(problem, divergence_weight=0.3).loss


def two_passes(problem: Problem) -> Tensor:
    return loss_of(problem, rule=whole_batch).loss


def logprobs(problem: Problem) -> Tensor:
    logprob, entropy = logprob_of(problem)
    return (logprob * torch.linspace(-1, 2, len(logprob), device=DEVICE)).sum() + 0.1 * entropy.square().sum()


OPS = pytest.mark.parametrize("op", [by_question, two_passes, logprobs])
WANTS = pytest.mark.parametrize("wants", ["hwb", "h"], ids=["trained", "frozen"])


def small(seed: int = 0, dtype: torch.dtype = torch.float32) -> Problem:
    return make_problem("bias", seed=seed, layout=LAYOUT[1:]).to(dtype)


def same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- autograd ---------------------------------------------------------------------------------------------------


@OPS
@WANTS
def test_a_kept_graph_gives_the_same_gradients_twice(op, wants, backend):
    problem, wanted = leaves(small(), wants)
    value, inputs = op(problem), list(wanted.values())
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    kept = tuple(gradient.clone() for gradient in first)
    second = torch.autograd.grad(value, inputs, 2 * torch.ones_like(value))  # not into the memory of the first
    assert same(first, kept) and any(gradient.any() for gradient in first)
    for one, two in zip(first, second):
        torch.testing.assert_close(2 * one, two, rtol=1e-5, atol=1e-7)


@OPS
@WANTS
def test_a_second_derivative_is_refused(op, wants, backend):
    problem, wanted = leaves(small(), wants)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(op(problem), list(wanted.values()), create_graph=True)


@OPS
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_around_the_op_changes_nothing(use_reentrant, op, backend):
    problem, wanted = leaves(small(), "hwb")

    def part(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return op(replace(problem, hidden=hidden * 1, weight=weight, bias=bias))

    plain = torch.autograd.grad(part(*wanted.values()), list(wanted.values()))
    checkpoint(part, *wanted.values(), use_reentrant=use_reentrant).backward()
    assert same(plain, [leaf.grad for leaf in wanted.values() if leaf.grad is not None])


@OPS
@pytest.mark.parametrize("wants", ["h", "w", "wb"])
def test_what_requires_no_gradient_gets_none_and_the_others_are_the_same(wants, op, backend):
    whole, everyone = leaves(small(), "hwb")
    op(whole).backward()
    part, wanted = leaves(small(), wants)
    op(part).backward()
    for name in ("hidden", "weight", "bias"):
        gradient = getattr(part, name).grad
        assert (gradient is not None) == (name in wanted)
        if gradient is not None:
            torch.testing.assert_close(gradient, everyone[name].grad, rtol=1e-5, atol=1e-6)


@OPS
def test_without_gradients_the_value_is_the_same_and_nothing_is_recorded(op, backend):
    problem, _ = leaves(small(), "hwb")
    value = op(problem)
    with torch.no_grad():
        bare = op(problem)
    assert value.requires_grad and not bare.requires_grad
    torch.testing.assert_close(bare, value.detach(), rtol=1e-6, atol=0)
    assert not op(small()).requires_grad


@pytest.mark.parametrize("op", [by_question, two_passes])
@WANTS
def test_an_upstream_tensor_scales_the_gradients_and_has_its_own(op, wants, backend):
    problem, wanted = leaves(small(), wants)
    scale = torch.tensor(-1.75, device=DEVICE, requires_grad=True)
    loss = op(problem)
    plain = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True)
    *scaled, own = torch.autograd.grad(loss * scale, [*wanted.values(), scale])
    assert torch.equal(own, loss.detach())
    for one, other in zip(plain, scaled):
        torch.testing.assert_close(-1.75 * one, other, rtol=1e-5, atol=1e-7)


@WANTS
def test_gradients_accumulate_over_calls(wants, backend):
    problem, wanted = leaves(small(), wants)
    by_question(problem).backward()
    once = [leaf.grad.clone() for leaf in wanted.values() if leaf.grad is not None]
    by_question(problem).backward()
    for before, leaf in zip(once, wanted.values(), strict=True):
        torch.testing.assert_close(leaf.grad, 2 * before)


def test_statistics_and_weights_are_detached_and_the_loss_alone_is_not(backend):
    problem, _ = leaves(small(), "hwb")
    output = loss_of(problem, divergence_weight=0.3)
    statistics = output.statistics
    others = [output.alpha, output.sft, output.divergence, *statistics.tokens]
    others += [statistics.adaptability, statistics.difficulty, statistics.consensus, statistics.targets_per_rationale]
    assert output.loss.requires_grad and not any(tensor.requires_grad for tensor in others)


@WANTS
def test_targets_that_were_changed_since_are_an_error_and_no_other_gradient(wants, backend):
    problem, _ = leaves(small(), wants)
    loss = logprobs(problem)
    problem.targets.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@WANTS
def test_what_comes_to_an_ignored_row_counts_for_nothing_even_if_it_is_no_number(wants, backend):
    problem, wanted = leaves(small(), wants)
    logprob, _ = logprob_of(problem)
    counted = problem.targets != -100
    assert not counted.all()
    logprob.backward(torch.where(counted, 1.0, float("nan")).to(logprob))
    assert all(leaf.grad.isfinite().all() for leaf in wanted.values())


# ---- what is refused --------------------------------------------------------------------------------------------


def refused(match: str, **changes: Any) -> None:
    """The loss with these arguments changed is a ValueError that says so."""
    problem = small()
    arguments: dict[str, Any] = {
        "hidden": problem.hidden,
        "head_weight": problem.weight,
        "targets": problem.targets,
        "ragged": problem.ragged,
        "consensus": problem.consensus,
        "bias": problem.bias,
    }
    with pytest.raises(ValueError, match=match):
        compatibility_loss(**(arguments | changes))


BAD: dict[str, tuple[str, Callable[[Problem], dict[str, Any]]]] = {
    "dtypes_differ": ("hidden is torch.bfloat16, head_weight", lambda p: {"hidden": p.hidden.bfloat16()}),
    "hidden_of_integers": ("hidden has dtype torch.int64", lambda p: {"hidden": p.hidden.long()}),
    "weight_of_integers": ("head_weight has dtype torch.int64", lambda p: {"head_weight": p.weight.long()}),
    "bias_of_integers": ("bias has dtype torch.int64", lambda p: {"bias": p.weight[:, 0].long()}),
    "targets_int32": ("targets has dtype torch.int32", lambda p: {"targets": p.targets.int()}),
    "targets_short": ("targets has .* entries", lambda p: {"targets": p.targets[1:]}),
    "hidden_short": ("hidden has shape", lambda p: {"hidden": p.hidden[1:]}),
    "hidden_batched": ("hidden has shape", lambda p: {"hidden": p.hidden[None]}),
    "weight_transposed": ("head_weight has shape", lambda p: {"head_weight": p.weight.t()}),
    "bias_of_another_dtype": ("bias is torch.float16, head_weight", lambda p: {"bias": p.weight[:, 0].half()}),
    "temperature_that_learns": (
        "temperature requires a gradient and would get none: multiply `hidden`",
        lambda p: {"temperature": torch.tensor(0.7, requires_grad=True)},
    ),
    "ignored_by_a_fraction": ("ignore_index is -100.0", lambda p: {"ignore_index": -100.0}),
    "bias_short": ("bias has shape", lambda p: {"bias": p.weight[1:, 0]}),
    "weights_short": ("weights has shape", lambda p: {"weights": p.consensus[1:]}),
    "consensus_short": ("consensus has shape", lambda p: {"consensus": p.consensus[1:]}),
    "reference_short": ("difficulty_reference has shape", lambda p: {"difficulty_reference": p.consensus[1:]}),
    "rule_and_weights": ("either `rule` or `weights`", lambda p: {"rule": whole_batch, "weights": p.consensus}),
    "no_consensus": ("`consensus` was not given", lambda p: {"consensus": None}),
    "no_such_reduction": ("sft_reduction is 'max'", lambda p: {"sft_reduction": "max"}),
    "no_such_divergence": ("divergence is 'tv'", lambda p: {"divergence": "tv"}),
    "one_normalizer": (
        "divergence_normalizer",
        lambda p: {"sft_reduction": "token", "normalizer": 0.1, "divergence_weight": 0.1},
    ),
    "rule_of_another_shape": ("the rule gave α of shape", lambda p: {"rule": lambda s: s.difficulty[1:]}),
    "elsewhere": ("is on meta", lambda p: {"head_weight": p.weight.to("meta")}),
}


@pytest.mark.parametrize("name", BAD)
def test_an_argument_that_does_not_fit_is_named(name, backend):
    match, change = BAD[name]
    refused(match, **change(small()))


def test_statistics_and_logprobs_check_their_arguments_too(backend):
    problem = small()
    tensors = (problem.hidden, problem.weight, problem.targets)
    with pytest.raises(ValueError, match="targets has dtype torch.int32"):
        linear_token_stats(problem.hidden, problem.weight, problem.targets.int(), problem.ragged)
    with pytest.raises(ValueError, match="head_weight has shape"):
        linear_logprob(problem.hidden[:, 1:], *tensors[1:])
    with pytest.raises(ValueError, match="targets has shape"):
        linear_logprob(problem.hidden, problem.weight, problem.targets[1:])
    with pytest.raises(ValueError, match="targets has dtype torch.int32"):
        linear_logprob(problem.hidden, problem.weight, problem.targets.int())


def test_a_rule_without_consensus_needs_none(backend):
    assert loss_of(small(), consensus=None, rule=CompatibilityRule(consensus=0)).loss.isfinite()


def test_a_distributed_head_is_refused_by_name(tmp_path):
    from torch.distributed import device_mesh, tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = device_mesh.init_device_mesh(DEVICE, (1,))
        problem = small()
        tensors = (problem.hidden, problem.weight, problem.weight[:, 0])
        for name, whole in zip(("hidden", "head_weight", "bias"), tensors):
            part = tensor.DTensor.from_local(whole, mesh, [tensor.Shard(0)], run_check=False)
            refused(f"{name} is a DTensor", **{name: part})
    finally:
        torch.distributed.destroy_process_group()


# ---- on a GPU ---------------------------------------------------------------------------------------------------


def on_gpu(dtype: torch.dtype = torch.bfloat16) -> Problem:
    return make_problem("bias", seed=1).to(dtype)


@NEEDS_CUDA
@pytest.mark.parametrize("workspace_mib", [512, 4], ids=["whole", "in_chunks"])
@WANTS
def test_the_device_is_never_waited_for(wants, workspace_mib):
    problem, wanted = leaves(on_gpu(), wants)

    def step() -> None:
        loss_of(problem, workspace_mib=workspace_mib, divergence_weight=0.3).loss.backward()
        linear_token_stats(problem.hidden, problem.weight, problem.targets, problem.ragged, **problem.head)
        logprob_of(problem)[0].sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(leaf.grad is not None for leaf in wanted.values())


@NEEDS_CUDA
@pytest.mark.parametrize("workspace_mib", [512, 4], ids=["whole", "in_chunks"])
@WANTS
def test_a_replayed_graph_gives_what_eager_gives_for_new_inputs(wants, workspace_mib):
    problem, wanted = leaves(on_gpu(), wants)

    def step() -> tuple[Tensor, ...]:
        output = loss_of(problem, workspace_mib=workspace_mib, divergence_weight=0.3)
        return output.loss.detach(), output.alpha, *torch.autograd.grad(output.loss, list(wanted.values()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        problem.hidden.copy_(problem.hidden.flip(0))
        problem.targets.copy_(problem.targets.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    for replayed, eager in zip(captured, step()):
        torch.testing.assert_close(replayed, eager, rtol=2**-8, atol=1e-6)  # cuBLAS may choose another algorithm


@NEEDS_CUDA
@WANTS
def test_more_logits_than_an_int32_counts(wants):
    vocabulary, width, rows = 131072, 64, 20000  # 2.6e9 logits
    assert rows * vocabulary > 2**31
    host = Ragged.build(
        sequence_lengths=[rows // 4 + 1] * 4, prompt_lengths=[1] * 4, rationales_per_question=[2, 2],
        evidence_ids=[[vocabulary - 1, 5]] * 4,
    )  # fmt: skip
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(rows + 4, width, device=DEVICE, generator=generator).bfloat16()
    weight = (torch.randn(vocabulary, width, device=DEVICE, generator=generator) * 0.25).bfloat16()
    targets = torch.randint(vocabulary, (rows + 4,), device=DEVICE, generator=generator)
    problem = Problem(hidden, weight, targets, host.to(DEVICE), torch.zeros(4, device=DEVICE))
    ours = everything(problem, wants=wants, workspace_mib=6000)
    chosen = torch.tensor([0, 1, 16383, 16384, 16385, 19998, 19999], device=DEVICE)  # 2^31 / V = 16384
    packed = problem.ragged.rows[chosen]
    x, w = hidden[packed].double().requires_grad_(), weight.double()
    logp = (x @ w.T).log_softmax(-1)
    logprob = logp.gather(1, targets[packed, None]).squeeze(1)
    torch.testing.assert_close(ours["logprob"][chosen].double(), logprob.detach(), rtol=1e-5, atol=1e-5)
    evidence = logp[:, [vocabulary - 1, 5]].mean(1).detach()
    torch.testing.assert_close(ours["evidence"][chosen].double(), evidence, rtol=1e-5, atol=1e-5)
    owner = torch.bucketize(chosen, problem.ragged.cu_rows[1:].long(), right=True)
    share = ours["alpha"][owner].double() / (2 * (rows // 4))
    (gradient,) = torch.autograd.grad(-(share * logprob).sum(), x)
    assert float((ours["dhidden"][packed].double() - gradient).norm()) <= 2**-7 * float(gradient.norm())
    statistics = linear_token_stats(hidden, weight, targets, problem.ragged, workspace_mib=6000)
    assert errors({"l": statistics.logprob}, {"l": ours["logprob"]})["l"] <= FLOOR * float(ours["logprob"].norm())
    if "w" in wants:  # the last columns' gradient lies behind the 2^31st element of the chunk
        p = torch.stack([(hidden[problem.ragged.rows].double() @ w[v]) for v in (3, vocabulary - 1)], 1)
        total = torch.cat([(part.double() @ w.T).logsumexp(1) for part in hidden[problem.ragged.rows].split(1000)])
        g = (p - total[:, None]).exp() - torch.stack(
            [targets[problem.ragged.rows] == v for v in (3, vocabulary - 1)], 1
        ).double()
        every = torch.bucketize(torch.arange(rows, device=DEVICE), problem.ragged.cu_rows[1:].long(), right=True)
        share = ours["alpha"][every].double() / (2 * (rows // 4))
        exact = (g * share[:, None]).T @ hidden[problem.ragged.rows].double()
        assert float((ours["dweight"][[3, vocabulary - 1]].double() - exact).norm()) <= 2**-6 * float(exact.norm())


def test_float16_gradients_are_as_good_as_torchs_under_a_loss_scale():
    """What is 2⁻¹⁶ of a weight vanishes in float16 unless it is made of the scaled loss."""
    ragged = Ragged.build(sequence_lengths=[24] * 4, prompt_lengths=[4] * 4, rationales_per_question=[2, 2])
    generator, scale = torch.Generator().manual_seed(0), 65536.0
    hidden, weight = torch.randn(96, 32, generator=generator), torch.randn(4000, 32, generator=generator) * 0.02
    targets = torch.randint(4000, (96,), generator=generator)
    alpha = torch.tensor([0.3, 0.7, 0.5, 0.5])
    leaves = [tensor.half().to(DEVICE).requires_grad_() for tensor in (hidden, weight)]
    batch = (targets.to(DEVICE), ragged.to(DEVICE))

    def gradients(inputs: list[Tensor], **options: Any) -> list[Tensor]:
        loss = compatibility_loss(*inputs, *batch, weights=alpha.to(DEVICE), normalizer=1 / 64, **options).loss
        return [g.double() / scale for g in torch.autograd.grad(loss * scale, inputs)]

    exact = gradients([leaf.detach().double().requires_grad_() for leaf in leaves])
    rows = batch[1].rows
    logprob = (leaves[0][rows] @ leaves[1].t()).float().log_softmax(-1)
    chosen = logprob.gather(1, batch[0][rows][:, None])[:, 0]
    plain = -(alpha.to(DEVICE).repeat_interleave(20) / 64 / 20 * chosen).sum()
    torchs = [g.double() / scale for g in torch.autograd.grad(plain * scale, leaves)]
    for ours, eager, truth in zip(gradients(leaves), torchs, exact, strict=True):
        assert (ours - truth).norm() <= 2 * (eager - truth).norm() + 1e-6 * truth.norm()
