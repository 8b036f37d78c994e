"""What a causal LM does in an evaluation: greedy answers, and log-probabilities of texts that are given to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from compact.config import DataConfig
from compact.errors import UserError
from compact.models import context_length, evaluation_mode
from compact.statistics import mean
from compact.student import head
from compact.tasks import TaskRow
from compact.tokenization import encode, lead_of, render_prompt, suffix_ids

LOGIT_CHUNK = 1 << 24  # logits held at once while scoring: 64 MiB in float32


@contextmanager
def evaluating(causal: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, in which gradient checkpointing is inactive, and attention whose results repeat.

    cuDNN's is left out: with a padding mask its bfloat16 results differ from run to run, and greedy answers with them.
    """
    with (
        evaluation_mode(causal),
        sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]),
    ):
        yield


def generate_answers(
    causal: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[TaskRow],
    prompts: list[list[int]],
    max_new_tokens: int,
    data: DataConfig,
) -> list[tuple[str, int, bool]]:
    """(text, tokens, whether it ended by itself) of each greedy answer."""
    longest = max(map(len, prompts))
    context = context_length(causal)
    room = min(max_new_tokens, context - longest)
    if room < 1:
        row = rows[[len(p) for p in prompts].index(longest)]
        raise UserError(
            f"question {row.id}: its prompt has {longest} tokens and the model's context {context}, which leaves no "
            "room for an answer; shorten or drop the question"
        )
    stops = stop_ids(causal, tokenizer)
    # In place of the model's own generation config, which may hold penalties and sampling that generate() would add.
    own = causal.generation_config
    causal.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=room, eos_token_id=stops, pad_token_id=pad_id(tokenizer), use_cache=True
    )
    ids, mask = padded(prompts, pad_id(tokenizer), causal.device, left=True)
    try:
        answers = causal.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :].tolist()  # type: ignore[operator]
    finally:
        causal.generation_config = own
    out = []
    next_question = None if tokenizer.chat_template else data.prompt_template.partition("{prompt}")[0].strip()
    for answer in answers:
        length = next((i for i, token in enumerate(answer) if token in stops), len(answer))
        text = str(tokenizer.decode(answer[:length], skip_special_tokens=True))
        finished = length < len(answer)
        if next_question and f"\n{next_question}" in text:
            # A base model goes on and asks itself the next question: its answer to this one ends there.
            text, finished = text[: text.index(f"\n{next_question}")], True
        out.append((text, length, finished))
    return out


def score_answers(
    causal: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[TaskRow],
    prompts: list[list[int]],
    data: DataConfig,
) -> list[dict[str, float | None]]:
    """Mean log-probabilities of each gold answer, its suffix and its solution."""
    suffixes = [suffix_ids(tokenizer, data.suffix, row.answer) for row in rows]
    context = context_length(causal)
    for row, prompt, (ids, *_) in zip(rows, prompts, suffixes):
        if len(prompt) + len(ids) > context:
            raise UserError(
                f"question {row.id}: its prompt and the suffix with its answer have {len(prompt)} + {len(ids)} "
                f"tokens, more than the model's context, {context}; shorten or drop the question"
            )
    scores = token_logprobs(causal, list(zip(prompts, (ids for ids, *_ in suffixes))))
    out: list[dict[str, float | None]] = []
    for (_, start, length), values in zip(suffixes, scores):
        out.append(
            {
                "answer_logprob": mean(values[start : start + length]),
                "suffix_logprob": mean(values),
                "solution_logprob": None,
            }
        )
    pairs, owners = [], []
    for i, row in enumerate(rows):
        rendered = render_prompt(tokenizer, row.prompt, data.prompt_template)
        room = context - len(prompts[i])
        if row.solution is not None and room > 0:
            [(ids, _)] = encode(tokenizer, [lead_of(rendered) + row.solution])
            pairs.append((prompts[i], ids[:room]))
            owners.append(i)
    for i, values in zip(owners, token_logprobs(causal, pairs) if pairs else []):
        out[i]["solution_logprob"] = mean(values)
    return out


def token_logprobs(causal: PreTrainedModel, pairs: list[tuple[list[int], list[int]]]) -> list[list[float]]:
    """log p of each target token given prompt and the targets before it: (prompt ids, target ids) → per-token floats.

    One pass of the backbone over the right-padded batch, then the head on the rows that predict targets, LOGIT_CHUNK
    logits at a time.
    """
    ids, mask = padded([prompt + target for prompt, target in pairs], 0, causal.device, left=False)
    hidden = causal.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # (B, L, D)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, target) in enumerate(pairs):
        scored[i, len(prompt) - 1 : len(prompt) - 1 + len(target)] = True
    rows, targets = hidden[scored], ids.roll(-1, dims=1)[scored]  # (N, D), (N,)
    lm_head = head(causal)
    chunk = max(1, LOGIT_CHUNK // lm_head.weight.shape[0])
    values = []
    for start in range(0, rows.shape[0], chunk):
        logits = lm_head(rows[start : start + chunk]).float()  # (n, V)
        picked = logits.gather(1, targets[start : start + chunk, None]).squeeze(1)
        values.append(picked - logits.logsumexp(dim=1))
    return [part.tolist() for part in torch.cat(values).split([len(target) for _, target in pairs])]


def padded(sequences: list[list[int]], pad: int, device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
    """(B, L) int64 ids and attention mask."""
    width = max(map(len, sequences))
    ids, mask = torch.full((len(sequences), width), pad), torch.zeros(len(sequences), width, dtype=torch.int64)
    for i, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[i, place], mask[i, place] = torch.tensor(sequence), 1
    return ids.to(device), mask.to(device)


def stop_ids(causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends an answer: the tokenizer's EOS and those of the model's generation config."""
    own = causal.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(i for i in ids if i is not None)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
