"""python -m compact.train [RECIPE.yaml] [--key value …]: read the recipe, build the parts, run, evaluate, report.

Without arguments: the embedded default. The same command goes on with an interrupted run, and runs under torchrun.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from compact.analyze import versions, write_report
from compact.collate import Collator
from compact.config import Recipe, load_recipe, read_recipe, save_recipe, to_dict
from compact.data import load_questions, question_text, split, tokenize_questions
from compact.data_report import DataReport
from compact.embed import embed_rationales
from compact.errors import UserError
from compact.evaluate import evaluate_tasks, recipe_tasks
from compact.options import plain
from compact.results import write_atomically
from compact.strategies import Strategy, build_strategy
from compact.student import compute_dtype, load_student, merged, prepare
from compact.trace import trace_question
from compact.trainer import CompactTrainer, check_length

logger = logging.getLogger("compact")

# What a recipe's `training` section need not say. Everything else is transformers' own default.
TRAINING_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 3,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # a share of all steps
    "logging_steps": 10,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
    "ddp_find_unused_parameters": False,  # every parameter that trains is used in every step
    "use_cpu": not torch.accelerator.is_available(),
}
# Fields that transformers does not check before training begins.
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "dataloader_num_workers": 0,
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(recipe: Recipe) -> dict[str, Any]:
    """One whole run in the folder `recipe.run`; goes on where an interrupted one stopped.

    Returns:
        The content of report.json.

    Raises:
        UserError: the recipe, the data or the folder cannot be used; says what, where and the way out.
    """
    folder = Path(recipe.run)
    recipe.validate()
    arguments = training_arguments(recipe)  # before PartialState: it knows backend, timeout and engine
    state = PartialState()
    with _main_process_first():
        if state.is_main_process:
            claim(folder, recipe)
    if (folder / "report.json").exists():
        if state.is_main_process:
            print(f"{folder} holds this very run, finished: its report is {folder / 'report.md'}")
        return json.loads((folder / "report.json").read_text())
    phases = _Phases(folder)
    projections = recipe.consensus.affinity == "attention"

    set_seed(recipe.seed)
    with phases("prepare"), _main_process_first():
        model, tokenizer = load_student(recipe.student, seed=recipe.seed, projections=projections)
        check_length(model, recipe.data, recipe.student.model)
        train_set, held_out, report = _data(recipe, tokenizer, folder)
        strategy = build_strategy(recipe, report.teachers)
        train_set = _embedded(_restrict(train_set, strategy, report), tokenizer, recipe, folder)
        tasks = recipe_tasks(recipe.evaluation, held_out, recipe.seed)
    if state.is_main_process:
        write_atomically(folder / "data_report.json", json.dumps(report.to_dict(), indent=1))
        print(report.summary(), flush=True)

    collator = Collator(tokenizer=tokenizer, ifd=recipe.difficulty.kind == "ifd")
    try:
        trainer = CompactTrainer(
            model,
            arguments,
            config=recipe,
            train_dataset=train_set,
            processing_class=tokenizer,
            teachers=report.teachers,
            data_collator=collator,
            metrics_path=folder / "metrics.jsonl",
        )
    except RuntimeError as error:
        if "to be installed" not in str(error):
            raise
        raise UserError(f"training.report_to: {error}") from error
    example = _example(train_set, held_out, tokenizer, recipe, report, folder)
    device, dtype = trainer.args.device, compute_dtype(recipe.student)

    def look(when: str, student: nn.Module) -> None:
        if (folder / "analysis" / f"{when}.json").exists():
            return
        with phases(f"evaluate_{when}"):
            evaluate_tasks(
                student,
                tokenizer,
                tasks,
                folder,
                when,
                data=recipe.data,
                batch_size=recipe.evaluation.batch_size,
                max_new_tokens=recipe.evaluation.max_new_tokens,
            )
            if state.is_main_process:
                trace = trace_question(
                    student, tokenizer, example, trainer.strategy, recipe, report.teachers, collator, device
                )
                write_atomically(folder / "analysis" / f"{when}.json", json.dumps(trace))
            state.wait_for_everyone()

    untrained = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    with untrained, torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        look("before", model.to(device))
    with phases("train"):
        trainer.train(resume_from_checkpoint=get_last_checkpoint(trainer.args.output_dir))
    with phases("save"):
        student = merged(trainer.model_wrapped)  # every rank: it gathers what is sharded
        student.to(dtype)  # type: ignore[arg-type]  # transformers' decorator hides Module.to's signature
        if state.is_main_process:
            save_student(student, tokenizer, folder)
    trainer.accelerator.free_memory()
    student.to(device)  # type: ignore[arg-type]
    look("after", prepare(student, projections=projections))
    if state.is_main_process:
        write_report(folder)
    state.wait_for_everyone()
    return json.loads((folder / "report.json").read_text())


@contextmanager
def _main_process_first() -> Iterator[None]:
    """The block runs in the main process, then in the others; where it fails in the first, the others end quietly.

    (accelerate's own leaves them waiting, for a traceback about a lost connection.)
    """
    state, failed = PartialState(), [False]
    if not state.is_main_process:
        broadcast_object_list(failed)
        if failed[0]:
            raise SystemExit(2)
    try:
        yield
    except BaseException:
        failed = [True]
        raise
    finally:
        if state.is_main_process:
            broadcast_object_list(failed)
    state.wait_for_everyone()


def claim(folder: Path, recipe: Recipe) -> None:
    """Make `folder` this recipe's run, or find that it is already.

    A run that stopped before its first evaluation has nothing to lose: it takes the recipe as it is now.

    Raises:
        UserError: the folder holds another run, or something that is no run, or cannot be written.
    """
    stored = folder / "recipe.yaml"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and a run needs a folder: choose another one with --run")
    begun = any((folder / name).exists() for name in ("evaluation", "metrics.jsonl", "student", "report.json"))
    if stored.exists() and begun:
        theirs, ours = _leaves(plain(read_recipe(str(stored)))), _leaves(to_dict(recipe))
        differing = [key for key in ours | theirs if key != "run" and theirs.get(key) != ours.get(key)]
        if differing:
            shown = "; ".join(f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here" for key in differing)
            raise UserError(
                f"{folder} holds another run: {shown}. Choose another folder with --run, or remove that one "
                "(the same recipe would go on with it)"
            )
        return
    if not stored.exists() and folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run: choose another folder with --run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, stored)
    except OSError as error:
        raise UserError(f"the run's folder {folder} cannot be written: {error}") from error


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """transformers' arguments of a recipe: its `training` section over this project's few defaults.

    Raises:
        UserError: a value out of range, or one that transformers refuses.
    """
    for name, least in AT_LEAST.items():
        value = recipe.training.get(name, least)
        if isinstance(value, (int, float)) and value < least:
            raise UserError(f"training.{name}: {value} is out of range: at least {least}")
    epochs, steps = recipe.training.get("num_train_epochs", 1), recipe.training.get("max_steps", -1)
    if epochs <= 0 and steps <= 0:  # type: ignore[operator]
        raise UserError(f"training.num_train_epochs: {epochs} trains nothing: above 0 is needed, or max_steps")
    given: dict[str, Any] = {**TRAINING_DEFAULTS, "bf16": compute_dtype(recipe.student) is torch.bfloat16}
    given |= {**recipe.training, "output_dir": str(Path(recipe.run) / "checkpoints"), "seed": recipe.seed}
    try:
        arguments = TrainingArguments(**given)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training: transformers refuses it: {str(error).strip().removeprefix('--')}") from error
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        raise UserError(f"training.optim: {error}") from error
    except ValueError:  # some want to see the model: the Trainer asks them again
        pass
    return arguments


def save_student(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """RUN/student: plain weights, tokenizer and generation config; written aside, then renamed."""
    aside, final = folder / ".student.writing", folder / "student"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        student.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"the student could not be written to {final}: {error}. Make room and run the same command again: "
            "training is done and its last checkpoint is whole."
        ) from error
    shutil.rmtree(final, ignore_errors=True)
    aside.replace(final)


def _data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[Dataset, Dataset, DataReport]:
    """Training questions in tokens, held-out questions in text, and what became of every row."""
    if recipe.data.train is None:
        raise UserError("data.train: which questions? A .jsonl or .parquet file, a saved dataset, or a hub id")
    cache = folder / "cache"
    questions, read = load_questions(recipe.data.train, answer_kind=recipe.data.answer_kind, cache_dir=cache)
    if recipe.data.held_out is None:
        train_questions, held_out = split(questions, recipe.data.holdout, recipe.seed)
        if not len(held_out):
            raise UserError(
                f"{recipe.data.train}: one question alone, and none to hold out for evaluation: at least two "
                "different ones are needed"
            )
    else:
        train_questions = questions
        held_out, _ = load_questions(recipe.data.held_out, answer_kind=recipe.data.answer_kind, cache_dir=cache)
        trained_on = {question_text(row) for row in held_out} & {question_text(row) for row in train_questions}
        if trained_on:
            raise UserError(
                f"{recipe.data.held_out}: {len(trained_on)} of its questions are in {recipe.data.train} too, such as "
                f"{min(trained_on)!r}: what is held out must not be trained on"
            )
    train_set, tokenized = tokenize_questions(
        train_questions, tokenizer, recipe.data, teachers=read.teachers, cache_dir=cache
    )
    report = read.then(tokenized)
    report.questions["held_out"] = len(held_out)
    return train_set, held_out, report


def _restrict(dataset: Dataset, strategy: Strategy, report: DataReport) -> Dataset:
    """Only the rationales that the strategy trains on; a question left without any is dropped and counted."""
    used = [strategy.uses_teacher(index) for index in range(len(report.teachers))]
    if all(used):
        return dataset

    def keep(item: dict[str, Any]) -> dict[str, Any]:
        return {"rationales": [rationale for rationale in item["rationales"] if used[rationale["teacher"]]]}

    kept = dataset.map(keep, keep_in_memory=False).filter(lambda item: len(item["rationales"]) > 0)
    dropped = len(dataset) - len(kept)
    if dropped:
        report.questions["used"] -= dropped
        for _ in range(dropped):
            report.refuse_question("strategy", "no rationale of a teacher that the strategy trains on")
    report.rationales["used"] = sum(len(rationales) for rationales in kept["rationales"])
    if not len(kept):
        raise UserError("no question has a rationale of a teacher that the strategy trains on")
    return kept


def _embedded(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, folder: Path) -> Dataset:
    """With an embedding for every rationale, where the consensus graph is drawn from embeddings."""
    if recipe.consensus.affinity != "sentence":
        return dataset
    assert recipe.consensus.encoder is not None  # Recipe.validate sees to it
    return embed_rationales(
        dataset, tokenizer, recipe.consensus.encoder, cache_dir=folder / "cache", device=PartialState().device
    )


def _example(
    train_set: Dataset,
    held_out: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    report: DataReport,
    folder: Path,
) -> dict[str, Any]:
    """The question that the report's pictures show: a held-out one with every teacher, where there is one."""
    few = held_out.select(range(min(len(held_out), 50)))
    try:
        candidates, _ = tokenize_questions(
            few, tokenizer, recipe.data, teachers=report.teachers, cache_dir=folder / "cache"
        )
    except UserError:  # not one of the few is usable
        return train_set[0]
    return max(_embedded(candidates, tokenizer, recipe, folder), key=lambda item: len(item["rationales"]))


class _Phases:
    """Seconds of each phase of a run, kept in RUN/timing.json; a phase that is resumed adds up."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "timing.json"
        self.seconds = json.loads(self.path.read_text())["seconds"] if self.path.exists() else {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except BaseException:
            with suppress(UserError):  # what stopped the phase is what matters
                self._add(name, started)
            raise
        self._add(name, started)

    def _add(self, name: str, started: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        if PartialState().is_main_process:
            write_atomically(self.path, json.dumps({"seconds": self.seconds, "versions": versions()}))


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # The names that transformers 5.17 knows too: peft asks by the first, this project by the second.
    old = "`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated"
    warnings.filterwarnings("ignore", message=old, category=FutureWarning)
    try:
        recipe = load_recipe(sys.argv[1:] if argv is None else argv)
        run(recipe)
    except UserError as error:
        print(f"compact.train: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"compact.train: {error.strerror}{where}: make room and run the same command again, it goes on from the "
            "last checkpoint",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("compact.train: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if PartialState().is_main_process:
        print(f"report: {Path(recipe.run) / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
