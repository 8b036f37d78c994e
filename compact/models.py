"""What a causal LM of transformers is made of, whatever wraps it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from compact.errors import UserError


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside DDP, torch.compile, DeepSpeed and peft wrappers."""
    inner: nn.Module | None = model
    while inner is not None and not isinstance(inner, PreTrainedModel):
        if isinstance(inner, PeftModel):
            inner = inner.get_base_model()
        else:
            children = dict(inner.named_children())
            inner = children.get("module", children.get("_orig_mod"))
    if inner is None:
        raise UserError(
            f"{type(model).__name__} holds no transformers PreTrainedModel; pass a causal LM of transformers"
        )
    return inner


def context_length(model: nn.Module) -> int:
    """Tokens that the student can read at once; sys.maxsize where its positions have no end."""
    return getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def packed_length(model: nn.Module) -> int:
    """Tokens that a text may have beside others: the rotary embeddings of some follow the longest of a batch."""
    config, context = unwrap(model).config.get_text_config(), context_length(model)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("longrope", "dynamic"):
        return context
    known = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return min(context, known or context)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module's own mode restored afterwards: a frozen part may be in evaluation mode already."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The backbone's list of layers."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(model).__name__} has no list of {count} layers (config.num_hidden_layers) in its backbone")


def sharded_units(model: nn.Module) -> list[nn.Module]:
    """FSDP2's units, outer ones first. Modules are walked only where there are ranks: a walk takes milliseconds."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered(model: PreTrainedModel, module: nn.Module) -> Iterator[None]:
    """Inside, the parameters of `module` are whole on this rank, under FSDP2 and ZeRO-3 too."""
    if is_deepspeed_zero3_enabled():
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            yield
        return
    owners = [unit for unit in sharded_units(model) if any(child is module for child in unit.modules())]
    owner = cast(FSDPModule, owners[-1]) if owners else None  # the innermost unit holds the parameters
    if owner is not None:
        owner.unshard()
    yield
    if owner is not None:
        owner.reshard()
