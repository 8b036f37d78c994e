"""student.compile: the same numbers from a few graphs, and nothing that is not a training pass is touched."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from compact import compilation
from compact.compilation import GRAPHS, compile_layers
from compact.config import LoraConfig, StudentConfig
from compact.errors import UserError
from compact.student import StudentOutput, add_lora, load_student, merged, prepare, unwrap
from tests.architectures import tiny, token_ids
from tests.student_cases import assert_same_gradients, gradients, ragged
from tests.toy import toy_tokenizer
from tests.toy_run import toy_model

SHAPES = [(7, 5), (12,), (9, 2, 6, 12), (3, 4, 5), (20, 31), (8, 8, 8, 8, 8), (2, 2), (40, 3, 9), (32,)]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def step(model: nn.Module, lengths: tuple[int, ...]) -> tuple[StudentOutput, dict[str, Tensor]]:
    ids = torch.cat(token_ids(*lengths), dim=1).to(next(model.parameters()).device)
    output = model(input_ids=ids, compact=ragged(*lengths))
    output.head(output.hidden).float().log_softmax(-1)[:, 7].sum().backward()
    return output, gradients(model)


def student(name: str, *, attention: str = "compact_varlen", lora: bool = False, checkpoints: bool = False):
    model = tiny(name)
    model.set_attn_implementation(attention)
    prepare(model)
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        model = add_lora(model, LoraConfig(rank=2, dropout=0.0))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.constant_(parameter, 0.05)
    return model.train()


@pytest.mark.parametrize(
    "name, backend, lora, checkpoints",
    [
        ("llama", "aot_eager", False, False),
        ("llama", "inductor", True, True),
        ("qwen2", "aot_eager", True, False),
        ("gpt2", "aot_eager", False, True),
    ],
)
def test_batches_of_every_shape_share_the_first_ones_graphs(monkeypatch, name, backend, lora, checkpoints):
    monkeypatch.setattr(compilation, "BACKEND", backend)
    model = student(name, lora=lora, checkpoints=checkpoints)
    truth = [step(model, lengths) for lengths in SHAPES]
    compile_layers(model)
    for lengths, (expected, expected_gradients) in zip(SHAPES, truth):
        output, found = step(model, lengths)
        torch.testing.assert_close(output.hidden, expected.hidden, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.query, expected.query, rtol=1e-4, atol=1e-4)
        assert_same_gradients(found, expected_gradients)
        assert 0 < graphs() <= 4  # the first layer; attention, feed-forward and norm of the last
    assert not counters["graph_break"]


def test_every_kind_of_layer_and_call_stays_within_the_stated_graphs():
    config = tiny("qwen2").config
    config.num_hidden_layers, config.layer_types = 5, ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    model = type(tiny("qwen2"))(config)
    model.set_attn_implementation("sdpa")  # a mask, and none for one sequence
    model = compile_layers(add_lora(prepare(model), LoraConfig(rank=2, dropout=0.0))).train()
    for _ in range(2):
        for lengths in SHAPES[:4]:
            step(model, lengths)
            with torch.no_grad():
                model(input_ids=torch.cat(token_ids(*lengths), dim=1), compact=ragged(*lengths))
        assert 8 < graphs() <= GRAPHS


def test_without_projections_the_last_layer_is_as_the_others():
    model = compile_layers(prepare(tiny("llama"), projections=False)).train()
    output, _ = step(model, SHAPES[0])
    assert output.query is None and graphs() == 1


def test_generation_evaluation_and_saving_know_nothing_of_it(tmp_path):
    model = student("llama", lora=True)
    names, twin = list(model.state_dict()), copy.deepcopy(model)
    ids = token_ids(9)[0]
    truth = model.eval().generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    compile_layers(model)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), truth)
    model(input_ids=ids, compact=ragged(9))
    assert graphs() == 0
    model.train()
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False), truth)
    step(model, (9, 4))
    assert graphs() > 0
    assert list(model.state_dict()) == names
    torch.testing.assert_close(merged(model).state_dict(), merged(twin).state_dict())
    merged(model).save_pretrained(tmp_path)
    again = type(unwrap(model)).from_pretrained(tmp_path)
    assert torch.equal(again.generate(input_ids=ids, max_new_tokens=5, do_sample=False), truth)


def test_a_copy_computes_with_its_own_weights():
    model = compile_layers(student("llama"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert step(twin, (7, 5))[0].hidden.abs().max() == 0
    assert step(model, (7, 5))[0].hidden.abs().max() > 0


def test_under_ddp_gradients_are_those_of_the_plain_model():
    model = student("llama", lora=True, checkpoints=True)
    truth = step(model, (9, 2, 6))[1]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(compile_layers(model))
        found = step(wrapped, (9, 2, 6))[1]
    finally:
        dist.destroy_process_group()
    assert graphs() > 0
    assert_same_gradients({name.removeprefix("module."): gradient for name, gradient in found.items()}, truth)


def test_the_recipes_flag_compiles_the_student(tmp_path):
    toy_model().save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    for flag in (False, True):
        config = StudentConfig(model=str(tmp_path), dtype="float32", compile=flag)
        model, _ = load_student(config, seed=0)
        step(model.train(), (9, 4))
        assert (graphs() > 0) == flag


def test_what_is_compiled_already_is_refused():
    model = prepare(tiny("llama"))
    model.base_model.layers[0].compile()
    with pytest.raises(UserError, match=r"compiled already.*student\.compile"):
        compile_layers(model)


def test_attention_that_cannot_be_traced_is_refused():
    model = prepare(tiny("llama"))
    model.config._attn_implementation_internal = "flash_attention_4"
    with pytest.raises(UserError, match=r"student\.compile: flash_attention_4 .*student\.attention=compact_varlen"):
        compile_layers(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["compact_varlen", "flex_attention"])
def test_on_a_gpu_half_precision_shares_graphs_too(monkeypatch, attention):
    monkeypatch.setattr(compilation, "BACKEND", "inductor")
    model = student("qwen3", attention=attention).to("cuda", torch.bfloat16)
    exact = student("qwen3")
    exact.load_state_dict(model.state_dict())  # the same rounded weights, in float32 on the CPU
    truth = [step(exact, lengths)[1] for lengths in SHAPES]
    eager = [step(model, lengths)[1] for lengths in SHAPES]
    compile_layers(model)
    compiled, seen = [], []
    for lengths in SHAPES:
        compiled.append(step(model, lengths)[1])
        seen.append(graphs())
    for name in truth[0]:
        ours, theirs = (
            sum((found[name].cpu().float() - right[name]).square().sum() for found, right in zip(run, truth))
            for run in (compiled, eager)
        )
        assert ours.sqrt() <= 2 * theirs.sqrt(), name
    assert 0 < seen[0] and seen[-1] <= GRAPHS
    if attention == "compact_varlen":
        assert seen[-1] <= 4
