"""How layers give the norms of their rationales' gradients: as the gradients of tensors that are never read.

A layer has a *slot*, a leaf whose gradient is defined to be (parts of) the squared norms. There are two ways to it:

By a hook (:mod:`compact_kernels.sample_norms.hooks`), for linear and norm layers that run eagerly: it sees the
gradient of the layer's output, has kept the layer's input, and puts what it makes of them into the slot's ``grad``.
Layers with one input wait for each other's gradients. A norm layer of transformers' own is a :class:`NormProduct`.

By a Function of autograd's that takes the slot, wherever a hook will not do: autograd then brings norms wherever it
brings gradients, through compiled graphs and hooks of saved tensors (checkpoints that are not reentrant), and a
Function can make the weight's gradient too. Linear layers with one input share a node: it gives each of them a
*carrier*, an expanded scalar in the shape of the layer's output whose value nobody looks at and whose gradient is the
output's. When all are there, the node is run, and sees every G at once.

Nothing here changes what a layer computes, nor its ordinary gradients; but for :class:`NormProduct`, and its
neighbour's :class:`~compact_kernels.sample_norms.linear.OwnProduct`, which make the weight's gradient from the same
pass as the norms: the same but for rounding. Here: norm layers, embeddings, and the head tied to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from compact_kernels.sample_norms import hooks, ops
from compact_kernels.sample_norms.plain import row_products

if TYPE_CHECKING:
    from compact_kernels.sample_norms.recorder import SampleGradNorms
    from compact_kernels.sample_norms.segments import Segments


def flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def passed_on(y: Tensor) -> Tensor:
    """What a Function gives for y itself: no view of it, for it may be changed in place."""
    return torch.ops.aten._unsafe_view(y, y.shape)


def original(module: nn.Module, before: Callable | None, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's own output."""
    return before(*args, **kwargs) if before is not None else type(module).forward(module, *args, **kwargs)


def detached(module: nn.Module, before: Callable | None, *args: Any, **kwargs: Any) -> Tensor:
    """The same, without its parameters' gradients, which whoever asks for this makes."""
    parameters = dict(module._parameters)
    for key, parameter in parameters.items():
        module._parameters[key] = None if parameter is None else parameter.detach()  # type: ignore[assignment]
    try:
        return original(module, before, *args, **kwargs)
    finally:
        module._parameters.update(parameters)


# -------------------------------------------------------------------------------------------------------- norm layers


@dataclass(eq=False)
class ScaleMember:
    """An elementwise weight (and bias) after a normalisation."""

    recorder: SampleGradNorms
    kind: str  # rms, layer
    eps: float
    trains: tuple[bool, bool]
    before: Callable | None
    slot: Tensor | None = None  # (S, slices, D)
    bias_slot: Tensor | None = None


