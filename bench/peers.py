"""Everyone else's loss on hidden states and a head, each in its fastest documented configuration.

Each builder imports its peer when called (whatever that raises becomes the contender's error) and gives

    loss(hidden (N, D), head (V, D), targets (N,), weights (N,) | None) -> () tensor

the mean cross entropy without `weights`, Σ w·nll with them. A builder whose peer knows no weights is marked so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.batches import IGNORE
from bench.shapes import Scale

Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Peer:
    build: Callable[[Scale], Loss]
    weights: bool = True  # knows per-token weights
    accumulates_fp32: bool = False  # of the head's gradient, in a buffer of its own
    note: str = ""


def _plain(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    # In float32 as Hugging Face's models do it: bf16 log-probs would keep two digits.
    logits = F.linear(hidden, head).float()
    if weights is None:
        return F.cross_entropy(logits, targets, ignore_index=IGNORE)
    return (F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none") * weights).sum()


def _eager(scale: Scale) -> Loss:
    return _plain


def _compiled(scale: Scale) -> Loss:
    torch._dynamo.reset()  # so that another head's sizes cannot make these dynamic
    return torch.compile(_plain, dynamic=False, fullgraph=True, backend=scale.compile_backend)


def _torch_linear_cross_entropy(scale: Scale) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")
    options = torch.nn.LinearCrossEntropyOptions()  # without, torch takes its reference path

    def loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        reduction = "mean" if weights is None else "none"
        value = F.linear_cross_entropy(
            hidden, head, targets, ignore_index=IGNORE, reduction=reduction, options=options
        )
        return value if weights is None else (value * weights).sum()

    return loss


def _liger(**options) -> Callable[[Scale], Loss]:
    def build(scale: Scale) -> Loss:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
            reduction = "mean" if weights is None else "none"
            value = liger_fused_linear_cross_entropy(
                hidden, head, targets, ignore_index=IGNORE, reduction=reduction, **options
            )
            return value if weights is None else (value * weights).sum()

        return _on_gpu(loss)

    return build


def _cce(exact: bool) -> Callable[[Scale], Loss]:
    def build(scale: Scale) -> Loss:
        from cut_cross_entropy import linear_cross_entropy

        options: dict = {"impl": "cce"}
        if exact:  # releases from the package index know the preset only by what it switches off
            preset = "accum_e_fp32" in inspect.signature(linear_cross_entropy).parameters
            options = {"impl": "cce_exact"} if preset else {"impl": "cce", "filter_eps": None}

        def loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
            reduction = "mean" if weights is None else "none"
            value = linear_cross_entropy(hidden, head, targets, ignore_index=IGNORE, reduction=reduction, **options)
            return value if weights is None else (value * weights).sum()

        return _on_gpu(loss)

    return build


def _quack(scale: Scale) -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        return chunked_linear_cross_entropy(hidden, head, targets, ignore_index=IGNORE)

    return _on_gpu(loss)


def _on_gpu(loss: Loss) -> Loss:
    if not torch.cuda.is_available():
        raise RuntimeError("needs a CUDA GPU")
    return loss


PEERS: dict[str, Peer] = {
    "torch_eager": Peer(_eager),
    "torch_compile": Peer(_compiled),
    "torch_linear_cross_entropy": Peer(_torch_linear_cross_entropy),
    "liger": Peer(_liger(), note="head gradient accumulated in bf16"),
    "liger_fp32": Peer(_liger(accum_dtype=torch.float32), accumulates_fp32=True),
    "liger_16": Peer(_liger(chunk_mem_const=16), note="chunk_mem_const=16; head gradient accumulated in bf16"),
    "cce": Peer(_cce(exact=False), note="drops small gradients, of which these logits have few: exact takes as long"),
    "cce_exact": Peer(_cce(exact=True)),
    "quack": Peer(_quack, weights=False, accumulates_fp32=True),
}


def scoring(scale: Scale) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Log-prob and entropy of every row, compiled: what statistics only are compared with."""

    def statistics(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logp = F.linear(hidden, head).float().log_softmax(-1)
        return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)

    torch._dynamo.reset()
    return torch.compile(statistics, dynamic=False, fullgraph=True, backend=scale.compile_backend)
