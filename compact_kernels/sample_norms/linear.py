"""Linear layers, LoRA's among them: by Gram matrices that layers with one input share, or by their own product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import Node
from torch.nn import functional as F

from compact_kernels.arguments import refuse_second_derivative
from compact_kernels.sample_norms import hooks, ops
from compact_kernels.sample_norms.layers import flat, original, passed_on

if TYPE_CHECKING:
    from compact_kernels.sample_norms.recorder import SampleGradNorms


@dataclass(eq=False)
class Family:
    """Linear layers of one parent that may have their input in common, in the order they are called in."""

    recorder: SampleGradNorms
    input_width: int
    widths: list[int]
    trains: list[tuple[bool, bool]]  # weight, bias
    patched: bool  # whether a member's instance has a forward of its own, which only it can run
    slots: list[Tensor] = field(default_factory=list)  # (M,), one a member: of the norms that it opens
    own: bool = False  # whether members make their weight's gradient themselves
    stored: list[bool] = field(default_factory=list)  # whether each does so by products that are stored
    awaited: Awaited | None = None  # by hooks: the input that further members may have too
    opened: Tensor | None = None  # by Functions: the input of the node that is waiting for further members
    carriers: tuple[Tensor, ...] = ()
    first: int = 0  # member that opened it

    def carrier(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """Member `index`'s carrier, of the node that is open or of a new one."""
        last = index == len(self.widths) - 1
        if self.opened is not x or index <= self.first:
            segments = self.recorder.segments
            assert segments is not None
            self.carriers = SharedInput.apply(
                x, self.slots[index], segments.cu, segments.tiles, y.dtype,
                tuple(self.widths[index:]), tuple(self.trains[index:]), self.recorder.probes,
            )  # fmt: skip
            self.first, self.opened = index, None if last else x
        found = self.carriers[index - self.first]
        if last:
            self.close()
        return found

    def watch(self, index: int, x: Tensor, dtype: torch.dtype, node: Node, place: int) -> None:
        """Await the gradient, in `dtype`, that comes to the `place` of `node`, that of member `index`'s output."""
        awaited = self.awaited
        converted = x.dtype != dtype and not self.patched and all(weight for weight, _ in self.trains)
        converted = converted and hooks.factor_of_product(node) is not None
        keeps = self.trains[index][0] and not converted
        if awaited is None or not awaited.takes(index, x, keeps):
            if awaited is not None:
                awaited.opened = None
            awaited = self.awaited = Awaited(self, self.slots[index], x, keeps)
        awaited.trains[index] = self.trains[index]
        node.register_prehook(partial(awaited.arrived, index, place))
        if index == len(self.widths) - 1:
            self.close()

    def close(self) -> None:
        """No member is called on this input any more."""
        if self.awaited is not None:
            self.awaited.opened = None
        self.awaited, self.opened, self.carriers = None, None, ()


