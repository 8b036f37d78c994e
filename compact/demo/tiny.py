"""The tiny student: a tokenizer of whole words and numbers, a small Llama, and its pre-training on skills."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compact.demo.pretraining import Pair, document

PIECE = r" ?[A-Za-z]+| ?[0-9]+|[\s\S]"  # a word or a number with the space before it, else one character
CONTEXT = 256  # tokens


def build_tokenizer(sample: str) -> PreTrainedTokenizerFast:
    """A tokenizer with every word of `sample` and every number up to 99 as one token; it spells other words.

    Text comes back from its tokens as it was, except for what is not printable ASCII.
    """
    words = sorted(set(re.findall(r"[A-Za-z]+", sample)))
    whole = [space + piece for piece in [*words, *map(str, range(100))] for space in ("", " ")]
    characters = [c for c in string.printable if c.isprintable() or c == "\n"]
    vocabulary = [("<unk>", -100.0), ("<eos>", -100.0), ("<pad>", -100.0)]
    vocabulary += [(piece, -1.0) for piece in whole]  # log-probabilities: the fewest tokens win
    vocabulary += [(c, -10.0) for c in characters if c not in whole]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 0.3 M parameters, float32, initialised from torch's current random state."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        # With theta 10,000 most of a head's 24 dimensions hardly turn in 100 tokens: order is learnt late.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.08,  # about 1/sqrt(width); transformers' 0.02 suits models a hundred times wider
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    render: Callable[[str, str], Pair],
    *,
    seed: int,
    steps: int,
    documents: int = 64,
    learning_rate: float = 4e-3,
) -> list[float]:
    """Teach the model what follows the prompts of :func:`compact.demo.pretraining.document`.

    Args:
        render: as `document` takes it.
        seed: draws the documents. steps: of `documents` documents each.
        learning_rate: the largest one; it warms up over a tenth of the steps and falls to nothing by the last.

    Returns:
        The loss of each step, nats a token.
    """
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = 0.15 if steps == 10 else 0.1  # torch divides by what one step of warm-up leaves, 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=warmup)
    losses = []
    model.train()
    bar = tqdm(range(steps), desc="Pre-training the tiny student", unit=" steps", disable=None)
    for _ in bar:
        ids, labels = _batch(tokenizer, [document(rng, render) for _ in range(documents)])
        # Causal attention: padding at the end is seen by nobody, so no mask is needed.
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    return losses


def _batch(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T), padded at the end, and labels (B, T), -100 on prompts and padding."""
    prompts = tokenizer([prompt for prompt, _ in pairs], add_special_tokens=False)["input_ids"]
    answers = tokenizer([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
    rows = [(len(p), [*p, *a, tokenizer.eos_token_id]) for p, a in zip(prompts, answers)]
    longest = max(len(row) for _, row in rows)
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for _, row in rows])
    labels = torch.tensor([[-100] * n + row[n:] + [-100] * (longest - len(row)) for n, row in rows])
    return ids, labels
