"""The student's promises: the same numbers as the untouched model, packed or not, for every architecture."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from compact.config import LoraConfig
from compact.errors import UserError
from compact.projections import last_attention, tap_of
from compact.student import add_lora, check, prepare
from tests.architectures import CONFIGS, MORE, tiny, token_ids
from tests.processes import two_ranks
from tests.student_cases import LENGTHS, assert_same_gradients, directions, gradients, ragged, run, stir
from tests.toy_run import toy_model, toy_trainer


@pytest.fixture(params=[*CONFIGS, *MORE])
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "compact_varlen"])
def test_packed_sequences_give_the_untouched_models_logits_and_gradients(any_model, attention):
    capped = any_model.config.model_type == "gemma2"
    if capped and attention != "eager":
        pytest.skip("softcapped attention runs under eager and flex attention alone")
    any_model.set_attn_implementation("eager" if capped else "sdpa")
    weights = directions(sum(LENGTHS), 61)
    truth = [any_model(ids, use_cache=False).logits[0] for ids in token_ids(*LENGTHS)]
    (torch.cat(truth) * weights).sum().backward()
    expected = gradients(any_model)

    any_model.set_attn_implementation(attention)
    output = run(prepare(any_model), *LENGTHS)
    logits = output.head(output.hidden)
    (logits * weights).sum().backward()

    torch.testing.assert_close(logits, torch.cat(truth), rtol=1e-4, atol=1e-4)
    assert_same_gradients(gradients(any_model), expected)


def test_the_means_and_last_states_are_those_of_the_hidden_states():
    output = run(prepare(tiny("llama").to(torch.bfloat16)), *LENGTHS)
    parts = output.hidden.detach().double().split(LENGTHS)
    torch.testing.assert_close(
        output.pooled.double(), torch.stack([part.mean(0) for part in parts]), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(output.eos_hidden.double(), torch.stack([part[-1] for part in parts]), rtol=0, atol=0)
    for tensor in (output.pooled, output.eos_hidden, output.query, output.key):
        assert tensor.dtype == torch.float32 and not tensor.requires_grad
    assert output.hidden.dtype == torch.bfloat16 and output.hidden.requires_grad


def expected_projections(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key (H, d) at the last token, from what the layer's linear modules put out in a plain forward."""
    attention, kept = last_attention(model), {}
    names = ("q_proj", "k_proj", "qkv_proj", "c_attn", "query_key_value")
    handles = [
        getattr(attention, name).register_forward_hook(
            lambda module, args, out, name=name: kept.update({name: out[0, -1]})
        )
        for name in names
        if name in dict(attention.named_children())
    ]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    kind, config = model.config.model_type, model.config
    heads, d = config.num_attention_heads, getattr(config, "head_dim", None) or config.hidden_size // 4
    if kind == "phi3":
        query, key, _ = kept["qkv_proj"].split([heads * d, config.num_key_value_heads * d] * 1 + [2 * d])
    elif kind == "gpt2":
        query, key, _ = kept["c_attn"].split(config.hidden_size)
    elif kind == "gpt_neox":
        query, key, _ = kept["query_key_value"].view(heads, 3, d).unbind(1)
    else:
        query, key = kept["q_proj"], kept["k_proj"]
    if kind == "olmo2":  # normalised before it is split into heads
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = query.reshape(heads, d), key.reshape(-1, d)
    if kind in ("qwen3", "qwen3_moe", "gemma3_text", "cohere"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    scaling = {
        "gemma2": 24**-0.5 * d**0.5,
        "gemma3_text": 24**-0.5 * d**0.5,
        "granite": 0.3 * d**0.5,
        "gpt2": 1 / 2,  # divided by the second layer's number
    }
    return query * scaling.get(kind, 1.0), key.repeat_interleave(heads // key.shape[0], dim=0)


def test_query_and_key_are_the_last_layers_own_projections(any_model):
    any_model.set_attn_implementation("eager")
    expected = [expected_projections(any_model, ids) for ids in token_ids(*LENGTHS)]
    output = run(prepare(any_model), *LENGTHS)
    torch.testing.assert_close(output.query, torch.stack([q for q, _ in expected]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.key, torch.stack([k for _, k in expected]), rtol=1e-4, atol=1e-4)


def test_live_lora_is_part_of_query_and_key():
    model = add_lora(prepare(tiny("llama")), LoraConfig(rank=4, dropout=0.0))
    before = run(model, *LENGTHS)
    stir(model)
    after = run(model, *LENGTHS)
    inner = model.get_base_model()
    expected = [expected_projections(inner, ids) for ids in token_ids(*LENGTHS)]
    torch.testing.assert_close(after.query, torch.stack([q for q, _ in expected]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.key, torch.stack([k for _, k in expected]), rtol=1e-4, atol=1e-4)
    assert (after.query - before.query).abs().max() > 0.05


def test_without_projections_there_is_no_query():
    output = run(prepare(tiny("llama"), projections=False), *LENGTHS)
    assert output.query is None and output.key is None


def test_unknown_projections_name_the_option_that_replaces_them():
    model = tiny("llama")
    for layer in model.model.layers:  # attention of its own, that asks no implementation

        def own(hidden_states, attention=layer.self_attn, **_):
            return attention.o_proj(attention.q_proj(hidden_states)), None

        layer.self_attn.forward = own
    with pytest.raises(UserError, match="consensus.affinity=cosine"):
        run(prepare(model), *LENGTHS)
    assert run(prepare(model, projections=False), *LENGTHS).query is None
    check(model)
    with pytest.raises(UserError, match="consensus.affinity=cosine"):
        prepare(
            transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2))
        )


def test_the_check_records_no_gradients():
    model, seen = prepare(toy_model()), []
    model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    check(model)
    assert seen and not any(seen)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient_even_with_dropout(name, reentrant):
    model = add_lora(prepare(tiny(name)), LoraConfig(rank=4, dropout=0.3)).train()
    stir(model)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(7)
        output = run(model, *LENGTHS)
        output.hidden.pow(2).sum().backward()
        found.append((gradients(model), output))
    assert_same_gradients(found[1][0], found[0][0], tolerance=1e-5)
    torch.testing.assert_close(found[1][1].query, found[0][1].query)
    tap = tap_of(last_attention(model.get_base_model()))
    assert tap is not None and tap.rows is None and tap.states is None and tap.position_embeddings is None


def test_bfloat16_projections_are_computed_in_float32():
    model = prepare(tiny("qwen3").to(torch.bfloat16))
    seen: list[Tensor] = []
    last_attention(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).double()),
        with_kwargs=True,
    )
    output = run(model, *LENGTHS)
    attention = last_attention(copy.deepcopy(model).double())
    states = seen[0][0, torch.tensor(LENGTHS).cumsum(0) - 1]
    exact = attention.q_norm(attention.q_proj(states).view(len(LENGTHS), 4, 16))
    assert (output.query - exact).abs().max() < 1e-5