class Awaited:
    """An input, until the gradients of what members of a family made of it are there: their norms are one launch.

    An output that is not used has no gradient: what has come by the end of the pass is then all there is.

    Args:
        keeps: the input. Not where members convert it, and autograd keeps that, nor for biases alone.
    """

    def __init__(self, family: Family, slot: Tensor, x: Tensor, keeps: bool) -> None:
        assert family.recorder.segments is not None
        self.segments, self.probes, self.slot = family.recorder.segments, family.recorder.probes, slot
        self.opened: Tensor | None = x  # while further members may come
        self.version = x._version  # of what is not kept: autograd does not mind if it changes then
        self.input = hooks.Kept(x) if keeps else None
        self.factor: Tensor | None = None  # of a member's product, where there is no input
        self.trains: dict[int, tuple[bool, bool]] = {}  # by member
        self.task = -1  # the pass that the gradients are of
        self.grads: dict[int, Tensor | None] = {}
        self.given: set[int] = set()  # members whose norms have been given

    def takes(self, index: int, x: Tensor, keeps: bool) -> bool:
        """Whether member `index`, called on x, is one of these."""
        same = self.opened is x and index not in self.trains
        return same and (self.input is not None or (not keeps and x._version == self.version))

    def arrived(self, index: int, place: int, grads: tuple[Tensor | None, ...]) -> None:
        task = torch._C._current_graph_task_id()
        if not hooks.accumulates(task):
            return
        if self.task != task:  # what a pass that failed has left is not of this one
            self.task, self.grads = task, {}
            if len(self.trains) > 1:
                torch.autograd.Variable._execution_engine.queue_callback(self.flush)
        self.grads[index] = grads[place]
        if self.input is None and grads[place] is not None:
            self.factor = hooks.factor_of_product(torch._C._current_autograd_node())
        if len(self.grads) == len(self.trains):
            self.give()
            self.opened = None
            if self.input is not None:
                self.input.release()

    @torch.no_grad()
    def flush(self) -> None:
        """At the end of a pass. The input stays: another pass may come to the other outputs."""
        with torch.cuda.device_of(self.slot):
            self.give()

    def give(self) -> None:
        grads = {index: gradient for index, gradient in sorted(self.grads.items()) if gradient is not None}
        self.grads = {}
        pairs = [(gradient, self.trains[index]) for index, gradient in grads.items()]
        if pairs:
            x = self.factor if self.input is None else self.input.get()
            self.factor = None
            norms = shared_norms(x, pairs, self.segments.cu, self.segments.tiles, self.probes)
            hooks.give(self.slot, norms, again=not self.given.isdisjoint(grads))
            self.given |= grads.keys()


@dataclass(eq=False)
class LinearMember:
    family: Family
    index: int
    transposed: bool  # the weight is (D_in, D_out), as transformers' Conv1D has it
    before: Callable | None  # a forward that the instance had
    slot: Tensor | None = None  # (P, S), where the family makes its own products
    bias_slot: Tensor | None = None  # (S, slices, D_out)


