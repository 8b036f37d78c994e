"""A student from a GGUF file, made an ordinary model."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.utils import logging

from compact.errors import UserError

logger = logging.get_logger(__name__)


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file and rebuild it as an ordinary model: transformers counts it as quantized otherwise."""
    if not path.is_file():
        raise UserError(f"student.model={path}: no such file")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"student.model={path}: reading GGUF needs the package gguf; run: pip install gguf")
    try:
        read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # whatever a foreign or broken file makes the reader raise
        raise UserError(f"student.model={path}: transformers cannot read this GGUF file. {error}") from error
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    plain_config = type(read.config)(**settings)
    plain_config.dtype = dtype
    with no_init_weights():
        plain = type(read)(plain_config)
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(read.generation_config)
    plain.eval()
    _settle_tokenizer(tokenizer, path)
    embedding: Any = plain.get_input_embeddings()
    _drop_tokens_beyond(len(embedding.weight), tokenizer)
    return nn.Module.to(plain, dtype), tokenizer


def _settle_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Take from the file what transformers gets wrong.

    * Special tokens: transformers 5.17 calls BOS EOS and the reverse, and drops the padding token.
    * Splitting into words: transformers splits as GPT-2 does wherever it does not know the name that the file gives.
      For ``smollm`` that joins the last of several newlines or spaces to a digit, where the model's own tokenizer
      splits digits off first: "\\n\\n48" has other ids (8 of 1,000 GSM8K texts). Others are warned of.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        token = None if field is None else tokenizer.convert_ids_to_tokens(int(field.contents()))
        setattr(tokenizer, f"{name}_token", token)
    backend = tokenizer.backend_tokenizer
    if "tokenizer.ggml.pre" not in fields or not isinstance(backend.model, models.BPE):
        return
    name = fields["tokenizer.ggml.pre"].contents()
    if name == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif name not in ("default", "gpt-2") and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        logger.warning(
            f"{path}: text is split into words as GPT-2 does, but this file asks for {name!r}; token ids may differ "
            "from those the student was trained on. The original model's folder avoids this"
        )


def _drop_tokens_beyond(rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Forget special tokens that the file does not have: some transformers add a default ``<|endoftext|>``."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in described["added_tokens"] if token["id"] < rows]
    if len(kept) < len(described["added_tokens"]):
        described["added_tokens"] = kept
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(described))
