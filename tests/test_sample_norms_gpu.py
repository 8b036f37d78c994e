"""Per-rationale norms through Triton, whole models: in the interpreter at toy size, on a GPU in bfloat16 too."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from compact_kernels import Ragged, SampleGradNorms, sample_grad_norms
from compact_kernels.sample_norms import costs
from tests.norm_cases import batch, fused, student, truth, uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("products", ["gram", "own", "stored"])
@pytest.mark.parametrize(("name", "lora"), [("qwen2", False), ("qwen3", True), ("gpt2", False)])
def test_float32_norms_agree_with_float64(triton_kernels, monkeypatch, name, lora, products):
    if products == "stored":
        monkeypatch.setattr(costs, "stored", lambda *shape: True)
        products = "own"
    model = student(name, lora, torch.float32)
    ids, targets, ragged = batch()
    expected = truth(nn.Module.to(copy.deepcopy(model), torch.float64), ids, targets, ragged, uniform(ragged))
    model.to(DEVICE)
    ids, targets, ragged = ids.to(DEVICE), targets.to(DEVICE), ragged.to(DEVICE)
    with sample_grad_norms(model, ragged, products=products) as norms:
        fused(model, ids, targets, ragged).backward()
    torch.testing.assert_close(norms.squared.double().cpu(), expected, rtol=1e-3, atol=0)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("lora", [False, True])
def test_a_captured_step_gives_the_eager_steps_norms(lora):
    model = student("qwen2", lora, torch.bfloat16).to(DEVICE)
    ids, targets, ragged = batch()
    ids, targets, ragged = ids.to(DEVICE), targets.to(DEVICE), ragged.to(DEVICE)
    recorder = SampleGradNorms(model)
    counts = ragged.cu_questions.diff()
    weights = (1 / counts.double()).repeat_interleave(counts)  # here: its size is read from the device

    def step() -> torch.Tensor:
        with recorder.record(ragged) as norms:
            fused(model, ids, targets, ragged, weights=weights).backward()
        return norms.squared

    graph, found, expected = captured(model, step)
    for _ in range(3):
        found.zero_()
        graph.replay()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def captured(
    model: nn.Module, step: Callable[[], torch.Tensor]
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
    """A step's graph, what it writes to, and what the step gives eagerly."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            expected = step().clone()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph, found, expected


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("lengths", [[2048] * 8, [1500, 2500, 1501, 2499, 2048, 2048, 4000, 288]])
def test_a_layer_under_long_rationales_stores_its_products_eagerly_and_captured(lengths):
    ragged = Ragged.build(sequence_lengths=lengths, prompt_lengths=[1] * 8, rationales_per_question=[8]).to(DEVICE)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(896, 4864)).to(DEVICE, torch.bfloat16)
    x, gradient = (torch.randn(sum(lengths), n, device=DEVICE, dtype=torch.bfloat16) for n in (896, 4864))
    recorder = SampleGradNorms(model)
    layer = model[0]

    def step() -> torch.Tensor:
        with recorder.record(ragged) as norms:
            model(x).backward(gradient)
        assert recorder._families[0].own and recorder._families[0].stored == [True]
        return norms.squared

    pairs = list(zip(x.double().split(lengths), gradient.double().split(lengths)))
    expected = torch.stack([(g.t() @ part).square().sum() + g.sum(0).square().sum() for part, g in pairs])
    whole = gradient.double().t() @ x.double()
    least = 1e-4 * whole.abs().max().item()

    def check(norms: torch.Tensor) -> None:
        torch.testing.assert_close(norms.double(), expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(layer.weight.grad.double(), whole, rtol=2**-8, atol=least)

    check(step())
    graph, found, eager = captured(model, step)
    for _ in range(3):
        found.zero_()
        layer.weight.grad.zero_()
        graph.replay()
        check(found)
        assert torch.equal(found, eager)
