"""Sentence embeddings of rationales: for the affinity of the consensus graph (eq. 4), or as MIND's features."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compact.config import CompactConfig
from compact.errors import UserError
from compact.files import digest
from compact.generation import padded
from compact.sources import cache_folder, dataset_digest, write_arrow
from compact.tokenization import TOKENS

logger = logging.getLogger(__name__)

_FORMAT = 1  # raise it when the columns or their meaning change, so that no old cache is read
_RATIONALE = TOKENS.field("rationales").type.value_type
_EMBEDDED = pa.struct([*_RATIONALE, pa.field("embedding", pa.list_(pa.float32()))])
EMBEDDINGS = TOKENS.set(TOKENS.get_field_index("rationales"), pa.field("rationales", pa.list_(_EMBEDDED)))


def with_embeddings(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    config: CompactConfig,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
) -> datasets.Dataset:
    """The tokenized questions as the method needs them: embedded, if the consensus graph or MIND reads embeddings.

    Raises:
        UserError: there are no embeddings, and nothing to make them with.
    """
    if not config.reads_embeddings or not len(dataset) or "embedding" in dataset[0]["rationales"][0]:
        return dataset
    encoder = config.consensus.encoder
    if encoder is None or tokenizer is None:
        key = "consensus.affinity" if config.consensus.affinity == "sentence" else "mind.features"
        raise UserError(
            f"{key} is sentence, and the dataset's rationales have no `embedding`: set consensus.encoder "
            "to a sentence encoder (a folder or hub id) and pass processing_class, the student's tokenizer"
        )
    return embed_rationales(
        dataset, tokenizer, encoder, questions=config.mind_reads_embeddings, cache_dir=cache_dir, device=device
    )


def embed_rationales(
    dataset: datasets.Dataset,
    tokenizer: Any,
    encoder: str,
    *,
    questions: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> datasets.Dataset:
    """Add an `embedding` (E floats, fp32, of length 1) to every rationale of a tokenized dataset.

    It is the mean of the encoder's last hidden states over the tokens of the rationale's body, as text: what a
    question's rationales have in common, its prompt and suffix, is left out. Of a text longer than the encoder's
    context the beginning is read, and a warning says how many there are.

    Args:
        dataset: what :func:`compact.data.tokenize_questions` gives.
        tokenizer: the student's, which made those tokens.
        encoder: a folder or hub id of a sentence encoder with weights in safetensors.
        questions: embed the prompt before the body too, as MIND does (method §4).
        cache_dir: where the Arrow file goes, named by everything it depends on; default: a folder that is removed
            when the process ends.
        device: where the encoder runs.
        batch_size: texts encoded at once.

    Raises:
        UserError: `encoder` is not a sentence encoder that transformers can load, with the reason.
    """
    folder = cache_folder(cache_dir)
    model, reader = load_encoder(encoder)
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    parts = [_FORMAT, dataset_digest(dataset), vocabulary, _digest(model, reader), questions]
    key = digest(parts)
    target = folder / f"embeddings-{key}.arrow"
    if not target.exists():
        embed = _Embedding(model.to(device), reader, batch_size)  # type: ignore[arg-type]
        write_arrow(target, EMBEDDINGS, embed.batches(dataset, tokenizer, questions))
        if embed.cut:
            logger.warning(
                "%s reads %d tokens at once: of %d of %d rationales only the beginning is embedded",
                encoder,
                embed.context,
                embed.cut,
                embed.seen,
            )
    return datasets.Dataset.from_file(str(target))


def load_encoder(encoder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sentence encoder in fp32 on the CPU, and its tokenizer.

    Raises:
        UserError: nothing loadable, weights that are missing or not in safetensors, or a model that is no encoder.
    """
    name = f"consensus.encoder={encoder}"
    way_out = "Give a folder or hub id of a BERT-like sentence encoder, or set consensus.affinity to cosine."
    try:
        model, loading = AutoModel.from_pretrained(
            encoder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        reader = AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: not an encoder that transformers can load: {first} {way_out}") from error
    missing = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
    if missing:
        raise UserError(f"{name}: its weights lack {len(missing)} of the encoder's, such as {missing[0]}. {way_out}")
    if model.config.is_encoder_decoder:
        raise UserError(f"{name}: {type(model).__name__} has an encoder and a decoder. {way_out}")
    model.eval()
    if _reads_left_to_right(model):
        raise UserError(f"{name}: {type(model).__name__} reads from left to right, as a student does. {way_out}")
    return model, reader


@torch.no_grad()
def _reads_left_to_right(model: PreTrainedModel) -> bool:
    """Whether a later token changes nothing of what an earlier one becomes."""
    texts = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[3, 4, 5, 7]])
    try:
        first, second = (
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0, 0] for ids in texts
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"consensus.encoder: {type(model).__name__} is not an encoder of text ({str(error).strip()})"
        ) from error
    return torch.equal(first, second)


