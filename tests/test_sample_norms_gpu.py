"""Per-rationale norms through Triton, whole models: in the interpreter at toy size, on a GPU in bfloat16 too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from compact_kernels import SampleGradNorms, sample_grad_norms
from tests.test_sample_norms import batch, fused, student, truth, uniform

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("products", ["gram", "own"])
@pytest.mark.parametrize(("name", "lora"), [("qwen2", False), ("qwen3", True), ("gpt2", False)])
def test_float32_norms_agree_with_float64(triton_kernels, name, lora, products):
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
    for _ in range(3):
        found.zero_()
        graph.replay()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
