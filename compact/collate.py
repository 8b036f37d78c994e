"""Questions of tokens → one packed batch without padding, described by a :class:`compact_kernels.Ragged`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from compact.errors import UserError
from compact_kernels.ragged import Ragged


class Collator:
    """Lays the rationales of a batch of questions end to end.

    Called with Q items of :func:`compact.data.tokenize_questions` (S rationales, T tokens in all), it gives:

    * ``input_ids`` (1, T) int64, ``position_ids`` (1, T) int64 restarting with every rationale,
    * ``labels`` (1, T) int64, unshifted: the completions' tokens, -100 on the prompts,
    * ``cu_seq_lens_q`` = ``cu_seq_lens_k`` (S+1,) int32, ``max_length_q`` = ``max_length_k`` int,
    * ``ragged``: the :class:`Ragged` of the batch, on the host,
    * ``teachers`` (S,) int64, indices into the report's teachers; ``question_ids``: Q strings,
    * ``embeddings`` (S, E) float32, if the items' rationales carry an ``embedding``,
    * ``unconditional``, with `ifd`: the same for the completions without the question (eq. 6, difficulty = ifd), each
      after a one-token prompt, BOS or else EOS.

    Args:
        tokenizer: asked for BOS and EOS only; not kept. Needed with `ifd`.
        ifd: whether the batch has ``unconditional``.
    """

    def __init__(self, tokenizer: Any = None, *, ifd: bool = False):
        self.start_id: int | None = None
        if ifd:
            if tokenizer is None:
                raise UserError(
                    "difficulty.kind ifd needs a tokenizer: Collator(tokenizer, ifd=True), or the trainer's "
                    "processing_class"
                )
            self.start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = _packed(items, [item["prompt_ids"] for item in items])
        if self.start_id is not None:
            batch["unconditional"] = _packed(items, [[self.start_id]] * len(items))
        rationales = [rationale for item in items for rationale in item["rationales"]]
        if rationales and "embedding" in rationales[0]:
            batch["embeddings"] = torch.from_numpy(
                np.array([rationale["embedding"] for rationale in rationales], dtype=np.float32)
            )
        return batch


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors, and its Ragged, on `device`: for loops without a trainer that does this."""
    return send_to_device(batch, device, non_blocking=True)


def _packed(items: list[dict[str, Any]], prompts: list[list[int]]) -> dict[str, Any]:
    tokens: list[int] = []
    prompt_lengths, completion_lengths = [], []
    for item, prompt in zip(items, prompts):
        for rationale in item["rationales"]:
            tokens += prompt
            tokens += rationale["completion_ids"]
            prompt_lengths.append(len(prompt))
            completion_lengths.append(len(rationale["completion_ids"]))
    rationales = [rationale for item in items for rationale in item["rationales"]]
    sequence_lengths = [prompt + completion for prompt, completion in zip(prompt_lengths, completion_lengths)]
    ragged = Ragged.build(
        sequence_lengths=sequence_lengths,
        prompt_lengths=prompt_lengths,
        rationales_per_question=[len(item["rationales"]) for item in items],
        body_lengths=[rationale["body_length"] for rationale in rationales],
        evidence_ids=[item["evidence_ids"] for item in items for _ in item["rationales"]],
        answer_spans=[(rationale["answer_start"], rationale["answer_length"]) for rationale in rationales],
        thinking=[rationale["thinking"] for rationale in rationales],
    )
    input_ids = np.array(tokens, dtype=np.int64)
    lengths = np.array(sequence_lengths, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(len(input_ids)) - np.repeat(starts, lengths)
    labels = np.where(positions < np.repeat(np.array(prompt_lengths, dtype=np.int64), lengths), -100, input_ids)
    return {
        "input_ids": torch.from_numpy(input_ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "labels": torch.from_numpy(labels)[None],
        "cu_seq_lens_q": ragged.cu_seqlens,
        "cu_seq_lens_k": ragged.cu_seqlens,
        "max_length_q": ragged.max_seqlen,
        "max_length_k": ragged.max_seqlen,
        "ragged": ragged,
        "teachers": torch.tensor([rationale["teacher"] for rationale in rationales], dtype=torch.int64),
        "question_ids": [item["id"] for item in items],
    }
