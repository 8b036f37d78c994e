"""Tiny random models of many architectures, each with the features that set it apart switched on."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

_COMMON = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GPT2 = dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2)

# The architectures of the promise. Windows of 4 are shorter than the test's sequences; head sizes differ from D / H.
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**_COMMON, attention_bias=True),
    "qwen2": transformers.Qwen2Config(**_COMMON, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": transformers.Qwen3Config(**_COMMON, head_dim=16),
    "gemma2": transformers.Gemma2Config(
        **_COMMON, head_dim=16, query_pre_attn_scalar=24, sliding_window=4, attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **_COMMON, head_dim=16, query_pre_attn_scalar=24, sliding_window=4, final_logit_softcapping=3.0,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral": transformers.MistralConfig(**_COMMON, sliding_window=4),
    "phi3": transformers.Phi3Config(**_COMMON, sliding_window=4),
    "gpt2": transformers.GPT2Config(
        **_GPT2, scale_attn_by_inverse_layer_idx=True, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    ),
    "gpt_neox": transformers.GPTNeoXConfig(
        **{k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}, hidden_dropout=0.0, attention_dropout=0.0
    ),
    "mixtral": transformers.MixtralConfig(**_COMMON, num_local_experts=4),
}  # fmt: skip

# Heads that scale or shift, and layouts of attention beyond the promise.
MORE: dict[str, PretrainedConfig] = {
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **_COMMON, head_dim=16, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    ),
    "granite": transformers.GraniteConfig(**_COMMON, logits_scaling=3.0, attention_multiplier=0.3),
    "cohere": transformers.CohereConfig(**_COMMON, logit_scale=0.2, use_qk_norm=True),
    "phi": transformers.PhiConfig(**_COMMON, resid_pdrop=0.0, embd_pdrop=0.0),
    "olmo2": transformers.Olmo2Config(**_COMMON),
}


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """The architecture `name` in float32, evaluation mode, with weights large enough that every part matters."""
    config = type((CONFIGS | MORE)[name])(**(CONFIGS | MORE)[name].to_diff_dict())
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def token_ids(*lengths: int) -> list[Tensor]:
    """Sequences (1, length) of ids that differ from each other."""
    ids = (torch.arange(sum(lengths)) * 23 + 5) % 58 + 3
    return list(ids[None].split(lengths, dim=1))
