"""Per-rationale gradient norms: one backward pass against a backward pass for every rationale, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from compact import compilation
from compact.attention import packed_rows
from compact_kernels import SampleGradNorms, sample_grad_norms
from compact_kernels.sample_norms import costs
from tests.norm_cases import LENGTHS, batch, fused, recorded, row_losses, student, truth, uniform
from tests.processes import two_ranks
from tests.student_cases import gradients


@pytest.mark.parametrize("products", ["gram", "own"])
@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("llama", False), ("llama", True), ("qwen2", False), ("qwen3", False), ("gemma2", False), ("gemma3", False),
        ("gpt2", False), ("gpt2", True), ("gpt_neox", False), ("phi3", False),
    ],
)  # fmt: skip
def test_every_architectures_norms_are_those_of_a_backward_pass_per_rationale(name, lora, products):
    model = student(name, lora)
    ids, targets, ragged = batch()
    expected = truth(model, ids, targets, ragged, uniform(ragged))
    fused(model, ids, targets, ragged).backward()
    ordinary = gradients(model)
    with sample_grad_norms(model, ragged, products=products) as norms:
        fused(model, ids, targets, ragged).backward()
    torch.testing.assert_close(norms.squared, expected, rtol=1e-7, atol=0)  # the models normalise in float32
    torch.testing.assert_close(gradients(model), ordinary, rtol=1e-9, atol=1e-12)
    assert not any("forward" in vars(m) and "_sample_norms" in vars(m) for m in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_norms_survive_both_gradient_checkpointings(lora, reentrant):
    model = student("qwen2", lora)
    ids, targets, ragged = batch()
    expected = truth(model, ids, targets, ragged, uniform(ragged))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = recorded(model, lambda: fused(model, ids, targets, ragged), ragged)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("name", "lora", "products", "stored"),
    [("qwen2", False, "gram", False), ("llama", True, "own", False), ("qwen2", False, "own", True)],
)
def test_compiled_layers_give_the_same_norms(monkeypatch, name, lora, products, stored):
    monkeypatch.setattr(costs, "stored", lambda *shape: stored)
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    model = student(name, lora)
    plain = copy.deepcopy(model)
    compilation.compile_layers(model)
    recorder = SampleGradNorms(model, products=products)
    for lengths in (LENGTHS, (3, 9), (8, 1 + 1, 5, 4, 6)):  # a graph serves batches of every shape
        ids, targets, ragged = batch(lengths)
        expected = truth(plain, ids, targets, ragged, uniform(ragged))
        with recorder.record(ragged) as norms:
            fused(model, ids, targets, ragged).backward()
        torch.testing.assert_close(norms.squared, expected, rtol=1e-7, atol=0)
    assert counters["stats"]["unique_graphs"] <= 4  # as without norms
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["gpt2"])
def test_a_whole_compiled_model_with_plain_cross_entropy_gives_the_same_norms(name):
    model = student(name)
    ids, targets, ragged = batch()
    weights = uniform(ragged)
    expected = truth(model, ids, targets, ragged, weights)
    torch._dynamo.reset()

    def loss() -> Tensor:
        cu = ragged.cu_seqlens
        mask = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 12, "max_length_k": 12}
        with packed_rows():
            hidden = model.base_model(ids, position_ids=positions, use_cache=False, **mask).last_hidden_state
        logits = model.lm_head(hidden)[0, ragged.rows]
        return (F.cross_entropy(logits, targets[ragged.rows], reduction="none") * weights).sum()

    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    found = recorded(model, loss, ragged)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    found = recorded(model, torch.compile(loss, backend="aot_eager"), ragged)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    torch._dynamo.reset()


def test_packed_equals_one_by_one_and_micro_batches_add_up():
    model = student("qwen2")
    ids, targets, ragged = batch()
    recorder = SampleGradNorms(model)
    weights, cu = uniform(ragged), ragged.cu_seqlens.tolist()
    rows = ragged.cu_rows.tolist()
    expected = truth(model, ids, targets, ragged, weights)
    model.zero_grad()
    fused(model, ids, targets, ragged).backward()
    ordinary = gradients(model)
    found = []
    for s in range(ragged.num_sequences):  # micro-batches of one rationale, gradients accumulating
        one_ids, one_targets, one = batch(LENGTHS[s : s + 1])
        one_ids = ids[:, cu[s] : cu[s + 1]]
        one_targets = targets[cu[s] : cu[s + 1]]
        with recorder.record(one) as norms:
            (row_losses(model, one_ids, one_targets, one) * weights[rows[s] : rows[s + 1]]).sum().backward()
        with pytest.raises(RuntimeError, match=r"lm_head\.weight has a gradient but no norm"):
            norms.squared.sum()
        model.zero_grad()
        with recorder.record(one) as norms:
            options = {"weights": torch.ones(1).double(), "normalizer": float(weights[rows[s] : rows[s + 1]].sum())}
            fused(model, one_ids, one_targets, one, **options).backward()
        found.append(norms.squared[0])
        for name, p in model.named_parameters():
            ordinary[name] -= p.grad
        model.zero_grad()
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-7, atol=0)
    for left in ordinary.values():
        torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-12)


def test_an_upstream_factor_scales_norms_and_accumulation_keeps_batches_apart():
    model = student("gpt2")
    ids, targets, ragged = batch()
    recorder = SampleGradNorms(model)
    with recorder.record(ragged) as first:
        fused(model, ids, targets, ragged).backward()
    once = first.squared
    with recorder.record(ragged) as second:
        (3 * fused(model, ids, targets, ragged)).backward()  # gradients are not zeroed
    torch.testing.assert_close(second.squared, 9 * once, rtol=1e-9, atol=0)


def test_autocast_norms_are_those_of_the_gradients_it_makes():
    model = student("llama", lora=True, dtype=torch.float32)
    ids, targets, ragged = batch()
    expected = truth(model.double(), ids, targets, ragged, uniform(ragged))
    nn.Module.to(model, torch.float32)
    for products in ("gram", "own"):
        with torch.autocast("cpu", torch.bfloat16):
            found = recorded(model, lambda: fused(model, ids, targets, ragged), ragged, products=products)
        torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=0)


@pytest.mark.parametrize("products", ["gram", "own"])
def test_bf16_norms_are_exact_on_its_own_activations_and_cancelling_rationales_are_told_apart(
    products, record_property
):
    """Against float64 on the same bf16 inputs and gradients: 1e-4, but where a rationale's tokens cancel each other.

    There a norm is a small difference of large sums: its error is bounded by what was summed, not by what is left.
    """
    model = student("llama", dtype=torch.bfloat16).requires_grad_(False)
    linear = [m for layer in model.model.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    for module in linear:
        module.requires_grad_(True)
    ids, targets, ragged = batch((40, 33, 70, 24))
    # Rationales 1 and 3 say one thing twice and mean nearly the opposite the second time.
    wanted = torch.randn(len(targets), model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    cu, seen = ragged.cu_seqlens.tolist(), {}
    recorder = SampleGradNorms(model, products=products)

    def watch(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen[module] = [inputs[0].detach()]
        output.register_hook(seen[module].append)

    for module in linear:  # what a layer saw, and the gradient that came back
        module.register_forward_hook(watch)
    hidden = torch.randn(1, len(targets), model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    for s, rest in ((1, 0.004), (3, 0.02)):
        a, half = cu[s], (cu[s + 1] - cu[s]) // 2
        hidden[:, a + half : a + 2 * half] = hidden[:, a : a + half]
        wanted[a + half : a + 2 * half] = -(1 - rest) * wanted[a : a + half]
        wanted[a + 2 * half : cu[s + 1]] = 0
    with recorder.record(ragged) as norms:
        x = hidden.to(torch.bfloat16).requires_grad_()
        mlp = model.model.layers[0].mlp
        mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))[0].backward(wanted.to(torch.bfloat16))
    truth, summed = torch.zeros(4).double(), torch.zeros(4).double()
    for seen_x, gradient in (seen[m] for m in linear if m in seen):
        for s, (a, b) in enumerate(zip(cu, cu[1:])):
            x, g = seen_x[0, a:b].double(), gradient[0, a:b].double()
            truth[s] += (g.T @ x).square().sum()
            summed[s] += ((g @ g.T) * (x @ x.T)).abs().sum()
    error = (norms.squared.double() - truth).abs()
    lost = summed / truth  # by how much a sum is larger than its result
    assert (lost[[0, 2]] < 100).all() and (lost[[1, 3]] > 1e3).all()
    assert (error / truth)[[0, 2]].max() < 1e-4
    assert (error / summed).max() < 1e-6
    for s in (1, 3):
        record_property(f"rationale_{s}", f"sums {lost[s]:.1e} times what is left, error {error[s] / truth[s]:.1e}")
        print(f"{products}, cancelling: sums {lost[s]:.1e} times what is left, error {error[s] / truth[s]:.1e}")


def test_frozen_parameters_do_not_count():
    model = student("qwen2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj.bias" in name or "k_proj.weight" in name or "up_proj" in name)
    ids, targets, ragged = batch()
    expected = truth(model, ids, targets, ragged, uniform(ragged))
    found = recorded(model, lambda: fused(model, ids, targets, ragged), ragged)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


def test_ddp_and_fsdp2_ranks_have_the_norms_of_their_own_rationales():
    done = two_ranks("tests.distributed_norms")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("passed:") == 6
