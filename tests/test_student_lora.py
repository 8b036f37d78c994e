"""The student's adapters: what LoRA covers, what it leaves alone, the head beside it, merging."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

from compact.config import LoraConfig
from compact.errors import UserError
from compact.student import add_lora, head, merged, prepare
from tests.architectures import CONFIGS, MORE, tiny, token_ids
from tests.student_cases import LENGTHS, gradients, run, stir


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_lora_covers_every_linear_layer_of_attention_and_feed_forward_and_no_other(name):
    model = add_lora(prepare(tiny(name)), LoraConfig(rank=2, dropout=0.0))
    inner = model.get_base_model()
    adapted = {
        path.removesuffix(".base_layer")
        for path, module in inner.named_modules()
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    }
    layers = dict(inner.named_modules())
    for path, module in inner.named_modules():
        if isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D)) and "lora_" not in path:
            path = path.removesuffix(".base_layer")
            assert (path in adapted) == (layers[path] is not inner.get_output_embeddings()), path
    for path, parameter in inner.named_parameters():
        if "experts" in path and parameter.ndim == 3 and "lora_" not in path:
            assert any(other.startswith(path.split(".experts")[0] + ".experts") for other in adapted), path
        assert parameter.requires_grad == ("lora_" in path), path
    stir(model)
    output = run(model, *LENGTHS)
    truth = torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in token_ids(*LENGTHS)])
    torch.testing.assert_close(output.head(output.hidden), truth, rtol=1e-3, atol=1e-3)


def test_a_list_of_lora_targets_overrides_and_a_wrong_one_is_named():
    model = add_lora(tiny("llama"), LoraConfig(targets=["q_proj"]))
    assert {n.split(".lora_")[0].split(".")[-1] for n, p in model.named_parameters() if p.requires_grad} == {"q_proj"}
    with pytest.raises(UserError, match="c_attn"):
        add_lora(tiny("llama"), LoraConfig(targets=["c_attn"]))


def test_dropout_on_fused_experts_is_refused_with_the_way_out():
    with pytest.raises(UserError, match="student.lora.dropout=0"):
        add_lora(tiny("mixtral"), LoraConfig(dropout=0.1))


def test_loras_first_weights_follow_the_seed_and_leave_the_global_state_alone():
    models = [tiny("llama") for _ in range(3)]
    before = torch.get_rng_state()
    one, two, other = (
        add_lora(model, LoraConfig(rank=2), seed=seed).state_dict() for model, seed in zip(models, (3, 3, 4))
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one if "lora_A" in name)


def test_a_lora_adapter_on_the_head_is_refused():
    model = add_lora(prepare(tiny("llama")), LoraConfig(targets=["q_proj", "lm_head"], dropout=0.0))
    with pytest.raises(UserError, match="adapter"):
        head(model)


def test_a_head_that_peft_trains_in_full_is_the_trained_copy():
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(prepare(tiny("llama")), config)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    assert head(model).weight.requires_grad
    output = run(model, *LENGTHS)
    truth = torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in token_ids(*LENGTHS)])
    torch.testing.assert_close(output.head(output.hidden), truth, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2", "gemma3", "phi3"])
def test_a_merged_model_is_plain_and_saves_and_the_trained_one_goes_on(name, tmp_path):
    model = add_lora(prepare(tiny(name)), LoraConfig(rank=4, dropout=0.0))
    stir(model)
    ids = token_ids(9)[0]
    expected, before = model(input_ids=ids).logits, copy.deepcopy(model.state_dict())
    plain = merged(model)
    assert type(plain) is type(model.get_base_model()) and "forward" not in vars(plain)
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-4)
    plain.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    run(model, *LENGTHS).hidden.sum().backward()
    assert gradients(model)


@pytest.mark.parametrize("options", [{"adapter_name": "mine"}, {"also": "second"}, {"init_lora_weights": "pissa"}])
def test_adapters_of_ones_own_are_merged_whatever_they_are_called_and_began_with(options):
    config = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 4}
    config["init_lora_weights"] = options.get("init_lora_weights", True)
    name = options.get("adapter_name", "default")
    model = peft.get_peft_model(prepare(tiny("llama")), peft.LoraConfig(**config), adapter_name=name)
    if "also" in options:
        model.add_adapter(options["also"], peft.LoraConfig(**{**config, "r": 2}))
    stir(model)
    ids = token_ids(9)[0]
    torch.testing.assert_close(merged(model)(ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_merging_keeps_tied_weights_tied():
    model = prepare(tiny("gpt2"))
    plain = merged(model)
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert plain.get_input_embeddings().weight is not model.get_input_embeddings().weight


def test_adding_and_merging_lora_leaves_the_random_state_alone(untouched_gpus):
    model, before = prepare(tiny("llama")), torch.get_rng_state()
    merged(add_lora(model, LoraConfig(rank=2), seed=3))
    assert torch.equal(torch.get_rng_state(), before)
