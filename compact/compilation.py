"""The student's layers under torch.compile: one graph that all layers and all batch shapes share.

Whole models compile badly here (generation, hooks, what wraps the student), layers well: every packed batch gives
them tensors that differ in the number of tokens alone, which is a symbol of the graph.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compact.errors import UserError
from compact.models import decoder_layers, unwrap
from compact.projections import last_attention, tap_of

BACKEND = "inductor"
GRAPHS = 20  # at most, as the option's help says
_CACHES = ("past_key_values", "past_key_value", "layer_past")  # what architectures call it


def compile_layers(model: nn.Module) -> nn.Module:
    """Compile the backbone's layers, in place, for passes in training mode; all others run as before.

    No module is wrapped or replaced: names, checkpoints, peft, FSDP and merging see the model they know. Compilation
    happens at the first batches and again for other *kinds* of call, never for other shapes:

    * a graph for each kind of layer (sliding and full attention are two), once more where the first layer's input
      needs no gradient (LoRA) and once more for passes without gradient (``difficulty.kind=ifd``);
    * one for each kind of part of the last layer (attention, feed-forward, norm) where the consensus graph reads its
      projections: a graph of the whole layer would pass over the hook that does it;
    * twice all that under ``student.attention=sdpa`` or ``eager``, where a batch of one sequence has no mask.

    Args:
        model: a prepared student, before or after peft wraps it.

    Returns:
        `model` itself.

    Raises:
        UserError: another's torch.compile is in place already, or the attention is ``flash_attention_4``.
    """
    inner = unwrap(model)
    if inner.config._attn_implementation == "flash_attention_4":
        raise UserError(
            "student.compile: flash_attention_4 builds its kernels in Python when it is called, which torch.compile "
            "would trace into; take student.attention=compact_varlen or auto, or student.compile=false"
        )
    if any(module._compiled_call_impl is not None for module in inner.modules()):
        raise UserError(f"{type(inner).__name__} is compiled already: student.compile would compile it twice")
    # All layers share a code object, which holds no more graphs than this; beyond, torch runs it uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    # Its splitting of graphs at DDP's buckets refuses flex attention and checkpoints; a layer fits in one.
    torch._dynamo.config.optimize_ddp = False
    # What gives per-rationale gradient norms hangs on the layers' modules and has the sizes of the batch.
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    layers = list(decoder_layers(inner))
    try:
        tapped = tap_of(last_attention(inner)) is not None
    except UserError:  # no attention module to tap
        tapped = False
    for module in [*layers[:-1], *layers[-1].children()] if tapped else layers:
        module.forward = types.MethodType(_forward, module)
    return model


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = type(self).forward  # looked up at every call: FSDP2 gives the module another class
    if not self.training or any(kwargs.get(name) is not None for name in _CACHES):
        return forward(self, *args, **kwargs)
    return _compiled(forward, BACKEND)(self, *args, **kwargs)


@functools.cache
def _compiled(forward: Callable, backend: str) -> Callable:
    return torch.compile(forward, dynamic=True, backend=backend)