class _Embedding:
    """Runs the encoder over a dataset, and counts what it could not read whole."""

    def __init__(self, model: nn.Module, reader: PreTrainedTokenizerBase, batch_size: int):
        self.model, self.reader, self.batch_size = model, reader, batch_size
        positions = getattr(model.config, "max_position_embeddings", None)
        table = next((part for name, part in model.named_modules() if name.endswith("position_embeddings")), None)
        if positions and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            positions -= table.padding_idx + 1  # RoBERTa counts its places from there
        self.context = min(reader.model_max_length, positions or 1 << 20)
        self.cut = self.seen = 0

    def batches(
        self, dataset: datasets.Dataset, tokenizer: Any, questions: bool, size: int = 128
    ) -> Iterator[pa.RecordBatch]:
        with tqdm(total=len(dataset), desc="Embedding rationales", unit=" questions", disable=None) as progress:
            for start in range(0, len(dataset), size):
                items = dataset.select(range(start, min(start + size, len(dataset)))).to_list()
                rationales = [rationale for item in items for rationale in item["rationales"]]
                bodies = [rationale["completion_ids"][: rationale["body_length"]] for rationale in rationales]
                texts = [text.strip() for text in tokenizer.batch_decode(bodies, skip_special_tokens=True)]
                if questions:
                    prompts = tokenizer.batch_decode([item["prompt_ids"] for item in items], skip_special_tokens=True)
                    owners = [prompt.strip() for item, prompt in zip(items, prompts) for _ in item["rationales"]]
                    texts = [f"{prompt}\n{text}" for prompt, text in zip(owners, texts)]
                for rationale, embedding in zip(rationales, self(texts)):
                    rationale["embedding"] = embedding
                progress.update(len(items))
                yield pa.RecordBatch.from_pylist(items, schema=EMBEDDINGS)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> list[list[float]]:
        """(E,) floats of every text; equal texts are read once, so that theirs are equal to the last bit."""
        unique = list(dict.fromkeys(texts))
        coded = self.reader(unique, truncation=True, max_length=self.context + 1)["input_ids"]
        cut = {text for text, ids in zip(unique, coded) if len(ids) > self.context}
        self.seen, self.cut = self.seen + len(texts), self.cut + sum(text in cut for text in texts)
        if cut:
            coded = self.reader(unique, truncation=True, max_length=self.context)["input_ids"]
        pad = self.reader.pad_token_id or 0
        coded = [ids or [pad] for ids in coded]  # an empty body, where the encoder adds nothing of its own
        order = sorted(range(len(unique)), key=lambda i: len(coded[i]))
        embeddings: dict[str, list[float]] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            values = self._pooled([coded[i] for i in chosen]).tolist()
            embeddings |= {unique[i]: value for i, value in zip(chosen, values)}
        return [embeddings[text] for text in texts]

    def _pooled(self, sequences: list[list[int]]) -> Tensor:
        """(B, E) fp32, of length 1: the mean state over each sequence's own tokens."""
        device = next(self.model.parameters()).device
        ids, mask = padded(sequences, self.reader.pad_token_id or 0, device, left=False)  # (B, L)
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (B, L, E)
        weights = mask[..., None].float()
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def _digest(model: PreTrainedModel, reader: PreTrainedTokenizerBase) -> str:
    """Of an encoder's weights and vocabulary: a folder may be written anew, a hub id may move."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(json.dumps(sorted(reader.get_vocab().items())).encode())
    digest.update(str(reader.model_max_length).encode())
    return digest.hexdigest()
