"""The `training` section of a recipe: which of transformers' fields may be set, and what they are if they are not."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from compact import options
from compact.errors import UserError
from compact.options import Given, refuse

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from compact.config import Recipe

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
    "ddp_find_unused_parameters": False,  # every parameter that trains is used in every step
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
ANY = object()
# Fields of TrainingArguments that a recipe may not set (to that value): they would be ignored or break the method.
NOT_IN_TRAINING: dict[str, tuple[object, str]] = {
    "output_dir": (ANY, "the run's folder is the key run"),
    "seed": (ANY, "set the key seed"),
    "gradient_checkpointing": (ANY, "set student.gradient_checkpointing"),
    "activation_checkpointing": (ANY, "set student.gradient_checkpointing"),
    "use_cache": (ANY, "packed batches are only right without the cache"),
    "remove_unused_columns": (ANY, "the collator needs every column"),
    "label_names": (ANY, "the labels are the collator's"),
    "label_smoothing_factor": (ANY, "the loss is the method's own and has no smoothing"),
    "use_liger_kernel": (ANY, "it replaces the forward that the method needs"),
    "liger_kernel_config": (ANY, "it replaces the forward that the method needs"),
    "average_tokens_across_devices": (False, "a step is normalised over all devices, or the loss would change"),
    "parallelism_config": (ANY, "context and sequence parallelism would split a question"),
    "train_sampling_strategy": ("group_by_length", "an item is a question, which has several lengths"),
    "resume_from_checkpoint": (ANY, "Trainer does not read it; a run goes on from its own last checkpoint"),
    "gradient_checkpointing_kwargs": (ANY, "student.gradient_checkpointing has none"),
    **dict.fromkeys(
        ("eval_strategy", "eval_on_start", "eval_steps", "eval_delay", "per_device_eval_batch_size", "bf16_full_eval"),
        (ANY, "the run evaluates before and after training, by generation: see evaluation"),
    ),
    "metric_for_best_model": (ANY, "nothing is evaluated in between"),
    "load_best_model_at_end": (ANY, "nothing is evaluated in between"),
    "save_strategy": ("best", "nothing is evaluated in between; epoch, steps or no"),
    **dict.fromkeys(
        ("save_only_model", "ignore_data_skip"), (True, "a stopped run could not go on as if nothing had been")
    ),
    "enable_jit_checkpoint": (True, "a run stopped by it would be taken for finished; save_steps saves as often"),
    "auto_find_batch_size": (True, "out of memory it begins again in smaller steps, with a student that has moved"),
    "torch_compile": (True, "set student.compile, which compiles the layers and not what reads their states"),
    "torch_compile_backend": (ANY, "set student.compile"),
    "torch_compile_mode": (ANY, "set student.compile"),
    "fp16": (True, "its loss scaling makes gradients infinite on purpose; bf16 needs none"),
    "dataloader_drop_last": (True, "questions would be left out without a word"),
    "do_train": (ANY, "nothing reads it"),
    "do_eval": (ANY, "nothing reads it"),
    "do_predict": (ANY, "nothing reads it"),
    "hub_token": (ANY, "it would be written to the run's recipe.yaml: log in with `hf auth login`"),
}


def check_training(given: Given) -> None:
    """Names and types of the `training` section, against the installed transformers.

    Raises:
        UserError: an unknown field (with the nearest), one that is not the recipe's to set, or a wrong type.
    """
    if not given.value:
        return
    from transformers import TrainingArguments  # seconds to import, and most uses of this module need none of it

    types = options.hints(TrainingArguments)
    for name, item in given.value.items():
        key = f"training.{name}"
        refused, reason = NOT_IN_TRAINING.get(name, (None, ""))
        if reason and (refused is ANY or item.value == refused):
            refuse(item, key, reason if refused is ANY else f"{refused!r} is refused: {reason}")
        if name not in types:
            near = options.nearest(str(name), types) or "; its fields are listed in transformers' documentation"
            refuse(item, key, f"transformers.TrainingArguments has no such field{near}")
        if options.optional(types[name])[0] in (bool, int, float, str):
            options.coerce(types[name], item, key)
        for kind in get_args(types[name]):
            if isinstance(kind, type) and issubclass(kind, enum.Enum) and item.value not in list(kind):
                choices = [str(member.value) for member in kind]
                near = options.nearest(str(item.value), choices)
                refuse(item, key, f"{item.value!r} is not one of {', '.join(choices)}{near}")


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """transformers' arguments of a recipe: its `training` section over this project's few defaults.

    Raises:
        UserError: a value out of range, or one that transformers refuses.
    """
    import torch
    from transformers import Trainer, TrainingArguments

    from compact.student import compute_dtype

    for name, least in AT_LEAST.items():
        value = recipe.training.get(name, least)
        if isinstance(value, (int, float)) and value < least:
            raise UserError(f"training.{name}: {value} is out of range: at least {least}")
    epochs, steps = recipe.training.get("num_train_epochs", 1), recipe.training.get("max_steps", -1)
    if epochs <= 0 and steps <= 0:  # type: ignore[operator]
        raise UserError(f"training.num_train_epochs: {epochs} trains nothing: above 0 is needed, or max_steps")
    half = compute_dtype(recipe.student) is torch.bfloat16
    if recipe.training.get("bf16", half) != half:
        kind, other = ("bfloat16", "float32") if half else ("float32", "bfloat16")
        raise UserError(
            f"training.bf16: {str(not half).lower()}, and the student computes in {kind} (student.dtype "
            f"{recipe.student.dtype}); leave it out, or set student.dtype to {other}"
        )
    given: dict[str, Any] = {
        **TRAINING_DEFAULTS,
        "bf16": half,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
    }
    if "save_steps" in recipe.training:
        given["save_strategy"] = "steps"
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
