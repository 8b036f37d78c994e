"""What the ops ask of their arguments: sizes and names, all known on the host, so that checking costs nothing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from compact_kernels.ragged import Ragged
from compact_kernels.rule import AdaptabilityOptions, CompatibilityRule

if TYPE_CHECKING:
    from compact_kernels.weighting import Weighting

DEBUG = os.environ.get("COMPACT_KERNELS_DEBUG") == "1"


def debugging() -> bool:
    """Whether values are looked at, for which a device is waited for; not in a graph, which has none yet."""
    return DEBUG and not torch.compiler.is_compiling()


def check_loss(weighting: Weighting, ragged: Ragged, targets: Tensor) -> None:
    """What decides α and what is made of it, against the batch and its scored rows' targets (N,)."""
    rule, weights = weighting.rule, weighting.weights
    for name in ("weights", "consensus", "difficulty_reference"):
        if (vector := getattr(weighting, name)) is not None:
            check_per_rationale(name, vector, ragged)
    if weights is not None:
        check_weights("weights", weights)
    if debugging() and (reference := weighting.difficulty_reference) is not None and not bool((reference > 0).all()):
        raise ValueError(f"difficulty_reference is {reference.tolist()}; a loss that is divided by is above 0")
    for name in ("normalizer", "divergence_normalizer"):
        value = getattr(weighting, name)
        if value is None:
            continue
        if isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
            raise ValueError(f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; it is one real number")
        if (debugging() or not isinstance(value, Tensor)) and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; it must be above 0")
    if not 0 <= weighting.divergence_weight < float("inf"):
        raise ValueError(f"divergence_weight is {weighting.divergence_weight}; it must not be negative")
    if not isinstance(weighting.adaptability, AdaptabilityOptions):
        raise ValueError(f"adaptability is {weighting.adaptability!r}; it is AdaptabilityOptions(...)")
    if not callable(rule):
        raise ValueError(f"rule is {rule!r}; it is a function of Statistics, or CompatibilityRule(...)")
    if weights is None and isinstance(rule, CompatibilityRule) and rule.consensus and weighting.consensus is None:
        raise ValueError(
            "the rule weighs consensus, but `consensus` was not given: pass question_consensus(...), "
            "or CompatibilityRule(consensus=0)"
        )
    if weights is None and isinstance(rule, CompatibilityRule) and not torch.compiler.is_compiling():
        check_scored(ragged, targets, weighting.ignore_index)
    if weighting.sft_reduction not in ("mean", "sum", "token"):
        raise ValueError(f"sft_reduction is {weighting.sft_reduction!r}; it is one of mean, sum, token")
    if weighting.divergence not in ("kl", "jsd"):
        raise ValueError(f"divergence is {weighting.divergence!r}; it is kl or jsd")
    by_tokens = weighting.sft_reduction == "token" and weighting.normalizer is not None
    if by_tokens and weighting.divergence_weight and weighting.divergence_normalizer is None:
        raise ValueError("sft_reduction='token' with a normalizer needs divergence_normalizer (R/Q) too")


def check_scored(ragged: Ragged, targets: Tensor, ignore_index: int) -> None:
    """A rationale without a scored row has a loss of 0, which a rule takes for the easiest there is.

    Args:
        targets: of the scored rows (N,): in debug mode those that are ignored do not count.
    """
    rows, questions = ragged.sizes.cu_rows, ragged.sizes.cu_questions
    if debugging():
        counted = torch.nn.functional.pad((targets != ignore_index).cumsum(0), (1, 0))
        rows = counted[rows].tolist()
    for first, last in zip(questions, questions[1:]):
        counts = [rows[s + 1] - rows[s] for s in range(first, last)]
        if any(counts) and not all(counts):
            raise ValueError(
                f"rationale {first + counts.index(0)} of the batch has no scored row, others of its question have: "
                "leave it out, or give `weights`"
            )


def check_tensors(**given: Tensor | None) -> None:
    """What is no tensor is named, and not found out by what it lacks."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            hint = "; of a module, its weight" if isinstance(value, torch.nn.Module) else ""
            raise ValueError(f"{name} is a {type(value).__name__}; it is a tensor{hint}")


def check_ragged(ragged: Ragged) -> None:
    if not isinstance(ragged, Ragged):
        raise ValueError(f"ragged is a {type(ragged).__name__}; it is a compact_kernels.Ragged")


def check_packed(hidden: Tensor, ragged: Ragged) -> None:
    check_tensors(hidden=hidden)
    check_ragged(ragged)
    if torch.compiler.is_compiling():  # the op in the graph looks at sizes when it runs
        return
    total = ragged.sizes.cu_seqlens[-1]
    if hidden.dim() != 2 or hidden.shape[0] != total:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, the batch has {total} packed tokens: ({total}, D)")
    if ragged.device != hidden.device:
        raise ValueError(f"ragged is on {ragged.device}, hidden on {hidden.device}: ragged.to(hidden.device)")


def check_head(hidden: Tensor, head_weight: Tensor, bias: Tensor | None) -> None:
    check_tensors(head_weight=head_weight, **({} if bias is None else {"bias": bias}))
    for name, tensor in (("hidden", hidden), ("head_weight", head_weight), ("bias", bias)):
        if isinstance(tensor, DTensor):
            raise ValueError(
                f"{name} is a DTensor (FSDP2, tensor parallelism), of which this rank has a part: pass the whole one, "
                "for a head that trains as weight.full_tensor(grad_placements=[Partial()]), its gradient being a sum"
            )
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; it needs a floating-point one")
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}")
    if debugging():
        wrong = {"head_weight": ~head_weight.isfinite()}
        if bias is not None:
            wrong["bias"] = ~bias.isfinite() & ~bias.isneginf()  # −∞ forbids a token
        for name, where in wrong.items():
            if bool(where.any()):
                raise ValueError(f"{name} is not finite at {where.nonzero()[0].tolist()} …")
    width = hidden.shape[-1]
    if head_weight.dim() != 2 or head_weight.shape[1] != width:
        raise ValueError(f"head_weight has shape {tuple(head_weight.shape)}, hidden states have D = {width}")
    if bias is not None and bias.shape != head_weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, head_weight has V = {head_weight.shape[0]} rows")
    if 0 in head_weight.shape:
        raise ValueError(f"head_weight has shape {tuple(head_weight.shape)}; it is (V, D), and has neither of none")
    autocast = torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (hidden.dtype, head_weight.dtype)
    for name, tensor in (("hidden", hidden), ("bias", bias)):
        if tensor is not None and tensor.dtype != head_weight.dtype and not autocast:
            raise ValueError(
                f"{name} is {tensor.dtype}, head_weight {head_weight.dtype}: convert one, or use torch.autocast"
            )


def check_numbers(
    logit_scale: float, softcap: float | None, temperature: float, workspace_mib: int, implementation: str = "auto"
) -> None:
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap), ("temperature", temperature)):
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name} requires a gradient and would get none: multiply `hidden` by what is learned")
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}; it must be above 0" + (", or None" if name == "softcap" else ""))
    if not isinstance(workspace_mib, int):
        raise ValueError(f"workspace_mib is {workspace_mib!r}; it is a whole number of MiB")
    if workspace_mib < 0:
        raise ValueError(f"workspace_mib is {workspace_mib}; 0 is the least, one row of logits at a time")
    if implementation not in ("auto", "reference"):
        raise ValueError(f"implementation is {implementation!r}; it is auto or reference")


def check_ids(targets: Tensor) -> None:
    if targets.dtype != torch.int64:
        raise ValueError(f"targets has dtype {targets.dtype}; token ids are int64")


def check_targets(targets: Tensor, hidden: Tensor, ragged: Ragged) -> None:
    """Those of packed states that :func:`check_packed` has seen."""
    check_tensors(targets=targets)
    check_ids(targets)
    if not torch.compiler.is_compiling() and targets.device != ragged.device:
        raise ValueError(f"targets is on {targets.device}, ragged on {ragged.device}")
    total = hidden.shape[0]
    if targets.numel() != total:
        raise ValueError(
            f"targets has {targets.numel()} entries, the batch has {total} packed tokens: one target a row"
        )


def check_alpha(alpha: Tensor, ragged: Ragged) -> None:
    """What a rule gave."""
    if not isinstance(alpha, Tensor):
        raise ValueError(f"the rule gave a {type(alpha).__name__}; α is a tensor, one number a rationale")
    if alpha.shape != (ragged.num_sequences,):
        raise ValueError(f"the rule gave α of shape {tuple(alpha.shape)} for {ragged.num_sequences} rationales")
    check_weights("the rule's α", alpha)


def check_weights(name: str, weights: Tensor) -> None:
    if debugging() and not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError(f"{name} is {weights.tolist()}; weights are finite and not negative")


def check_rows(targets: Tensor, ragged: Ragged) -> None:
    if targets.numel() != ragged.num_rows:
        raise ValueError(f"there are {targets.numel()} targets for {ragged.num_rows} scored rows")


def check_values(hidden: Tensor, targets: Tensor, vocabulary: int, ragged: Ragged | None, ignore_index: int) -> None:
    """Ids in range and numbers finite: what lies on a device is read only if COMPACT_KERNELS_DEBUG=1."""
    if not hasattr(ignore_index, "__index__"):
        raise ValueError(f"ignore_index is {ignore_index!r}; it is a whole number, as the ids are")
    if torch.compiler.is_compiling():
        return
    span = None if ragged is None else ragged.sizes.evidence_range
    if span is not None and not 0 <= span[0] <= span[1] < vocabulary:
        raise ValueError(f"ragged.evidence_ids span {span[0]} … {span[1]}; the head has {vocabulary}")
    if targets.device.type != "cpu" and not debugging():
        return
    counted = targets[targets != ignore_index]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < vocabulary:
        found = f"{int(counted.min())} … {int(counted.max())}"
        raise ValueError(f"targets span {found}; ids are 0 … {vocabulary - 1}, or {ignore_index} where there is none")
    check_finite(hidden)


def check_finite(hidden: Tensor) -> None:
    if debugging() and not bool(hidden.isfinite().all()):
        rows = (~hidden.isfinite()).reshape(-1, hidden.shape[-1]).any(-1).nonzero()[:5, 0].tolist()
        raise ValueError(f"hidden is not finite in rows {rows} …")


def check_per_rationale(name: str, values: Tensor, ragged: Ragged) -> None:
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} is a {type(values).__name__}; it is a tensor, one number a rationale")
    if isinstance(values, DTensor):
        raise ValueError(f"{name} is a DTensor; pass the whole tensor of this rank's rationales")
    if values.shape != (ragged.num_sequences,):
        raise ValueError(f"{name} has shape {tuple(values.shape)}, the batch has {ragged.num_sequences} rationales")
    if values.is_complex():
        raise ValueError(f"{name} has dtype {values.dtype}; real numbers are needed")
    if values.device != ragged.device:
        raise ValueError(f"{name} is on {values.device}, ragged on {ragged.device}")


def check_query_key(query: Tensor, key: Tensor, ragged: Ragged, temperature: float) -> None:
    check_tensors(query=query, key=key)
    check_ragged(ragged)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if query.dim() not in (2, 3):
        raise ValueError(f"query has shape {tuple(query.shape)}; it is (S, H, d) or (S, d)")
    if torch.compiler.is_compiling():  # the op in the graph looks at sizes when it runs
        return
    for name, tensor in (("query", query), ("key", key)):
        if tensor.device != ragged.device:
            raise ValueError(f"{name} is on {tensor.device}, ragged on {ragged.device}")
    if query.shape != key.shape or query.shape[0] != ragged.num_sequences:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} must agree and "
            f"have one entry for each of the {ragged.num_sequences} rationales"
        )


def refuse_second_derivative(op: str) -> None:
    """Called in a backward pass, where gradients are recorded only if someone wants to differentiate them."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has no second derivative: its backward pass cannot run under create_graph=True")
