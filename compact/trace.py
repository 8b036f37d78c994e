"""One question as the student sees it: the evidence along each rationale, the graph between them, the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from compact.collate import Collator, to_device
from compact.config import CompactConfig
from compact.loss import consensus_vectors, distillation_loss
from compact.models import evaluation_mode
from compact.strategies import Strategy
from compact_kernels import question_affinity


@torch.no_grad()
def trace_question(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    item: dict[str, Any],
    strategy: Strategy,
    config: CompactConfig,
    teachers: Sequence[str],
    collator: Collator,
    device: torch.device,
) -> dict[str, Any]:
    """What the pictures of a report need of one tokenized question (plain values, ready for JSON).

    `evidence[t]` is I_t of eq. 2 after t body tokens, `thinking[t]` whether body token t was a thinking token;
    `affinity` is A of eq. 4.
    """
    batch = to_device(collator([item]), device)
    with evaluation_mode(model):
        result, context = distillation_loss(model, batch, strategy, config)
        assert context.output is not None
        query, key = consensus_vectors(context.output, batch, config)
    ragged = batch["ragged"]
    affinity, _ = question_affinity(query, key, ragged, temperature=config.consensus.temperature)
    statistics, offsets = result.statistics, ragged.host.cu_rows.tolist()
    evidence, thinking = statistics.tokens.evidence.tolist(), ragged.host.thinking.tolist()
    rationales = []
    for s, rationale in enumerate(item["rationales"]):
        rows = slice(offsets[s], offsets[s] + rationale["body_length"] + 1)
        body = rationale["completion_ids"][: rationale["body_length"]]
        rationales.append(
            {
                "teacher": teachers[rationale["teacher"]],
                "tokens": ["", *(tokenizer.decode([token]) for token in body)],
                "evidence": evidence[rows],
                "thinking": thinking[rows],
                "alpha": float(result.alpha[s]),
                "adaptability": float(statistics.adaptability[s]),
                "consensus": float(statistics.consensus[s]),
                "difficulty": float(statistics.difficulty[s]),
                "wrong": bool(rationale["wrong"]),
            }
        )
    return {
        "question_id": item["id"],
        "prompt": tokenizer.decode(item["prompt_ids"]),
        "answer": item["answer"],
        "teachers": [rationale["teacher"] for rationale in rationales],
        "rationales": rationales,
        "affinity": affinity[0].tolist(),
    }