class ScaleTap(Function):
    """(y, x, slots) → y; the slots' gradients are those of weight and bias, rationale by rationale.

    With `scales` it also takes weight and bias, and their gradients are the rationales' times these.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        slot: Tensor | None,
        bias_slot: Tensor | None,
        cu: Tensor,
        kind: str,
        eps: float,
        scales: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        ctx.save_for_backward(x, cu)
        ctx.kind, ctx.eps, ctx.scales = kind, eps, scales
        ctx.dtypes = tuple(y.dtype if p is None else p.dtype for p in (weight, bias))
        ctx.slices = (slot if slot is not None else bias_slot).shape[1]  # type: ignore[union-attr]
        return passed_on(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, cu = ctx.saved_tensors
        weight, bias = scale_gradients(x, gradient, cu, ctx.slices, ctx.kind, ctx.eps, ctx.needs_input_grad[2:4])
        own: list[Tensor | None] = [None, None]
        if ctx.scales is not None:
            for i, (parts, dtype) in enumerate(zip((weight, bias), ctx.dtypes)):
                own[i] = None if parts is None else (ctx.scales @ parts.sum(1).to(ctx.scales.dtype)).to(dtype)
        return gradient, None, weight, bias, None, None, None, None, *own


class NormProduct(Function):
    """(y, x̂, weight, …) → y = x̂ ∘ weight: the weight's gradient is the sum of its rationales', which norms ask for.

    Autograd would multiply and add up once more. The slot gets its gradient as from a hook.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, normalised: Tensor, weight: Tensor, member: ScaleMember, cu: Tensor, heads_first: bool
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(normalised, weight if ctx.needs_input_grad[1] else None, cu)
        ctx.slot, ctx.heads_first, ctx.dtype = member.slot, heads_first, weight.dtype
        return passed_on(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 6
        normalised, weight, cu = ctx.saved_tensors
        dx = gradient * weight if ctx.needs_input_grad[1] else None
        # By autograd's own functions where someone will differentiate this pass.
        dw = (gradient * normalised).flatten(0, -2).sum(0) if torch.is_grad_enabled() else None
        accumulates = hooks.accumulates(torch._C._current_graph_task_id())
        if accumulates or dw is None:
            if ctx.heads_first:
                normalised, gradient = normalised.transpose(1, 2), gradient.transpose(1, 2)
            with torch.no_grad():
                slices = ctx.slot.shape[1]
                parts = ops.scale_gradients(by_token(normalised), by_token(gradient), cu, slices, "given", 0.0)
            dw = parts.sum((0, 1)) if dw is None else dw
            if accumulates:
                hooks.give(ctx.slot, parts)
        return None, dx, dw.to(ctx.dtype), None, None, None


def scale_gradients(
    x: Tensor, gradient: Tensor, cu: Tensor, slices: int, kind: str, eps: float, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of weight and bias, rationale by rationale."""
    g = by_token(gradient)
    weight = ops.scale_gradients(by_token(x), g, cu, slices, kind, eps) if wanted[0] else None
    return weight, ops.scale_gradients(g, g, cu, slices, "ones", 0.0) if wanted[1] else None


def by_token(x: Tensor) -> Tensor:
    """(T, h, D) of (T, D), (1, T, D) or (1, T, h, D), h rows a token."""
    if x.dim() == 2:
        return x[:, None]
    if x.dim() == 3:
        return x.reshape(-1, 1, x.shape[-1])
    return x.reshape(-1, x.shape[-2], x.shape[-1])


def scale_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    member: ScaleMember = self._sample_norms  # type: ignore[assignment]
    recorder = member.recorder
    if recorder.segments is None or not torch.is_grad_enabled():
        return original(self, member.before, *args, **kwargs)
    x: Tensor = args[0] if args else next(iter(kwargs.values()))  # whatever its class calls it
    y = (detached if recorder.unweighted else original)(self, member.before, *args, **kwargs)
    heads_first = x.dim() == 4 and _heads_first(x, recorder.segments.tokens)
    rows = x.shape[:-1] if x.dim() != 4 else (x.shape[0], x.shape[2 if heads_first else 1])
    recorder.check_rows(self, math.prod(rows))
    recorder.note(member)
    source = None if recorder.unweighted else hooks.source(y)
    if source is not None:
        node, place = source
        # Another forward may do anything with its output: hook it, keep it, checkpoint it.
        known = member.before is None and type(self).forward.__module__.startswith("transformers.")
        normalised = hooks.other_factor(node, self.weight, y.shape) if known else None  # type: ignore[arg-type]
        if normalised is not None:
            return NormProduct.apply(y.detach(), normalised, self.weight, member, recorder.segments.cu, heads_first)
        node.register_prehook(scale_hook(member, recorder.segments, hooks.Kept(x), y.shape, heads_first, place))
        return y
    own = (recorder.scales, self.weight, getattr(self, "bias", None)) if recorder.unweighted else ()
    if heads_first:
        x, y = x.transpose(1, 2), y.transpose(1, 2)
    y = ScaleTap.apply(y, x, member.slot, member.bias_slot, recorder.segments.cu, member.kind, member.eps, *own)
    return y.transpose(1, 2) if heads_first else y


def _heads_first(x: Tensor, tokens: int) -> bool:
    """Whether x is (1, h, T, D), as some architectures transpose before they normalise, and not (1, T, h, D)."""
    if x.shape[1] == x.shape[2] == tokens:
        return x.stride(1) < x.stride(2)
    return x.shape[1] != tokens


def scale_hook(
    member: ScaleMember, segments: Segments, kept: hooks.Kept, shape: torch.Size, heads_first: bool, place: int
) -> Callable[[tuple[Tensor | None, ...]], None]:
    """What gives a norm layer's norms when the gradient of its output is there, (…) of `shape`."""
    slots, cu, slices = (member.slot, member.bias_slot), segments.cu, segments.slices

    def arrived(grads: tuple[Tensor | None, ...]) -> None:
        gradient = grads[place]
        if gradient is None or not hooks.accumulates(torch._C._current_graph_task_id()):
            return
        x, gradient = kept.get(), gradient.reshape(shape)
        if heads_first:
            x, gradient = x.transpose(1, 2), gradient.transpose(1, 2)
        found = scale_gradients(x, gradient, cu, slices, member.kind, member.eps, member.trains)
        for slot, parts in zip(slots, found):
            if slot is not None and parts is not None:
                hooks.give(slot, parts)
        kept.release()

    return arrived


# --------------------------------------------------------------------------------------------------------- embeddings


@dataclass(eq=False)
class TokenMember:
    """An embedding, and the head that is tied to it."""

    recorder: SampleGradNorms
    scale: float  # of the embedding's output
    padding: int  # −1: none
    tied: bool
    before: Callable | None
    slot: Tensor | None = None  # (M,)
    carrier: Tensor | None = None  # (T, D): its gradient are the rows of the head's that this batch's tokens ask for


class TokenTap(Function):
    """(y, slot) → (y, carrier); the slot's gradient are the embedding's norms, with the cross term of a tied head.

    With `scales` it also takes the weight, whose gradient are the rationales' times these.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        slot: Tensor,
        ids: Tensor,
        cu: Tensor,
        tiles: Tensor,
        scale: float,
        padding: int,
        scales: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids, cu, tiles)
        ctx.scale, ctx.padding, ctx.scales = scale, padding, scales
        ctx.own = None if weight is None else (weight.shape[0], weight.dtype)
        dtype = torch.promote_types(y.dtype, torch.float32)
        return passed_on(y), y.new_empty((), dtype=dtype).expand(ids.numel(), y.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, rows: Tensor | None) -> tuple[Tensor | None, ...]:
        ids, cu, tiles = ctx.saved_tensors
        if gradient is None:
            return (None,) * 9
        g, ids = flat(gradient), ids.reshape(-1)
        norms = ops.token_norms(ids, g, cu, tiles, ctx.padding) * ctx.scale**2
        if rows is not None:
            kept = rows if ctx.padding < 0 else rows * (ids != ctx.padding)[:, None]
            cross = row_products(g, kept, cu) * (2 * ctx.scale)
            first = (tiles[:, 1] == 0) & (tiles[:, 2] == 0)  # one tile of each rationale
            norms = norms + torch.where(first, cross[tiles[:, 0].long()], 0.0).to(norms.dtype)
        own = None
        if ctx.scales is not None:
            by_token = ctx.scales.repeat_interleave(cu.diff(), output_size=g.shape[0]) * ctx.scale
            rows = g.to(by_token.dtype) * by_token[:, None]
            size, dtype = ctx.own
            own = torch.ops.aten.embedding_dense_backward(rows, ids, size, ctx.padding, False).to(dtype)
        return gradient, norms, None, None, None, None, None, None, own


def embedding_forward(self: nn.Module, input: Tensor) -> Tensor:
    member: TokenMember = self._sample_norms  # type: ignore[assignment]
    recorder, ids = member.recorder, input
    if recorder.segments is None or not torch.is_grad_enabled():
        return original(self, member.before, ids)
    y = (detached if recorder.unweighted else original)(self, member.before, ids)
    recorder.check_rows(self, y.shape[:-1].numel())
    recorder.note(member)
    segments = recorder.segments
    own = (recorder.scales, self.weight) if recorder.unweighted else ()
    y, carrier = TokenTap.apply(y, member.slot, ids, segments.cu, segments.tiles, member.scale, member.padding, *own)
    if member.tied:
        member.carrier, recorder.ids = carrier, ids
    return y


UNSEEN_IDS = (
    "the head is tied to an embedding that was not called on this batch (inputs_embeds?): norms of a shared weight "
    "need the batch's ids"
)


@dataclass(eq=False)
class HeadMember:
    """An output layer that is called as a module, its weight tied to an embedding's."""

    recorder: SampleGradNorms
    embedding: TokenMember
    before: Callable | None
    bias: bool
    slot: Tensor | None = None  # (M,)


class HeadTap(Function):
    """(logits, x, slot, carrier) → logits; the carrier's gradient are the rows of the weight's that tokens ask for."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        slot: Tensor,
        carrier: Tensor,
        ids: Tensor,
        cu: Tensor,
        tiles: Tensor,
        longest: int,
        biased: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, ids, cu, tiles)
        ctx.longest, ctx.biased = longest, biased
        return passed_on(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, ids, cu, tiles = ctx.saved_tensors
        g = flat(gradient)
        x = flat(x).to(g.dtype)
        norms = ops.gram_norms(x, [g], int(ctx.biased), cu, tiles)
        rows = ops.token_rows(g, None, x, cu, ids.reshape(-1), cu, 0, ctx.longest)
        return gradient, None, norms, rows, None, None, None, None, None


def head_forward(self: nn.Module, x: Tensor) -> Tensor:
    member: HeadMember = self._sample_norms  # type: ignore[assignment]
    recorder = member.recorder
    y = original(self, member.before, x)
    if recorder.segments is None or not torch.is_grad_enabled():
        return y
    recorder.check_rows(self, x.shape[:-1].numel())
    recorder.note(member)
    segments, carrier = recorder.segments, member.embedding.carrier
    if carrier is None:
        raise RuntimeError(UNSEEN_IDS)
    return HeadTap.apply(
        y, x, member.slot, carrier, recorder.ids, segments.cu, segments.tiles, segments.longest, member.bias
    )
