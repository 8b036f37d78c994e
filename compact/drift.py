"""How far the student has moved: KL(base ‖ student), nats a token, on text that neither was trained on here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compact.config import Recipe
from compact.errors import UserError
from compact.files import write_atomically
from compact.generation import LOGIT_CHUNK, padded
from compact.sources import JsonLines
from compact.statistics import mean, standard_error
from compact.student import head, load_student, unwrap

TEXTS, TOKENS, BATCH = 200, 256, 16
FIELDS = ("text", "prompt", "question", "solution", "explanation", "answer")


def read_texts(path: str | Path, limit: int = TEXTS) -> list[str]:
    """Up to `limit` texts that are not empty: of JSON Lines whatever of :data:`FIELDS` a row has, else every line.

    Raises:
        UserError: no such file, or nothing in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"evaluation.held_text: there is no file {path}")
    texts: list[str] = []
    try:
        if path.suffix in (".jsonl", ".ndjson", ".json"):
            source = JsonLines(path)
            texts = [*islice(filter(str.strip, _row_texts(source)), limit)]
        else:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            texts = [line for line in lines if line.strip()][:limit]
    except UserError as error:
        raise UserError(f"evaluation.held_text: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"evaluation.held_text: {path}: not UTF-8 text ({error.reason}); convert it") from None
    if not texts:
        raise UserError(f"evaluation.held_text: {path} holds no text; rows need one of {', '.join(FIELDS)}")
    return texts


def _row_texts(source: JsonLines) -> Iterator[str]:
    for index, row in enumerate(source.rows()):
        if not isinstance(row, dict):
            raise UserError(f"{source.place(index)}: one JSON object a line is needed")
        parts: list[str] = []
        for value in map(row.get, FIELDS):
            messages = value if isinstance(value, list) else []
            contents = [message.get("content") for message in messages if isinstance(message, dict)]
            parts += [part for part in (value, *contents) if isinstance(part, str)]
        yield "\n".join(parts)


@torch.no_grad()
def token_divergences(base: nn.Module, student: nn.Module, ids: list[list[int]]) -> list[float]:
    """Mean over the positions of each text of KL(base ‖ student), in nats; both models on one device."""
    out = [0.0] * len(ids)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))  # so that a batch holds next to no padding
    device = next(student.parameters()).device
    heads = [head(unwrap(model)) for model in (base, student)]
    chunk = max(1, LOGIT_CHUNK // heads[0].weight.shape[0])
    for start in range(0, len(ids), BATCH):
        chosen = order[start : start + BATCH]
        batch = [ids[index] for index in chosen]
        tokens, mask = padded(batch, 0, device, left=False)
        states = [_states(model, tokens, mask) for model in (base, student)]
        rows = mask.bool()
        parts = []
        for hidden in zip(*(state[rows].split(chunk) for state in states)):
            p, q = (layer(state).float().log_softmax(-1) for layer, state in zip(heads, hidden))
            parts.append((p.exp() * (p - q)).sum(-1))
        for index, part in zip(chosen, torch.cat(parts).split([len(row) for row in batch])):
            out[index] = float(part.mean())
    return out


def _states(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    backbone: Any = unwrap(model).base_model
    return backbone(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state


def base_student(recipe: Recipe, like: nn.Module) -> PreTrainedModel:
    """The student as it was before training, on the device and in the dtype of `like`."""
    config = replace(recipe.student, lora=None, compile=False, gradient_checkpointing=False)
    model, _ = load_student(config, seed=recipe.seed, projections=recipe.consensus.affinity == "attention")
    weight = next(like.parameters())
    return nn.Module.to(unwrap(model), device=weight.device, dtype=weight.dtype).eval()


def measure_drift(recipe: Recipe, student: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write RUN/evaluation/after/drift.json: {"kl": {mean, standard_error, n}, "text"}."""
    assert recipe.evaluation.held_text is not None
    texts = read_texts(recipe.evaluation.held_text)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS] for text in texts]
    ids = [row for row in ids if row]
    values = token_divergences(base_student(recipe, student), student, ids)
    content = {
        "kl": {"mean": mean(values), "standard_error": standard_error(values), "n": len(values)},
        "values": values,
        "text": recipe.evaluation.held_text,
    }
    write_atomically(folder / "evaluation" / "after" / "drift.json", json.dumps(content))