class SharedInput(Function):
    """(input, slot) → a carrier for each layer that reads the input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        slot: Tensor,
        cu: Tensor,
        tiles: Tensor,
        dtype: torch.dtype,
        widths: tuple[int, ...],
        trains: tuple[tuple[bool, bool], ...],
        probes: int,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, cu, tiles)
        ctx.trains, ctx.probes = trains, probes
        return tuple(x.new_empty((), dtype=dtype).expand(*x.shape[:-1], width) for width in widths)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, cu, tiles = ctx.saved_tensors
        pairs = [(gradient, trains) for gradient, trains in zip(grads, ctx.trains) if gradient is not None]
        norms = shared_norms(x, pairs, cu, tiles, ctx.probes)
        return None, norms, None, None, None, None, None, None


def shared_norms(
    x: Tensor | None, pairs: list[tuple[Tensor, tuple[bool, bool]]], cu: Tensor, tiles: Tensor, probes: int
) -> Tensor:
    """Norms of layers with the input x, by their outputs' gradients and whether weight and bias train.

    Of biases alone x is not looked at.
    """
    both: list[Tensor] = []
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for gradient, (weight, bias) in pairs:
        kind = both if weight and bias else weights if weight else biases
        kind.append(flat(gradient))
    if not both and not weights:
        return estimate(None, [], biases, cu, probes) if probes else ops.gram_norms(None, biases, 0, cu, tiles)
    assert x is not None
    if probes:
        return estimate(flat(x), both + weights, both + biases, cu, probes)
    first = (both + weights)[0]
    norms = ops.gram_norms(flat(x).to(first.dtype), both + weights, len(both), cu, tiles)
    return norms + ops.gram_norms(None, biases, 0, cu, tiles) if biases else norms


def estimate(x: Tensor | None, weights: list[Tensor], biases: list[Tensor], cu: Tensor, probes: int) -> Tensor:
    """Hutchinson's estimate of Σ ‖GᵀX‖² + ‖Gᵀ1‖², and the variance of that estimate: (2, S).

    E‖Xᵀ(Gz)‖² = ‖GᵀX‖² for z of independent signs; one vector z over the outputs of all `weights`, whose products are
    then one matrix, as they are in :func:`compact_kernels.sample_norms.plain.gram_norms` with their Gram matrices
    added up. Biases are exact.
    """
    like = (weights or biases)[0]
    dtype = torch.promote_types(like.dtype, torch.float32)
    total = torch.zeros(2, cu.shape[0] - 1, dtype=dtype, device=like.device)
    projected = None
    for gradient in weights:
        signs = torch.randint(0, 2, (gradient.shape[1], probes), device=like.device).to(like.dtype) * 2 - 1
        part = gradient @ signs  # (T, probes)
        projected = part if projected is None else projected + part
    if x is not None and projected is not None:
        samples = ops.column_norms(x.to(like.dtype), projected, cu).to(dtype)
        total = total + torch.stack([samples.mean(1), samples.var(1) / probes])
    for gradient in biases:
        sums = torch.segment_reduce(gradient.to(dtype), "sum", offsets=cu, axis=0, unsafe=True, initial=0.0)
        total = total + torch.stack([sums.square().sum(1), torch.zeros_like(total[0])])
    return total


class Tap(Function):
    """(y, carrier) → y; the carrier's gradient is y's."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, carrier: Tensor) -> Tensor:
        return passed_on(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient


class OwnProduct(Function):
    """A linear layer whose weight gradient and norms come from one pass over its input and its output's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        slot: Tensor,
        bias_slot: Tensor | None,
        cu: Tensor,
        offsets: Tensor | None,
        scales: Tensor | None,
        transposed: bool,
    ) -> Tensor:
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype):
            dtype = torch.get_autocast_dtype(x.device.type)
        x_d, weight_d = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x_d, weight_d, cu, offsets)
        ctx.scales, ctx.transposed, ctx.dtypes = scales, transposed, (x.dtype, weight.dtype)
        ctx.slices = None if bias_slot is None else bias_slot.shape[1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        matrix = weight_d.t() if transposed else weight_d
        y = F.linear(flat(x_d), matrix, None if bias is None else bias.to(dtype))
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))  # no view: it may be changed in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a linear layer whose norms come with its own product")
        x, weight, cu, offsets = ctx.saved_tensors
        gradient = gradient.to(x.dtype)
        g, wants = flat(gradient), ctx.needs_input_grad
        dx = dw = db = norms = bias_gradients = None
        if wants[0]:
            dx = (gradient @ (weight.t() if ctx.transposed else weight)).to(ctx.dtypes[0])
        if wants[1]:
            pair = (flat(x), g) if ctx.transposed else (g, flat(x))
            parts, norms = ops.product(*pair, cu, ctx.scales, offsets)
            dw = (parts[0] if parts.shape[0] == 1 else parts.sum(0)).to(ctx.dtypes[1])
        if wants[2]:
            slices = ctx.slices
            bias_gradients = ops.scale_gradients(g[:, None], g[:, None], cu, slices, "ones", 0.0)
            sums = bias_gradients.sum(1)
            db = (sums if ctx.scales is None else sums * ctx.scales[:, None]).sum(0).to(ctx.bias_dtype)
        return dx, dw, db, norms, bias_gradients, None, None, None, None


def linear_forward(self: nn.Module, input: Tensor) -> Tensor:
    """Takes the place of a linear layer's forward."""
    member: LinearMember = self._sample_norms  # type: ignore[assignment]
    family, x = member.family, input
    recorder = family.recorder
    if recorder.segments is None or not torch.is_grad_enabled():
        return original(self, member.before, x)
    recorder.check_rows(self, x.shape[:-1].numel())
    if family.own:
        recorder.note(member)
        segments = recorder.segments
        offsets = segments.offsets if family.stored[member.index] else None
        return OwnProduct.apply(
            x, self.weight, self.bias, member.slot, member.bias_slot, segments.cu, offsets, recorder.scales,
            member.transposed,
        )  # fmt: skip
    y = original(self, member.before, x)
    recorder.note(member)
    source = hooks.source(y)
    if source is None:
        return Tap.apply(y, family.carrier(member.index, x, y))
    family.watch(member.index, x, y.dtype, *source)
    return y
