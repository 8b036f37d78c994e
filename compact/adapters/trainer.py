"""The method's batches, loss and step normalisation for any subclass of transformers' Trainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from compact import student
from compact.collate import Collator
from compact.config import CompactConfig
from compact.controls import controlled
from compact.embed import with_embeddings
from compact.errors import UserError
from compact.loss import Denominators, distillation_loss, normalizers
from compact.norm_cap import LastNormCap
from compact.strategies import build_strategy
from compact.strategies.base import Context, Strategy
from compact.tokenization import TOKENS
from compact_kernels import CompatibilityOutput
from compact_kernels.ragged import on_device

if TYPE_CHECKING:
    from transformers import Trainer as _Host
else:
    _Host = object

logger = logging.getLogger(__name__)


class DistillationMixin(_Host):
    """Put before a Trainer class, it makes that trainer distill: ``class Mine(DistillationMixin, SFTTrainer)``.

    The step's loss is that of method §3: invariant to gradient accumulation and to the number of data-parallel ranks.
    What else the host does (schedules, checkpoints, logs, callbacks) stays its own.

    Args:
        model: a causal LM, plain or with a peft adapter.
        args: the host's arguments; `per_device_train_batch_size` counts questions.
        config: the method.
        teachers: names that the dataset's teacher indices stand for (the report of ``tokenize_questions`` has them).
        train_dataset, eval_dataset: what :func:`compact.data.tokenize_questions` made.
        kwargs: the host's own.

    Raises:
        UserError: a setting under which the loss, or the method, would be silently wrong.
    """

    loss_is_scaled_for_ga = True  # transformers ≥ 5.19: the loss is divided by the whole window's denominators
    _steps_strategy = False
    _last_norm_cap: LastNormCap | None = None  # CompactTrainer's

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        config: CompactConfig | None = None,
        teachers: Sequence[str] = (),
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        config = CompactConfig() if config is None else config
        config.validate()
        refuse_arguments(args, kwargs)
        if args.dataloader_pin_memory:  # else every tensor of a batch waits for the step before it
            args.accelerator_config.non_blocking = True  # type: ignore[union-attr]
        args.logging_nan_inf_filter = False  # a loss that is not finite is seen, and never averaged away
        self.config = config
        self.strategy = build_strategy(config, teachers)
        if type(self.strategy).step is not Strategy.step and not self._steps_strategy:
            raise UserError(
                f"strategy {config.strategy} learns beside the student, which {type(self).__name__} does not let it: "
                "use compact.CompactTrainer"
            )
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None and "prompt_ids" not in (getattr(dataset, "column_names", None) or ()):
                raise UserError(f"{name} holds no tokenized questions: pass what compact.data.tokenize_questions made")

        def as_used(dataset: Dataset | None) -> Dataset | None:
            if dataset is None:
                return None
            kept = controlled(self.strategy.restrict(dataset), config.adaptability.control)
            return with_embeddings(kept, processing_class, config, device=args.device)

        train_dataset, eval_dataset = as_used(train_dataset), as_used(eval_dataset)
        collator = kwargs.setdefault(
            "data_collator", Collator(tokenizer=processing_class, ifd=config.difficulty.kind == "ifd")
        )
        if not isinstance(collator, Collator):
            raise UserError(
                f"data_collator is a {type(collator).__name__}: leave it out, or take a compact.adapters.Collator"
            )
        self._columns = list(TOKENS.names) if train_dataset is None else list(train_dataset.column_names)
        model = student.prepare(model, projections=config.consensus.affinity == "attention")
        if config.head_dtype == "float32":
            student.check_float32_head(student.head(model).weight.dtype)
        if not is_deepspeed_zero3_enabled():  # whose parameters are in shards already
            student.check(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if config.gradients.cap_by == "last" and not self._steps_strategy:
            raise UserError("gradients.cap_by: last is CompactTrainer's, which measures the norms")
        self.model_accepts_loss_kwargs = True  # transformers < 5.19 reads this instead of loss_is_scaled_for_ga
        for extent in ("cp", "sp"):
            if getattr(self, f"get_{extent}_size")() > 1:
                raise UserError(f"{extent} parallelism splits sequences, which per-rationale weights do not survive")

    def rationale_weights(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Override for weights of your own: α (S,) ≥ 0 of the batch's rationales. None: the strategy decides."""
        return None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if inputs["ragged"].num_rows == 0:
            logger.warning("a batch has no token to predict (questions %s): its loss is 0", inputs["question_ids"])
        window = None if num_items_in_batch is None else Denominators(*num_items_in_batch)
        replicas = 1 if window is None else self.accelerator.num_processes // self.get_tp_size()
        weights = self.rationale_weights(inputs)
        result, context = distillation_loss(
            model,
            inputs,
            self.strategy if weights is None else None,
            self.config,
            weights=weights,
            denominators=window,
            replicas=replicas,
            cap=self._last_norm_cap if model.training else None,  # held-out questions have no last norm
        )
        if model.training:
            self._after_loss(inputs, result, context, normalizers(self.config, inputs["ragged"], window, replicas)[0])
            if weights is None:
                self.strategy.observe(result.statistics, context, result.alpha)
        return (result.loss, result) if return_outputs else result.loss

    def _after_loss(
        self, batch: Mapping[str, Any], result: CompatibilityOutput, context: Context, normalizer: Tensor | float
    ) -> None:
        """A training batch's forward pass is over; c_s = α_s·normalizer."""

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss on held-out questions; accuracy by generation is :mod:`compact.evaluate`'s."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def _get_num_items_in_batch(self, batch_samples: list[Mapping[str, Any]], device: torch.device) -> Tensor | None:
        """[Q, N] of method §3 over the accumulation window and all ranks, in place of a token count."""
        if not batch_samples:
            return None
        counts = [Denominators.of(batch["ragged"]) for batch in batch_samples]
        window = on_device(torch.tensor(counts, dtype=torch.float64).sum(0).tolist(), torch.float32, device)
        return self.accelerator.reduce(window, "sum") / self.get_tp_size()

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = self._columns  # type: ignore[assignment]  # the collator needs every column

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """TRL's trainers would tokenize and pack here; questions are tokens already, and the collator packs."""
        return dataset


def refuse_arguments(args: TrainingArguments, kwargs: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: an argument of the Trainer that this loss would ignore, or that would change it.
    """
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs in one process would use DataParallel, which splits questions: "
            "run under torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    if not args.average_tokens_across_devices:
        raise UserError("average_tokens_across_devices=False would make the loss depend on the number of ranks")
    if args.label_smoothing_factor:
        raise UserError("label_smoothing_factor is not part of this loss: leave it at 0")
    if args.use_liger_kernel:
        raise UserError("use_liger_kernel replaces the forward that this loss needs: leave it at False")
    for name in ("packing", "padding_free"):  # TRL's
        if getattr(args, name, False):
            raise UserError(f"{name}: the collator packs, and keeps rationales apart: leave it at False")
    for name in ("compute_loss_func", "compute_metrics"):
        if kwargs.get(name) is not None:
            raise UserError(f"{name} would be ignored: the loss is the method's; accuracy comes from compact.evaluate")
