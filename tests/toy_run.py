"""A toy run of the trainer: questions with three teachers, a two-layer student. Also a script, for torchrun.

python -m tests.toy_run '{"OUT": {"batch": 2, …}, …}'     trains each and leaves OUT/parameters.pt, by rank 0
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from compact.config import CompactConfig, from_dict
from compact.data import load_questions
from compact.trainer import CompactTrainer
from tests.processes import leave
from tests.toy import toy_tokenizer


def toy_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Additions; every third question lacks the teacher that errs, so K differs."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        a, b = rng.randint(1, 99), rng.randint(1, 99)
        rationales = [
            {"teacher": "terse", "completion": f"{a}+{b}={a + b}\n#### {a + b}"},
            {
                "teacher": "wordy",
                "completion": f"First take {a}. Then add {b}, so we get {a + b}. The answer is {a + b}.",
            },
        ]
        if number % 3:
            rationales.append({"teacher": "wrong", "completion": f"{a}+{b}={a + b + 7}. The answer is {a + b + 7}."})
        rows.append({"id": f"q{number}", "prompt": f"{a}+{b}?", "answer": str(a + b), "rationales": rationales})
    return rows


def write_rows(path: Path, rows: list[Any]) -> Path:
    """JSON lines; what is text already is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def toy_questions(count: int, seed: int = 0) -> datasets.Dataset:
    return load_questions(datasets.Dataset.from_list(toy_rows(count, seed)))[0]


def toy_model(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 384}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **settings}))


def save_student(folder: Path, **settings: Any) -> Path:
    toy_model(**settings).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def toy_trainer(
    out: str | Path,
    *,
    questions: int = 24,
    batch: int = 4,
    accumulate: int = 1,
    epochs: float = 1,
    method: dict[str, Any] | None = None,
    model: Any = None,
    **training: Any,
) -> CompactTrainer:
    arguments = TrainingArguments(
        **{
            **{
                "output_dir": str(out),
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulate,
            },
            **{"num_train_epochs": epochs, "learning_rate": 1e-2, "report_to": "none", "logging_steps": 1},
            **{"save_strategy": "no", "use_cpu": True, "seed": 0, "disable_tqdm": True, **training},
        }
    )
    return CompactTrainer(
        toy_model() if model is None else model,
        arguments,
        config=toy_config(method),
        train_dataset=toy_questions(questions),
        processing_class=toy_tokenizer(),
    )


def toy_config(method: dict[str, Any] | None = None) -> CompactConfig:
    return from_dict(method or {})


def main(runs: str) -> None:
    for out, options in json.loads(runs).items():
        trainer = toy_trainer(out, **options)
        trainer.train()
        if trainer.is_world_process_zero():
            torch.save(trainer.model.state_dict(), Path(out) / "parameters.pt")
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