def test_generation_and_the_forward_without_compact_are_untouched():
    model, plain = prepare(tiny("llama")), tiny("llama")
    ids = torch.cat(token_ids(5, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = dict(attention_mask=mask, max_new_tokens=4, do_sample=False)
    expected = plain.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model(ids, labels=ids).loss, plain(ids, labels=ids).loss)
    with pytest.raises(ValueError, match="no_such_argument"):
        model.generate(ids, no_such_argument=1)
    model.set_attn_implementation("compact_varlen")
    assert torch.equal(model.generate(ids, **options), expected)


def test_a_deep_copy_of_a_prepared_model_runs_on_its_own_weights():
    model = prepare(tiny("llama"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert run(twin, *LENGTHS).hidden.abs().max() == 0
    assert run(model, *LENGTHS).hidden.abs().max() > 0


def test_what_a_packed_batch_cannot_take_is_refused():
    model = prepare(tiny("llama"))
    ids = torch.cat(token_ids(*LENGTHS), dim=1)
    for name in ("labels", "attention_mask"):
        with pytest.raises(ValueError, match=name):
            model(input_ids=ids, compact=ragged(*LENGTHS), **{name: torch.ones_like(ids)})
    with pytest.raises(ValueError, match=r"\(1, 28\).*\(1, 29\)"):
        model(input_ids=ids[:, 1:], compact=ragged(*LENGTHS))


def test_compiled_models_give_the_same_states():
    model = prepare(tiny("llama"))
    model.base_model.layers = model.base_model.layers[:1]
    model.config.num_hidden_layers = 1
    expected = run(model, *LENGTHS)
    output = run(torch.compile(model, backend="eager"), *LENGTHS)
    torch.testing.assert_close(output.hidden, expected.hidden)
    torch.testing.assert_close(output.query, expected.query)


def test_ddp_and_fsdp2_give_the_mean_of_the_ranks_gradients():
    """Two gloo processes, LoRA and full fine-tuning, the head tied, untied, sharded: see the module that runs."""
    done = two_ranks("tests.distributed_student")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed:") == 13


# ----------------------------------------------------------------------------------------------------------- check


class Louder(transformers.LlamaForCausalLM):
    """Logits that no one announced."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


def test_an_unknown_step_between_states_and_logits_is_found():
    with pytest.raises(UserError, match="between its hidden states and its logits"):
        check(prepare(Louder(tiny("llama").config).eval()))


def opt() -> PreTrainedModel:
    """It makes its mask without the positions: under sdpa packed sequences see each other."""
    config = transformers.OPTConfig(
        vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.set_attn_implementation("sdpa")
    return model


def test_a_model_whose_packed_sequences_see_each_other_is_found(tmp_path):
    model = prepare(opt())
    with pytest.raises(UserError, match="see each other"):
        check(model)
    model.set_attn_implementation("compact_varlen")
    check(model)
    with pytest.raises(UserError, match="see each other"):  # before any trainer trains it
        toy_trainer(tmp_path, model=opt())


def test_a_window_that_a_model_keeps_in_its_mask_is_found():
    model = transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **{name: getattr(CONFIGS["llama"], name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")},
            num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, use_sliding_window=True,
            sliding_window=16, max_window_layers=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
        )
    ).eval()  # fmt: skip
    model.set_attn_implementation("compact_varlen")
    with pytest.raises(UserError, match="keeps its window of 16 tokens in its mask.*take student.attention=sdpa"):
        check(prepare(model))
    model.set_attn_implementation("sdpa")
    check(model)


def test_the_load_balancing_loss_is_left_out_with_a_warning(caplog):
    model = tiny("mixtral")
    model.config.output_router_logits = True
    messages: list[str] = []
    logger = transformers.utils.logging.get_logger("compact.backbone")
    logger.addFilter(lambda record: messages.append(record.getMessage()) or True)
    prepare(model)
    assert any("load-balancing" in message for message in messages)
    assert torch.equal(run(model, *LENGTHS).hidden, run(prepare(tiny("mixtral")), *LENGTHS).hidden)
