"""Accuracy by greedy generation, the log-probability of gold answers and solutions, and what was forgotten.

python -m compact.evaluate RUN        repeats a finished run's evaluation, says whether it agrees with the stored
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compact.answers import extract, same_answer
from compact.commandline import positive
from compact.config import DataConfig, EvaluationConfig, read_recipe
from compact.errors import UserError
from compact.generation import evaluating, generate_answers, score_answers
from compact.models import context_length
from compact.options import plain
from compact.results import TaskResult, check_run, finished, load_results, store_results
from compact.student import unwrap
from compact.tasks import Task, TaskRow, load_task, task_from_questions
from compact.tokenization import prompt_ids


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    data: DataConfig | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 192,
    progress: bool = True,
) -> dict[str, TaskResult]:
    """Answer every question of every task greedily, and score its gold answer and its reference solution.

    Batched, left-padded, longest prompts first; each answer ends at EOS or after `max_new_tokens`. The model may be
    wrapped (peft, DDP, accelerate); its training mode and generation config are restored. Where torch.distributed is
    initialised, batches are dealt to the ranks and every rank returns the whole result, the same as one process would:
    each batch is made up of the same questions, of all tasks: a token costs a batch about the same, however many
    questions it has.

    Each prediction is {id, prompt, gold, kind, text, strict, flexible, strict_correct, correct, answer_logprob,
    suffix_logprob, solution_logprob, tokens, finished}. Log-probabilities are means per token (natural
    logarithm, fp32): of the answer's own tokens in the suffix ("The answer is …") put right after the prompt, of that
    whole suffix with EOS, and of the reference solution (None where the row has none).

    Args:
        data: how prompts and suffixes are written (`prompt_template`, `suffix`); the training's.
    Raises:
        UserError: no questions, a prompt that leaves no room in the model's context, or a batch that does not fit.
    """
    data = data or DataConfig()
    for task in tasks:
        if not task.rows:
            raise UserError(f"task {task.name}: no questions")
    started = time.perf_counter()
    causal = unwrap(model)
    asked = [row for task in tasks for row in task.rows]
    prompts = [prompt_ids(tokenizer, row.prompt, data.prompt_template) for row in asked]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    batches = _batches(order, prompts, batch_size, context_length(causal) - max_new_tokens)[rank::world]
    done: dict[int, dict[str, Any]] = {}
    names, hidden = ", ".join(task.name for task in tasks), not progress or rank > 0
    with evaluating(causal), tqdm(total=sum(map(len, batches)), desc=names, unit="q", disable=hidden) as bar:
        for batch in batches:
            rows, ids = [asked[i] for i in batch], [prompts[i] for i in batch]
            try:
                answers = generate_answers(causal, tokenizer, rows, ids, max_new_tokens, data)
                scores = score_answers(causal, tokenizer, rows, ids, data)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"evaluation ({names}): {len(batch)} questions at once do not fit in the device's memory; "
                    f"set evaluation.batch_size below {batch_size}"
                ) from None
            for i, row, answer, score in zip(batch, rows, answers, scores):
                done[i] = _prediction(row, answer, score)
            bar.update(len(batch))
    if world > 1:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, done)
        done = {i: row for part in parts for i, row in part.items()}
    seconds, results, first = time.perf_counter() - started, {}, 0
    for task in tasks:  # its seconds: its share of the questions
        last = first + len(task.rows)
        predictions = [done[i] for i in range(first, last)]
        share = seconds * len(task.rows) / len(asked)
        results[task.name] = TaskResult(task.name, task.split, task.kind, predictions, share)
        first = last
    return results


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    run: str | Path,
    when: str,
    *,
    data: DataConfig | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 192,
    progress: bool = True,
) -> dict[str, TaskResult]:
    """:func:`evaluate`, and store predictions and summary under RUN/evaluation/{when}/ (rank 0 writes)."""
    data = data or DataConfig()
    room = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    results = evaluate(model, tokenizer, tasks, data=data, progress=progress, **room)
    if not _distributed() or dist.get_rank() == 0:
        store_results(results, {**room, "prompt_template": data.prompt_template, "suffix": data.suffix}, run, when)
    return results


def _batches(order: Sequence[int], prompts: Sequence[Sequence[int]], size: int, most: int) -> list[list[int]]:
    """Prompts, longest first, in batches. Those of more than `most` tokens leave less than the whole room for an
    answer: they go with their equals, so that no other's answer is cut short for them."""
    groups = groupby(order, key=lambda i: max(len(prompts[i]), most))
    parts = [list(group) for _, group in groups]
    return [part[start : start + size] for part in parts for start in range(0, len(part), size)]


def _prediction(row: TaskRow, answer: tuple[str, int, bool], scores: dict[str, float | None]) -> dict[str, Any]:
    text, tokens, finished = answer
    strict, flexible = extract(text, row.kind, strict=True), extract(text, row.kind, strict=False)
    return {
        **{"id": row.id, "prompt": row.prompt, "gold": row.answer, "kind": row.kind, "options": row.options},
        **{"text": text, "strict": strict, "flexible": flexible},
        "strict_correct": strict is not None and same_answer(row.answer, strict, row.kind),
        "correct": flexible is not None and same_answer(row.answer, flexible, row.kind),
        **{name: None if value is None else round(value, 6) for name, value in scores.items()},
        **{"tokens": tokens, "finished": finished, "solution": row.solution},
    }


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def recipe_tasks(config: EvaluationConfig, held_out: Iterable[Mapping[str, Any]] | None, seed: int) -> list[Task]:
    """The tasks of a recipe: the held-out questions (task "held_out", in distribution), then `tasks`, `forgetting`."""
    tasks = []
    seed = seed if config.seed is None else config.seed
    if held_out is not None:
        tasks.append(
            task_from_questions("held_out", held_out, limit=config.limit, seed=seed, reference=config.reference)
        )
    for split, files in (("ood", config.tasks), ("forgetting", config.forgetting)):
        for name, path in files.items():
            tasks.append(load_task(name, path, split=split, limit=config.limit, seed=seed, instruct=config.instruct))
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"evaluation: two tasks are called {name!r}; names must differ")
    return tasks


def tasks_of_run(run: Path) -> tuple[list[Task], dict[str, Any], str]:
    """The tasks a run was evaluated on, its settings, and where they were found: after, else before, training.

    Raises:
        UserError: not a run's folder, or nothing was evaluated.
    """
    for when in ("after", "before"):
        results, settings = load_results(run, when)
        if results:
            return [_task_of_result(result) for result in results.values()], settings, when
    raise UserError(f"{run}/evaluation holds no results to repeat; let python -m compact.train finish first")


def _task_of_result(result: TaskResult) -> Task:
    fields = TaskRow.__dataclass_fields__
    rows = ({**row, "answer": row["gold"]} for row in result.predictions)
    return Task(result.name, tuple(TaskRow(**{k: row[k] for k in fields}) for row in rows), result.split)


def load_run(run: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The student of a finished run, on the GPU where there is one.

    Raises:
        UserError: saying what is missing and how to get it.
    """
    check_run(run)
    if not (run / "student" / "config.json").is_file():
        started = any((run / "checkpoints").glob("checkpoint-*"))
        state = (
            "training has not finished (there are checkpoints, no student)" if started else "there is no student yet"
        )
        if finished(run):
            kept = "; keep_students: true in a grid keeps it" if (run / "cell.json").exists() else ""
            raise UserError(f"{run} is finished and its student is no longer there{kept}")
        raise UserError(f"{run}: {state}; run the training's command again, it goes on where it stopped")
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    student = plain(read_recipe(str(run / "recipe.yaml"))).get("student") or {}
    trusted = bool(student.get("trust_remote_code"))
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            run / "student", dtype="auto", trust_remote_code=trusted
        )
        tokenizer = AutoTokenizer.from_pretrained(run / "student", trust_remote_code=trusted)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{run / 'student'} cannot be loaded: {error}") from error
    model.to(device)  # type: ignore[arg-type]
    return model, tokenizer


def agreement(stored: TaskResult, again: TaskResult) -> str:
    """One line: does a repeated evaluation agree with the stored one?"""
    pairs = list(zip(stored.predictions, again.predictions))
    texts = sum(a["text"] == b["text"] for a, b in pairs)
    verdicts = sum(a["correct"] == b["correct"] for a, b in pairs)
    if texts == len(pairs):
        return f"agrees with the stored result: all {len(pairs)} answers are the same"
    if verdicts == len(pairs):
        return f"agrees with the stored result in every verdict; {len(pairs) - texts} of {len(pairs)} texts differ"
    return (
        f"differs from the stored result (accuracy {stored.accuracy:.3f}) in {len(pairs) - verdicts} of {len(pairs)} "
        "verdicts; another device, dtype or an adapter merged in bfloat16 may round differently"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compact.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--split", choices=("id", "ood", "forgetting"), help="only the tasks of this split")
    parser.add_argument("--batch_size", type=positive, help="default: as stored")
    parser.add_argument("--max_new_tokens", type=positive, help="default: as stored")
    options = parser.parse_args(arguments)
    own_group = "WORLD_SIZE" in os.environ and not _distributed()
    if own_group:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        _repeat(options)
    except UserError as error:
        print(f"compact.evaluate: {error}", file=sys.stderr)
        return 2
    finally:
        if own_group:
            dist.destroy_process_group()
    return 0


def _repeat(options: argparse.Namespace) -> None:
    model, tokenizer = load_run(options.run)
    tasks, settings, when = tasks_of_run(options.run)
    tasks = [task for task in tasks if options.split in (None, task.split)]
    if not tasks:
        raise UserError(f"{options.run}: no task of split {options.split} was evaluated")
    data = DataConfig(prompt_template=settings["prompt_template"], suffix=settings["suffix"])
    # A first result goes where training would have put it; one of a part, or in other words than stored, and a
    # repeated one go beside it, which stays.
    whole = options.split is None and options.max_new_tokens in (None, settings["max_new_tokens"])
    to = "after" if when == "before" and whole else "repeated"
    results = evaluate_tasks(
        model,
        tokenizer,
        tasks,
        options.run,
        to,
        data=data,
        batch_size=options.batch_size or settings["batch_size"],
        max_new_tokens=options.max_new_tokens or settings["max_new_tokens"],
    )
    if _distributed() and dist.get_rank() > 0:
        return
    stored = load_results(options.run, "after")[0] if when == "after" else {}
    for name, result in results.items():
        print(describe(result))
        print(
            f"  {agreement(stored[name], result)}"
            if name in stored
            else f"  stored in evaluation/{to}; there was no result to compare with"
        )


def describe(result: TaskResult) -> str:
    """One line for a person."""
    s = result.summary()
    line = (
        f"{result.name} ({result.split}, n = {s['n']}): accuracy {100 * s['accuracy']:.1f} ± "
        f"{100 * s['standard_error']:.1f}% (strict {100 * s['strict']['accuracy']:.1f}%), "
        f"log p of the answer {s['answer_logprob']['mean']:.3f} a token"
    )
    if s["solution_logprob"]["n"]:
        line += f", of the solution {s['solution_logprob']['mean']:.3f}"
    return line


if __name__ == "__main__":
    sys.exit(main())
