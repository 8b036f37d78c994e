"""CompactTrainer: transformers' Trainer with COMPACT's batches, loss, step normalisation and logs."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from compact.adapters.trainer import DistillationMixin, refuse_arguments
from compact.checkpoints import WholeCheckpoints
from compact.collate import to_device
from compact.config import CompactConfig, DataConfig
from compact.data import load_questions, tokenize_questions
from compact.errors import UserError
from compact.information import InformationLog
from compact.loss import distillation_loss
from compact.metrics import MetricsTable, batch_metrics, norm_metrics
from compact.models import context_length, packed_length
from compact.norm_cap import LastNormCap
from compact.randomness import random_state_kept
from compact.strategies import check_weights, own_source
from compact.strategies.base import Context
from compact_kernels import CompatibilityOutput, SampleGradNorms

logger = logging.getLogger(__name__)


class CompactTrainer(DistillationMixin, WholeCheckpoints):
    """Distills the rationales of several teachers into one student, weighted by compatibility.

    Args:
        model: a causal LM, plain or with a peft adapter.
        args: transformers' training arguments; `per_device_train_batch_size` counts questions.
        config: the method.
        train_dataset: questions with their rationales (see :mod:`compact.data`), or what
            :func:`compact.data.tokenize_questions` made of them.
        teachers: names of the teachers, in the order of their indices: needed where the dataset is tokenized already.
        data: how questions become tokens, where it is not; default: as long as the student's context allows.
        metrics_path: the table of the run, one JSON object an optimizer step; default: in `args.output_dir`.

    The step's loss is that of method §3: invariant to gradient accumulation and to the number of data-parallel ranks.

    Raises:
        UserError: a setting under which that loss, or the method, would be silently wrong.
    """

    _steps_strategy = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        config: CompactConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teachers: Sequence[str] | None = None,
        data: DataConfig | None = None,
        metrics_path: str | os.PathLike[str] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(f"model is {model!r}: pass a loaded model (compact.student.load_student loads by name)")
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None and not isinstance(dataset, Dataset):
                raise UserError(f"{name} is a {type(dataset).__name__}: pass a datasets.Dataset of questions")
        args = TrainingArguments("compact-run") if args is None else args
        config = CompactConfig() if config is None else config
        config.validate()  # here too: before the work of tokenizing
        refuse_arguments(args, kwargs)
        if train_dataset is not None and "prompt_ids" not in train_dataset.column_names:
            if processing_class is None:
                raise UserError("train_dataset holds text: pass processing_class, the student's tokenizer")
            if data is None:
                data = DataConfig()
                data.max_length = min(data.max_length, packed_length(model))
            check_length(model, data)
            train_dataset, teachers = _tokenized(train_dataset, processing_class, data, teachers)
            if eval_dataset is not None:
                eval_dataset, _ = _tokenized(eval_dataset, processing_class, data, teachers)
        if teachers is None:
            raise UserError("a tokenized train_dataset needs `teachers`, the names that its teacher indices stand for")
        self.teacher_names = list(teachers)
        super().__init__(
            model,
            args,
            config=config,
            teachers=teachers,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            **kwargs,
        )
        assert args.output_dir is not None  # TrainingArguments fills it in
        self.table = MetricsTable(Path(metrics_path or Path(args.output_dir) / "metrics.jsonl"), self.teacher_names)
        self._source = own_source(self.config.strategy)
        self._grad_norm: Tensor | float = 0.0
        self._recorder: SampleGradNorms | None = None
        self._carried: Tensor | None = None  # (S,) c_s of the micro-batch under way
        # Step, α, cu_questions and question ids of each micro-batch since the last look at them.
        self._decided: list[tuple[int, Tensor, Sequence[int], Sequence[str]]] = []
        self._measured_at = -1  # the optimizer step of the last look at the information
        self.information: InformationLog | None = None
        if self.config.information.every:
            path = self.table.path.with_name("information.jsonl")
            self.information = InformationLog(path, self.teacher_names, self.config)
        if self.config.gradients.cap is not None and self.config.gradients.cap_by == "last":
            if args.world_size > 1:
                raise UserError("gradients.cap_by: last knows the norms of its own process only; use one, or hidden")
            assert isinstance(self.train_dataset, Dataset)
            sizes = len(self.train_dataset), len(self.teacher_names)
            self._last_norm_cap = LastNormCap(self.config.gradients.cap, *sizes, args.device)
        self.add_callback(_StepCallback(self))
        if any(isinstance(c, ProgressCallback) for c in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(_Progress())

    # ---- the loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        loss, result = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self.table.add(batch_metrics(result, inputs["teachers"], len(self.teacher_names)), inputs)
        return (loss, result) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        gradients = self.config.gradients
        if gradients.norms == "off" or self.state.global_step % gradients.every:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._recorder is None:  # now that the model has its wrappers and knows what trains
            self._recorder = self._new_recorder(model)
        inputs = self._prepare_inputs(inputs)
        with self._recorder.record(inputs["ragged"]) as norms:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if inputs["ragged"].num_rows:
            self.table.add_norms(norm_metrics(norms, inputs["teachers"], len(self.teacher_names)))
            if self._last_norm_cap is not None:
                assert self._carried is not None
                own = norms.norms if norms.weights is not None else norms.per_weight(self._carried)
                self._last_norm_cap.remember(inputs, own)
        return loss

    def _after_loss(
        self, batch: Mapping[str, Any], result: CompatibilityOutput, context: Context, normalizer: Tensor | float
    ) -> None:
        self._carried = result.alpha * normalizer
        step = self.state.global_step
        if ":" in self.config.strategy:  # a class of the user's own
            starts = batch["ragged"].sizes.cu_questions
            self._decided.append((step + 1, result.alpha.clone(), starts, context.question_ids))
        if self.information is not None and step % self.config.information.every == 0 and step != self._measured_at:
            assert context.output is not None
            self._measured_at = step  # once a step, not for every micro-batch
            self.information.measure(step + 1, context.output, result, batch)

    def _new_recorder(self, model: nn.Module) -> SampleGradNorms:
        refused = {
            "DeepSpeed": self.is_deepspeed_enabled,
            "FSDP1": self.is_fsdp_enabled and not self.accelerator.is_fsdp2,
            "fp16's loss scale": self.args.fp16,
        }
        if what := next((name for name, used in refused.items() if used), None):
            raise UserError(
                f"gradients.norms: not measured under {what}; set it to off, or train under DDP or FSDP2 in bf16"
            )
        gradients = self.config.gradients
        try:
            return SampleGradNorms(
                model,
                method="hutchinson" if gradients.norms == "hutchinson" else "exact",
                probes=gradients.probes,
                norms="unweighted" if gradients.norms == "unweighted" else "weighted",
            )
        except ValueError as error:
            raise UserError(f"gradients.norms: {error}") from error

    def warm_up(self) -> None:
        """Let a strategy that learns look at the data before the student's first step, as often as it asks for.

        The student does not move, and neither does its random state: what follows is as if nothing had been.
        """
        epochs, dataset = self.strategy.warmup_epochs, self.train_dataset
        if not epochs or not isinstance(dataset, Dataset):
            return
        rank, world, size = self.args.process_index, self.args.world_size, self.args.per_device_train_batch_size
        generator = torch.Generator().manual_seed(self.args.seed)
        passes = [torch.randperm(len(dataset), generator=generator) for _ in range(math.ceil(epochs))]
        order = torch.cat(passes)[: math.ceil(epochs * len(dataset))]
        windows = order.split(size * world * self.args.gradient_accumulation_steps)
        model = self.model_wrapped.train()
        kept = random_state_kept(device=self.args.device)
        with kept, torch.no_grad(), self.compute_loss_context_manager():
            for window in tqdm(windows, desc="warm-up", disable=self.args.disable_tqdm or rank > 0):
                # A last window too small for all ranks repeats itself: all of them must pass through the model.
                own = window.repeat(math.ceil(world / len(window)))[rank::world]
                turns = math.ceil(math.ceil(len(window) / world) / size)  # of every rank
                if len(own) < turns:  # in batches of one question: a rank without a last one repeats its first
                    own = own.repeat(2)[:turns]
                for part in own.tensor_split(turns):
                    items = [dataset[int(index)] for index in part]
                    batch = to_device(self.data_collator(items), self.args.device)
                    result, context = distillation_loss(model, batch, self.strategy, self.config)
                    self.strategy.observe(result.statistics, context, result.alpha)
                self.strategy.step()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # a run that had ended within an epoch and goes on: transformers would take one more step
            self.control.should_training_stop = True

    # ---- logs ----

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm)
        # FSDP2's is in shards; every rank gathers it, and none waits for its device.
        self._grad_norm = found.full_tensor() if isinstance(found, DTensor) else found
        return self._grad_norm

    def _flush(self) -> dict[str, float]:
        logs = super()._flush()
        decided, self._decided = self._decided, []
        for step, alpha, starts, questions in decided:  # only now: at every step the host would wait for its device
            name = f"{self.config.strategy} at step {step}"
            check_weights(name, alpha, starts, questions, capped=self._last_norm_cap is not None)
        return logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs.update(self._flush())
        super().log(logs, start_time)


class _StepCallback(TrainerCallback):
    """Marks the optimizer steps: a row of the table, and a learned strategy's own step."""

    def __init__(self, trainer: CompactTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            for leftover in Path(args.output_dir).glob(".checkpoint-*.writing"):
                shutil.rmtree(leftover, ignore_errors=True)
        if state.global_step == 0:
            self.trainer.warm_up()
        self.trainer.table.start(state.global_step, write=state.is_world_process_zero)
        if self.trainer.information is not None:
            self.trainer.information.start(state.global_step, write=state.is_world_process_zero)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._recorder is not None:
            self.trainer._recorder.remove()
            self.trainer._recorder = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.learning_rate = self.trainer._get_learning_rate()  # of the step to come: the schedule moves after it

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.strategy.step(self.learning_rate)
        self.trainer.table.close_step(state.global_step, state.epoch, self.learning_rate, self.trainer._grad_norm)


class _Progress(ProgressCallback):
    """The progress bar, with the few numbers that a person follows, instead of a line of numbers a log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, desc="training", dynamic_ncols=True)
        self.current_step = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs or "loss" not in logs:
            return
        shown = {"loss": f"{logs['loss']:.3f}"}
        shown |= {f"α {k.removeprefix('alpha/')}": f"{v:.2f}" for k, v in logs.items() if k.startswith("alpha/")}
        self.training_bar.set_postfix(shown, refresh=False)


def _tokenized(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, teachers: Sequence[str] | None
) -> tuple[Dataset, list[str]]:
    """Rows of the data format, or questions that :func:`compact.data.load_questions` has read, in tokens."""
    if "is_messages" not in dataset.column_names:
        dataset, read = load_questions(dataset, answer_kind=data.answer_kind)
        if read.questions["refused"] or read.rationales["refused"]:
            logger.warning(read.summary())
    tokens, report = tokenize_questions(
        dataset, tokenizer, data, teachers=None if teachers is None else list(teachers)
    )
    if report.questions["refused"] or report.rationales["refused"]:
        logger.warning(report.summary())
    return tokens, report.teachers


def check_length(model: nn.Module, data: DataConfig, name: str = "the student") -> None:
    """
    Raises:
        UserError: questions may be longer than what the student can read.
    """
    context = context_length(model)
    if data.max_length > context:
        raise UserError(
            f"data.max_length: {data.max_length} tokens are more than {name} can read, which is {context}: set "
            f"data.max_length to {context} or less (the bodies of longer rationales are cut, and counted)"
        )
    packed = packed_length(model)
    if data.max_length > packed:
        raise UserError(
            f"data.max_length: where one text of a batch is longer than {packed} tokens, {name} turns the positions "
            "of all of them in another way (its rope_type), so that texts would change with their neighbours: set "
            f"data.max_length to {packed} or less"
        )
