"""A causal LM that stops at its hidden states: its backbone and its head.

``prepare`` teaches a Hugging Face causal LM the call ``model(…, compact=ragged)``; ``head`` finds the output layer.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from compact.attention import packed_rows
from compact.errors import UserError
from compact.models import sharded_units, unwrap
from compact.projections import Tap, last_attention, query_key, tap_of
from compact_kernels.ragged import Ragged

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Head:
    """The output layer: logits = cap(logit_scale · (weight · h + bias)), cap(z) = softcap · tanh(z / softcap)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the ops of compact_kernels take of it by name."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (…, V) of hidden states (…, D): the definition, for tests and small inputs."""
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Detached:
    """Tensors that a wrapper's hooks overlook: in bfloat16, FSDP2 casts the floats it finds in a forward's output."""

    def __init__(self, query: Tensor | None, key: Tensor | None, pooled: Tensor, eos_hidden: Tensor) -> None:
        self.query, self.key, self.pooled, self.eos_hidden = query, key, pooled, eos_hidden


@dataclass
class StudentOutput:
    """What the student's forward returns for a packed batch of S sequences, T tokens, hidden size D.

    Everything but `hidden` and `head` is detached and float32. `query` and `key` are the last layer's own projections
    of its attention input at r_T (eq. 4), H heads of d, without rotary embedding; query·key/√d is that layer's logit.
    """

    hidden: Tensor  # (T, D) in the model's dtype, with gradient: the final norm's output
    head: Head  # part of the output, so that DDP sees a trained head used; its hooks go by what the forward returns
    detached: Detached
    autocast: torch.dtype | None = None  # what the forward ran under

    def precision(self, head_dtype: Literal["auto", "float32"] = "auto") -> AbstractContextManager:
        """The forward's autocast, under which the head belongs too; with `float32` none.

        accelerate enters it for the forward alone, where a head in its place would be: float32 weights would meet
        float32 states here, at many times the cost. A student that is only read may be narrower than it was trained.
        """
        if head_dtype == "float32":
            return torch.autocast(self.hidden.device.type, enabled=False)
        return nullcontext() if self.autocast is None else torch.autocast(self.hidden.device.type, self.autocast)

    @property
    def query(self) -> Tensor | None:
        """(S, H, d)"""
        return self.detached.query

    @property
    def key(self) -> Tensor | None:
        """(S, H, d), repeated under grouped-query attention"""
        return self.detached.key

    @property
    def pooled(self) -> Tensor:
        """(S, D) mean of `hidden` over each sequence's tokens"""
        return self.detached.pooled

    @property
    def eos_hidden(self) -> Tensor:
        """(S, D) `hidden` at r_T"""
        return self.detached.eos_hidden


# Pytree nodes, so that DDP and FSDP2 find the tensors in them.
pytree.register_dataclass(Head)
pytree.register_dataclass(StudentOutput)


# --------------------------------------------------------------------------------------------------------- forward


def prepare(model: nn.Module, *, projections: bool = True) -> nn.Module:
    """Teach `model` the call ``model(input_ids=…, position_ids=…, compact=ragged) -> StudentOutput``.

    The *instance's* forward is patched, before or after peft wraps it, so that the call goes through DDP, FSDP and
    peft like any other. Without `compact` the model's own forward answers, unchanged: generation, evaluation and
    saving know nothing of this. With it, `attention_mask`, `labels` and caches are refused, no cache is kept, sequence
    offsets come from `compact`, and position ids too where they are not given.

    Mixture-of-experts models: the router's load-balancing loss is no part of the method and is not added, whatever
    ``config.output_router_logits`` says (a warning says so).

    Args:
        model: a causal LM of transformers, or a wrapper around one.
        projections: read the last layer's query and key projections, as ``consensus.affinity=attention`` needs.
            False: `query` and `key` of the output are None.

    Returns:
        `model` itself.

    Raises:
        UserError: the model has no backbone apart from its head, or its last attention layer is not found.
    """
    inner = unwrap(model)
    if inner.base_model is inner:
        raise UserError(f"{type(inner).__name__} has no backbone apart from its head; pass a causal LM")
    head(inner)
    if getattr(inner.config, "output_router_logits", False):
        logger.warning(
            f"{type(inner).__name__}: output_router_logits is set, but the router's load-balancing loss "
            "(router_aux_loss_coef) is not added to COMPACT's loss"
        )
    attention = last_attention(inner) if projections else None
    if attention is not None and tap_of(attention) is None:
        attention.register_forward_pre_hook(Tap(), with_kwargs=True)
    inner.forward = types.MethodType(_patched(type(inner), projections), inner)
    return model


def _patched(model_class: type[PreTrainedModel], projections: bool) -> Callable:
    original = model_class.forward

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args, compact: Ragged | None = None, **kwargs):
        if compact is None:
            return original(self, *args, **kwargs)
        if args:
            kwargs["input_ids"], *more = args
            if more:
                raise TypeError("with compact=, name every argument but input_ids")
        return _stop_at_hidden(self, compact, projections, **kwargs)

    # generate() and the Trainer read the signature. accelerate follows __wrapped__ to undo what it wrapped itself,
    # and would undo this patch with it.
    del forward.__wrapped__
    signature = inspect.signature(original)
    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters.insert(at, inspect.Parameter("compact", inspect.Parameter.KEYWORD_ONLY, default=None))
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


_IGNORED = ("output_attentions", "output_hidden_states", "return_dict", "logits_to_keep", "num_items_in_batch")


