"""python -m compact.train [RECIPE.yaml] [--key value …]: read the recipe, build the parts, run, evaluate, report.

Without arguments: the embedded default. The same command goes on with an interrupted run, and runs under torchrun.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import pickle
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from compact import demo
from compact.analyze import write_report
from compact.collate import Collator
from compact.config import Recipe, StudentConfig, load_recipe
from compact.demo.arms import run_arms
from compact.drift import measure_drift, read_texts
from compact.errors import UserError
from compact.evaluate import evaluate_tasks, recipe_tasks
from compact.files import write_atomically
from compact.results import finished, load_results
from compact.run_folder import Phases, claim, locked, save_student
from compact.student import check_float32_head, compute_dtype, load_student, merged, prepare
from compact.trace import trace_question
from compact.trainer import CompactTrainer, check_length
from compact.training_arguments import training_arguments
from compact.training_data import check_inputs, example_question, training_data

logger = logging.getLogger("compact")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What reading a damaged checkpoint raises.
UNREADABLE = (EOFError, OSError, SafetensorError, pickle.UnpicklingError, json.JSONDecodeError, RuntimeError)
# The Trainer's methods that read one: elsewhere the same errors are of a tracker that cannot be reached, or a disk.
READERS = {
    "_load_from_checkpoint",
    "load_from_json",
    "_load_optimizer_and_scheduler",
    "_load_scaler",
    "_load_rng_state",
}


def run(recipe: Recipe, *, only_before: bool = False) -> dict[str, Any]:
    """One whole run in the folder `recipe.run`; goes on where an interrupted one stopped.

    Args:
        only_before: stop where training would begin, after the evaluation of the student as it is.

    Returns:
        The content of report.json; nothing with `only_before`.

    Raises:
        UserError: the recipe, the data or the folder cannot be used; says what, where and the way out.
    """
    folder = Path(recipe.run)
    recipe.validate()
    if recipe.head_dtype == "float32" and recipe.student.lora is not None:  # all of a student trains in float32
        check_float32_head(compute_dtype(recipe.student))
    arguments = training_arguments(recipe)  # before PartialState: it knows backend, timeout and engine
    with ExitStack() as held:
        with _main_process_first():
            if PartialState().is_main_process:
                stored = (folder / "recipe.yaml").exists()
                if stored and not finished(folder):  # before claim() touches a run under way
                    held.enter_context(locked(folder))
                claim(folder, recipe)
                if not stored:
                    held.enter_context(locked(folder))
                check_inputs(folder, recipe)
        return _run(recipe, arguments, folder, only_before)


def _run(recipe: Recipe, arguments: TrainingArguments, folder: Path, only_before: bool) -> dict[str, Any]:
    state = PartialState()
    if finished(folder):
        if state.is_main_process:
            print(f"{folder} holds this very run, finished: its report is {folder / 'report.md'}")
        try:
            return json.loads((folder / "report.json").read_text())
        except ValueError:
            repair = f"python -m compact.analyze {folder}"
            raise UserError(f"{folder / 'report.json'} is damaged: `{repair}` writes it again") from None
    phases = Phases(folder)
    projections = recipe.consensus.affinity == "attention"

    if demo.is_embedded(recipe):
        with phases("demo"), _main_process_first():
            recipe = demo.build(recipe)
    set_seed(recipe.seed)
    with phases("prepare"), _main_process_first():
        model, tokenizer = load_student(recipe.student, seed=recipe.seed, projections=projections)
        check_length(model, recipe.data, recipe.student.model)
        train_set, held_out, report = training_data(recipe, tokenizer, folder)
        tasks = recipe_tasks(recipe.evaluation, held_out, recipe.seed)
        if recipe.evaluation.held_text is not None:  # what is wrong with it is said before training, not after
            read_texts(recipe.evaluation.held_text)
    if state.is_main_process:
        write_atomically(folder / "data_report.json", json.dumps(report.to_dict(), indent=1))
        print(report.summary(file=folder / "data_report.json"))
        print(_what_trains(model, recipe.student), flush=True)

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
    with _main_process_first():  # the others find its tokens in the run's cache, and write none to the same files
        example = example_question(train_set, held_out, tokenizer, recipe, report, folder)
    device, dtype = trainer.args.device, compute_dtype(recipe.student)

    def look(when: str, student: nn.Module) -> None:
        if (folder / "analysis" / f"{when}.json").exists():
            return
        with phases(f"evaluate_{when}"):
            if not load_results(folder, when)[0]:
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
    if only_before:
        return {}
    with phases("train"):
        _train(trainer)
    with phases("save"):
        student = merged(trainer.model_wrapped)  # every rank: it gathers what is sharded
        student.to(dtype)  # type: ignore[arg-type]  # transformers' decorator hides Module.to's signature
        if state.is_main_process:
            save_student(student, tokenizer, folder)
    trainer.accelerator.free_memory()
    student.to(device)  # type: ignore[arg-type]
    look("after", prepare(student, projections=projections))
    if state.is_main_process:
        if recipe.evaluation.held_text is not None:
            with phases("drift"):
                measure_drift(recipe, student, tokenizer, folder)
        write_report(folder, over=True)
    state.wait_for_everyone()
    return json.loads((folder / "report.json").read_text())


def _what_trains(model: nn.Module, config: StudentConfig) -> str:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained, total = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
    how = "full fine-tuning" if config.lora is None else f"LoRA of rank {config.lora.rank}"
    return f"{trained:,} of {total:,} parameters train: {how}"


def _train(trainer: CompactTrainer) -> None:
    """From the last checkpoint on, where there is one.

    Raises:
        UserError: that checkpoint cannot be read.
    """
    checkpoint = get_last_checkpoint(str(trainer.args.output_dir))
    if checkpoint is None:
        trainer.train()
        return
    step = int(checkpoint.rpartition("-")[2])
    if PartialState().is_main_process:
        print(f"going on from step {step}", flush=True)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except UNREADABLE as error:
        another = isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error)
        places = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
        if another or getattr(error, "errno", None) in FULL or not places & READERS:
            raise
        raise UserError(
            f"the last checkpoint, {checkpoint}, cannot be read ({type(error).__name__}: {error}): remove it and run "
            "the same command again, which goes on from the one before, or from the start where there is none"
        ) from error


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


def tell(report: dict[str, Any]) -> None:
    """The few numbers of a report that a person wants at the end of a run."""
    if not PartialState().is_main_process:
        return
    for name, task in report["accuracy"].items():
        if task["before"] is not None and task["after"] is not None:
            print(f"{name}: {100 * task['before']:.1f}% → {100 * task['after']:.1f}% right (n = {task['n']})")
    alpha = [f"{name} {value:.2f}" for name, value in report["alpha_mean"].items() if value is not None]
    print(f"weights in the last quarter: {', '.join(alpha)}")


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # The names that transformers 5.17 knows too: peft asks by the first, this project by the second.
    old = "`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated"
    warnings.filterwarnings("ignore", message=old, category=FutureWarning)
    recipe = None
    try:
        recipe = load_recipe(sys.argv[1:] if argv is None else argv)
        if recipe.data.train is None and recipe.student.model == "demo":
            run_arms(recipe, run)
        else:
            tell(run(recipe))
    except UserError as error:
        print(f"\ncompact.train: {error}", file=sys.stderr)  # a line of its own, below a progress bar
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
        begun = recipe is not None and any((Path(recipe.run) / "checkpoints").glob("checkpoint-*"))
        where = "from the last checkpoint" if begun else "with training from its start: there is no checkpoint yet"
        print(f"compact.train: stopped; the same command goes on {where}", file=sys.stderr)
        return 130
    if PartialState().is_main_process:
        print(f"report: {Path(recipe.run) / 'report.md'}")
    return 0


if __name__ == "__main__":
    code = main()
    if code == 0:
        # torch leaves this to the program: a thread of gloo's that outlives the interpreter can abort the process.
        gc.collect()  # a wrapped model holds the group too, in a cycle
        PartialState().destroy_process_group()
    sys.exit(code)
