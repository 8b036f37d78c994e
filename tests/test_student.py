"""The student's promises: the same numbers as the untouched model, packed or not, for every architecture."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import gguf
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from compact import student
from compact.backbone import _last_attention, _tap
from compact.config import LoraConfig, StudentConfig, from_dict
from compact.errors import UserError
from compact.student import StudentOutput, add_lora, check, head, load_student, merged, prepare
from compact_kernels.ragged import Ragged
from tests.architectures import CONFIGS, MORE, tiny, token_ids
from tests.toy import toy_tokenizer

LENGTHS = (9, 2, 6, 12)
ROOT = Path(__file__).resolve().parents[1]


def ragged(*lengths: int) -> Ragged:
    return Ragged.build(
        sequence_lengths=lengths, prompt_lengths=[1] * len(lengths), rationales_per_question=[len(lengths)]
    )


def run(model: nn.Module, *lengths: int) -> StudentOutput:
    return model(input_ids=torch.cat(token_ids(*lengths), dim=1), compact=ragged(*lengths))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        scale = max(other[name].abs().max().item(), 1e-3)
        assert (one[name] - other[name]).abs().max().item() <= tolerance * scale, name


def directions(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


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
    attention, kept = _last_attention(model), {}
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


def stir(model: nn.Module) -> None:
    """Give LoRA's second matrices, which start at zero, values."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(0.1 * directions(*parameter.shape))


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
    tap = _tap(_last_attention(model.get_base_model()))
    assert tap is not None and tap.rows is None and tap.states is None and tap.position_embeddings is None


def test_bfloat16_projections_are_computed_in_float32():
    model = prepare(tiny("qwen3").to(torch.bfloat16))
    seen: list[Tensor] = []
    _last_attention(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).double()),
        with_kwargs=True,
    )
    output = run(model, *LENGTHS)
    attention = _last_attention(copy.deepcopy(model).double())
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


# ------------------------------------------------------------------------------------------------------ head, check


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


class Louder(transformers.LlamaForCausalLM):
    """Logits that no one announced."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


def test_an_unknown_step_between_states_and_logits_is_found():
    with pytest.raises(UserError, match="between its hidden states and its logits"):
        check(prepare(Louder(tiny("llama").config).eval()))


def test_a_model_whose_packed_sequences_see_each_other_is_found():
    config = transformers.OPTConfig(
        vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    model = prepare(transformers.OPTForCausalLM(config).eval())  # makes its mask without the positions
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="see each other"):
        check(model)
    model.set_attn_implementation("compact_varlen")
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


# ------------------------------------------------------------------------------------------------- loading, merging


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("student")
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = 384
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    toy_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_a_flash_attention_that_is_not_here_is_an_error_that_names_it(folder, version):
    if torch.cuda.is_available():
        pytest.skip("it may be here")
    name = f"flash_attention_{version}"
    recipe = from_dict({"student": {"attention": name, "model": folder}})
    with pytest.raises(UserError, match=f"^student.attention={name}: FlashAttention{version} .*installed"):
        load_student(recipe.student, seed=0)


def test_a_folder_loads_with_lora_ready_to_train(folder):
    model, tokenizer = load_student(StudentConfig(model=folder, dtype="float32", gradient_checkpointing=True), seed=1)
    model.train()
    output = run(model, *LENGTHS)
    output.hidden.sum().backward()
    assert isinstance(model, peft.PeftModel) and gradients(model)
    assert tokenizer.pad_token_id is not None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_weights_that_train_are_float32_and_frozen_ones_in_the_dtype_asked_for(folder):
    full, _ = load_student(StudentConfig(model=folder, dtype="bfloat16", lora=None), seed=1)
    assert type(full) is transformers.LlamaForCausalLM and full.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in full.parameters())
    lora, _ = load_student(StudentConfig(model=folder, dtype="bfloat16"), seed=1)
    assert {p.dtype for p in lora.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in lora.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_students_that_cannot_be_loaded_are_named_with_the_way_out(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="nowhere"):
        load_student(StudentConfig(model=str(tmp_path / "nowhere")), seed=0)
    with pytest.raises(UserError, match="no such file"):
        load_student(StudentConfig(model=str(tmp_path / "nowhere.gguf")), seed=0)
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="some.gguf"):
        load_student(StudentConfig(model=str(tmp_path / "some.gguf")), seed=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf"):
        load_student(StudentConfig(model=str(tmp_path / "some.gguf")), seed=0)
    monkeypatch.undo()
    with pytest.raises(UserError, match="no_such_attention"):
        load_student(StudentConfig(model=folder, attention="no_such_attention"), seed=0)


def write_gguf(
    path: Path, model: transformers.LlamaForCausalLM, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    """A float32 GGUF file as llama.cpp's converter writes it: other names, and rotary halves interleaved."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        if name != "lm_head.weight":  # tied
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_an_ordinary_model_with_its_own_tokenizer(tmp_path):
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size, config.attention_bias, config.tie_word_embeddings = 384, False, True
    torch.manual_seed(0)
    original, wanted = transformers.LlamaForCausalLM(config).eval(), toy_tokenizer(chat_template=True)
    write_gguf(tmp_path / "tiny.gguf", original, wanted)
    model, tokenizer = load_student(
        StudentConfig(model=str(tmp_path / "tiny.gguf"), dtype="float32", lora=None), seed=0
    )
    ids = token_ids(9)[0]
    assert type(model) is transformers.LlamaForCausalLM and not hasattr(model.config, "quantization_config")
    assert torch.equal(model(ids).logits, original(ids).logits)
    for name in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{name}_token_id") == getattr(wanted, f"{name}_token_id"), name
    assert tokenizer.chat_template == wanted.chat_template
    # smollm splits digits off before words, so newlines before one stay together: "\n\n" | "4" | "8".
    words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("is:\n\n48")]
    assert words == ["is", ":", "ĊĊ", "4", "8"]
    merged(model).save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, tokenizer = load_student(StudentConfig(model=str(tmp_path / "saved"), dtype="float32", lora=None), seed=0)
    assert torch.equal(again(ids).logits, original(ids).logits)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (wanted.bos_token_id, wanted.eos_token_id)
    assert [w for w, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("is:\n\n48")] == words


def test_a_tokenizer_without_eos_or_with_too_many_tokens_is_refused(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="EOS"):
        student._settle_tokens(model, tokenizer, "it")
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(400)])
    with pytest.raises(UserError, match="the model embeds 384"):
        student._settle_tokens(model, tokenizer, "it")


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


def test_merging_keeps_tied_weights_tied():
    model = prepare(tiny("gpt2"))
    plain = merged(model)
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert plain.get_input_embeddings().weight is not model.get_input_embeddings().weight


def test_adding_and_merging_lora_leaves_the_random_state_alone(untouched_gpus):
    model, before = prepare(tiny("llama")), torch.get_rng_state()
    merged(add_lora(model, LoraConfig(rank=2), seed=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_ddp_and_fsdp2_give_the_mean_of_the_ranks_gradients():
    """Two gloo processes, LoRA and full fine-tuning, the head tied, untied, sharded: see the module that runs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.distributed_student"], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed:") == 13


def test_weights_without_their_head_or_not_finite_are_refused(folder, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    toy_tokenizer().save_pretrained(tmp_path)
    model.model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lack lm_head\.weight, which would be random"):
        load_student(StudentConfig(model=str(tmp_path)), seed=0)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not finite"):
        load_student(StudentConfig(model=str(tmp_path)), seed=0)


def test_a_folder_that_is_not_there_is_said_to_be_missing():
    with pytest.raises(UserError, match=r"\./nowhere: no such folder"):
        load_student(StudentConfig(model="./nowhere"), seed=0)
