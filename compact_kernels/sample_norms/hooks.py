"""How an eager layer gives its norms: by a hook on the node that its output's gradient comes to.

A hook costs a tenth of a Function's time on the host. What a Function has from autograd is done here: an input is
kept until it has been used, and longer where the graph is retained; one that was changed in place is an error; a slot
is a leaf, which a pass that only returns gradients (torch.autograd.grad) leaves as it is.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.graph import Node


def source(y: Tensor) -> tuple[Node, int] | None:
    """The node that the gradient of `y` comes to, and its place among what comes there; None where no hook will do.

    Compiled graphs have no hooks of ours, and what is packed by hooks of saved tensors (checkpoints that are not
    reentrant, activations moved to the host) has to be saved by a Function. A view's node is not run once the view
    is changed in place: its base's is.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    base = y._base
    if base is not None:
        alike = base.numel() == y.numel() and base.shape[-1] == y.shape[-1]
        if not (alike and base.is_contiguous() and y.is_contiguous()):
            return None
        y = base
    node = y.grad_fn
    return None if node is None else (node, y.output_nr)


class Kept:
    """A layer's input, for as long as autograd would keep it."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.version = tensor._version

    def get(self) -> Tensor:
        """
        Raises:
            RuntimeError: it is not what the layer saw, or has been let go.
        """
        if self.tensor is None:  # autograd has kept nothing either
            raise RuntimeError(
                "Trying to backward through the graph a second time, in which the input of a layer whose norms are "
                "recorded has been freed: specify retain_graph=True the first time"
            )
        if self.tensor._version != self.version:
            raise RuntimeError(
                "the input of a layer whose norms are recorded has been modified by an inplace operation: it is at "
                f"version {self.tensor._version}; expected version {self.version}"
            )
        return self.tensor

    def release(self) -> None:
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.tensor = None


def other_factor(node: Node, weight: Tensor | None, shape: torch.Size) -> Tensor | None:
    """What `weight` is multiplied with, with its graph, if `node` is a product of both; `shape` is the product's."""
    if node.name() != "MulBackward0":
        return None
    for (before, _), name in zip(node.next_functions, ("_saved_other", "_saved_self")):
        if weight is not None and getattr(before, "variable", None) is weight:
            factor = getattr(node, name)
            return factor if factor is not None and factor.shape == shape else None
    return None


def factor_of_product(node: Node) -> Tensor | None:
    """A linear layer's input (T, D) as its product has it, which autograd keeps for a weight that trains.

    Under autocast it is narrower than the layer's input. `node` is that of :func:`source`; call this before it runs.
    """
    if node.name() == "UnsafeViewBackward0":
        node = node.next_functions[0][0]  # type: ignore[assignment]
    name = {"MmBackward0": "_saved_self", "AddmmBackward0": "_saved_mat1"}.get(node.name())
    return None if name is None else getattr(node, name)


@functools.lru_cache(maxsize=8)
def accumulates(task: int) -> bool:
    """Whether the pass `task`, in which a hook is running, leaves gradients in leaves or returns them."""
    nodes = [torch._C._current_autograd_node()]
    for node in nodes:
        if node.name() == "torch::autograd::AccumulateGrad":
            try:
                return torch._C._will_engine_execute_node(node)
            except RuntimeError:  # its gradient is one that is returned
                return False
        nodes += [following for following, _ in node.next_functions if following is not None]
    raise AssertionError("a layer that is recorded has parameters that train")


def new_slot(dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...]) -> Tensor:
    """A leaf whose gradient becomes norms; `again` tells that some of them came twice, and are then nobody's."""
    slot = torch.empty((), dtype=dtype, device=device).expand(sizes).requires_grad_()
    slot.register_post_accumulate_grad_hook(_came)  # where autograd brings them, to a Function's slot
    empty_slot(slot)
    return slot


def empty_slot(slot: Tensor) -> None:
    slot.grad, slot.given, slot.again = None, False, False  # type: ignore[attr-defined]


def give(slot: Tensor, norms: Tensor, again: bool | None = None) -> None:
    """What autograd does with a leaf's gradient.

    Args:
        again: whether a parameter whose norms are there has come a second time; by default whether the slot has some.
    """
    norms = norms.detach().to(slot.dtype)
    slot.grad = norms if slot.grad is None else slot.grad + norms
    _came(slot, again)


def _came(slot: Tensor, again: bool | None = None) -> None:
    slot.again |= slot.given if again is None else again  # type: ignore[attr-defined]
    slot.given = True  # type: ignore[attr-defined]