def _stop_at_hidden(
    model: PreTrainedModel,
    ragged: Ragged,
    projections: bool,
    *,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: object = None,
    use_cache: bool | None = None,
    **kwargs,
) -> StudentOutput:
    """The packed forward pass up to the hidden states; `input_ids` is (1, T)."""
    for name, value in (("labels", labels), ("attention_mask", attention_mask), ("past_key_values", past_key_values)):
        if value is not None:
            raise ValueError(f"a packed batch (compact=) takes no {name}")
    ragged = ragged.to(input_ids.device)
    offsets, total = ragged.cu_seqlens, int(ragged.host.cu_seqlens[-1])
    if input_ids.shape != (1, total):
        raise ValueError(f"input_ids is {tuple(input_ids.shape)}, but compact describes (1, {total}) packed tokens")
    if position_ids is None:
        starts = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=total)
        position_ids = (torch.arange(total, device=input_ids.device) - starts).unsqueeze(0)
    inputs = {name: value for name, value in kwargs.items() if value is not None and name not in _IGNORED}
    inputs |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    inputs |= {"max_length_q": ragged.max_seqlen, "max_length_k": ragged.max_seqlen}
    if model.config._attn_implementation == "flex_attention":
        # Below 128 tokens flex attention would take its decoding kernel, which has no configuration for such masks.
        inputs.setdefault("kernel_options", {"FORCE_USE_FLEX_ATTENTION": True})
    if getattr(model.config, "output_router_logits", False):
        inputs["output_router_logits"] = False
    last = offsets[1:].long() - 1  # r_T of every sequence
    tap = tap_of(last_attention(model)) if projections else None
    if tap is not None:
        tap.rows = last
    try:
        with packed_rows():
            hidden = model.base_model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, **inputs
            ).last_hidden_state
        # No tensor that autograd knows as a view: FSDP2 hooks what the forward returns, and warns of views.
        hidden = torch.ops.aten._unsafe_view.default(hidden, hidden.shape[1:])
    finally:
        states, rotary = tap.take() if tap is not None else (None, None)
    query, key = query_key(model, states, rotary) if states is not None else (None, None)
    layer = head(model)
    # FSDP2 frees what it gathered when this forward returns, so the loss needs a copy; elsewhere a view is enough.
    copied = bool(sharded_units(model))
    weight, bias = (
        None if tensor is None else tensor.clone() if copied else tensor.view_as(tensor)
        for tensor in (layer.weight, layer.bias)
    )
    if copied:
        _run_head(model, hidden)
    used = Head(cast(Tensor, weight), bias, layer.logit_scale, layer.softcap)
    detached = Detached(query, key, _pooled(hidden, ragged), hidden.detach()[last].float())
    kind = hidden.device.type
    under = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return StudentOutput(hidden, used, detached, under)


def _run_head(model: PreTrainedModel, hidden: Tensor) -> None:
    """Let the head's module see no row, where FSDP2 holds it in one unit with modules that have run.

    accelerate has final norm and head in one unit (and the embedding, if tied). Such a unit ends its forward when all
    its modules have run: until then torch before 2.13 gathers it no more, in later forwards too, and warns.
    """
    module = cast(nn.Module, model.get_output_embeddings())
    weight = next(module.parameters())
    if not isinstance(module, FSDPModule) or isinstance(weight, DTensor):
        return
    with torch.no_grad():
        module(hidden[:0].to(weight.dtype))
    if torch.is_grad_enabled():
        module.unshard()  # the backward pass needs what the end of its forward may have freed


@torch.compiler.disable
@torch.no_grad()
def _pooled(hidden: Tensor, ragged: Ragged) -> Tensor:
    """(T, D) -> (S, D) float32 means; one small reduction a sequence, no float32 copy of `hidden`."""
    bounds = ragged.host.cu_seqlens.tolist()
    return torch.stack([hidden[a:b].mean(0, dtype=torch.float32) for a, b in itertools.pairwise(bounds)])


# ------------------------------------------------------------------------------------------------------------ head


def head(model: nn.Module) -> Head:
    """The output layer of `model`, looked up now, through any wrapper.

    A sharded (DTensor) weight is gathered; its gradient returns to the shards summed over ranks and divided by
    their number, as FSDP's own gradients are. Under ZeRO-3 a frozen head is gathered.

    Raises:
        UserError: no output layer; one with an adapter (its weight alone would bypass the adapter); a trainable
            head under ZeRO-3.
    """
    inner = unwrap(model)
    layer = inner.get_output_embeddings()
    if isinstance(layer, ModulesToSaveWrapper):
        layer = layer.modules_to_save[layer.active_adapters[0]]
    if isinstance(layer, BaseTunerLayer):
        raise UserError(
            f"{type(inner).__name__}'s output head carries an adapter, which COMPACT's loss would bypass; "
            "leave the head out of student.lora.targets, or list it under peft's modules_to_save"
        )
    if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
        raise UserError(f"{type(inner).__name__} has no output head (get_output_embeddings() gives {layer!r})")
    config = inner.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    bias = getattr(layer, "bias", None)
    return Head(_whole(layer.weight), None if bias is None else _whole(bias), float(scale), softcap)


def _whole(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        if not parameter.requires_grad:
            return parameter.full_tensor()
        # Every rank's gradient is of its own batch: Partial sums them, plain full_tensor() would keep one rank's.
        whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
        whole.register_hook(lambda gradient: gradient / mesh.size())
        return whole
    if is_deepspeed_zero3_enabled():
        if parameter.requires_grad:
            raise UserError("a trainable output head is not supported under ZeRO-3; train with LoRA, or use FSDP2")
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter
