"""Students from folders and GGUF files: what loads and how, and what is refused with the way out."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import gguf
import peft
import pytest
import torch
import transformers

from compact import student
from compact.config import DataConfig, StudentConfig, from_dict
from compact.errors import UserError
from compact.student import check, load_student, lora_targets, merged, prepare
from compact.trainer import check_length
from tests.architectures import CONFIGS, token_ids
from tests.student_cases import LENGTHS, gradients, run
from tests.toy import toy_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("student")
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = 384
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    toy_tokenizer().save_pretrained(path)
    return str(path)


def test_a_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(folder).parent))
    load_student(StudentConfig(model=f"~/{Path(folder).name}", lora=None, dtype="float32"), seed=0)
    with pytest.raises(UserError, match="student.model=~/nobody: no such folder"):
        load_student(StudentConfig(model="~/nobody"), seed=0)


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


SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 1}


def test_a_text_whose_length_would_change_its_neighbours_is_refused():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope["original_max_position_embeddings"] = 64
    config = transformers.Phi3Config(**SMALL, original_max_position_embeddings=64, rope_parameters=rope)
    model = transformers.Phi3ForCausalLM(config)
    check_length(model, DataConfig(max_length=64))
    with pytest.raises(UserError, match="longer than 64 tokens, the student turns .* set data.max_length to 64 or"):
        check_length(model, DataConfig(max_length=65))
    check_length(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)), DataConfig(max_length=256))


def test_flex_attention_is_stood_in_for_by_what_has_its_masks():
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    sizes = {"vocab_size": 96, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, word_embed_proj_dim=32))
    for model in (llama, opt):
        model.set_attn_implementation("flex_attention")
        prepare(model, projections=False)
    check(llama)
    assert llama.config._attn_implementation == "flex_attention"
    with pytest.raises(
        UserError, match="see each other under student.attention=flex_attention"
    ):  # so does the real one
        check(opt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_untrained_convolution_lets_through_is_seen(dtype):
    torch.manual_seed(0)
    sizes = {**SMALL, "hidden_size": 64, "num_hidden_layers": 4}
    config = transformers.Lfm2Config(**sizes, layer_types=["conv", "full_attention", "conv", "full_attention"])
    model = transformers.Lfm2ForCausalLM(config)
    with pytest.raises(UserError, match="Lfm2ForCausalLM lets packed sequences see each other"):
        check(prepare(model.to(dtype), projections=False))


def test_whatever_a_packed_batch_raises_is_said_of_the_model():
    sizes = {"vocab_size": 96, "hidden_size": 32, "embedding_size": 16, "intermediate_size": 64}
    config = transformers.ElectraConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, is_decoder=True)
    with pytest.raises(UserError, match="ElectraForCausalLM cannot run a packed batch"):
        check(prepare(transformers.ElectraForCausalLM(config), projections=False))


def test_convolutions_are_no_fused_experts():
    linear, fused = lora_targets(transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**SMALL)))
    assert "q_proj" in linear and fused == []
