"""The ops as torch.library ops, for torch.compile, torch.export and whoever wants one node in a graph.

Eager calls go to the same code without this layer, which costs about 60 µs a call. Sizes that are read from a batch's
host copy are read inside the ops, so that a compiled graph serves batches of every shape.

Every op returns fresh tensors and mutates nothing. A gradient that is not wanted is an empty tensor.
"""

from typing import Any

import torch
from torch import Tensor

from compact_kernels import arguments
from compact_kernels.divergence import DivergencePass, span_chunks
from compact_kernels.head.linear import LinearHead
from compact_kernels.head.rows import Answers, RowStatistics
from compact_kernels.head.tokens import TokenPass
from compact_kernels.head.weighted import WeightedPass
from compact_kernels.ragged import Ragged
from compact_kernels.rule import AdaptabilityOptions, CompatibilityRule
from compact_kernels.weighting import Weighting

_op = torch.library.custom_op


# ------------------------------------------------------------------------------------------------- the weighted loss


@_op("compact_kernels::weighted_loss", mutates_args=())
def weighted_loss(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    shape: list[Tensor],  # Ragged.tensors()
    host: list[Tensor],  # the same on the CPU
    weights: Tensor | None,  # (S,)
    consensus: Tensor | None,  # (S,)
    difficulty_reference: Tensor | None,  # (S,)
    normalizer: Tensor | None,  # ()
    divergence_normalizer: Tensor | None,  # ()
    head: list[float],  # logit scale, softcap (0: none), temperature
    rule: list[float],  # β1, β2, β3, τ; ε; λ
    names: str,  # adaptability's span and length_norm, the divergence's kind and sft_reduction, between spaces
    ignore_index: int,
    workspace_mib: int,
    dtype: torch.dtype,  # of the products
    wanted: list[bool],  # gradients of hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, scalars (4,), per rationale (4, S), row weights (N,), tokens (4, N), dX, dW, db), where

    scalars are L_SFT's share, the divergence and both normalizers.
    """
    ragged = Ragged.of_tensors(shape, host)
    span, length_norm, kind, sft_reduction = names.split()
    weighting = Weighting(
        rule=CompatibilityRule(*rule[:4]),
        weights=weights,
        consensus=consensus,
        difficulty_reference=difficulty_reference,
        adaptability=AdaptabilityOptions(rule[4], span, length_norm),  # type: ignore[arg-type]
        divergence=kind,  # type: ignore[arg-type]
        divergence_weight=rule[5],
        sft_reduction=sft_reduction,  # type: ignore[arg-type]
        normalizer=normalizer,
        divergence_normalizer=divergence_normalizer,
        ignore_index=ignore_index,
    )
    if weights is None:
        arguments.check_scored(ragged, targets, ignore_index)
    call = WeightedPass(_head(weight, bias, head), targets, ragged, weighting, workspace_mib, dtype, any(wanted))
    with torch.autocast(hidden.device.type, enabled=False):
        result = call.run(hidden, weight, bias, (wanted[0], wanted[1], wanted[2]))
    loss, divergence = result.loss, result.divergence
    gradients: list[Tensor | None] = list(result.gradients)
    decision, settled = result.decision, result.weighting
    if divergence is None:
        divergence = torch.zeros_like(loss)
        if weighting.divergence_weight:  # beside the pass
            owners = [None if tensor is None else tensor.detach() for tensor in (hidden, weight, bias)]
            value, others = _divergence_beside(
                owners, ragged, decision.alpha, kind, head, workspace_mib, dtype, wanted
            )
            divergence = value.sum() * settled.divergence_normalizer
            loss = loss + weighting.divergence_weight * divergence
            scale = weighting.divergence_weight * settled.divergence_normalizer
            for i, (own, other) in enumerate(zip(result.gradients, others)):
                if own is not None and other is not None:
                    gradients[i] = own.to(loss.dtype).reshape(other.shape) + other * scale
    grads = [_or_empty(gradient, hidden, owner) for gradient, owner in zip(gradients, (hidden, weight, bias))]
    return (
        loss.clone(),
        torch.stack([result.sft, divergence, settled.normalizer, settled.divergence_normalizer]),
        torch.stack(decision[:4]),
        decision.row_weight.clone(),
        torch.stack(result.tokens),
        grads[0],
        grads[1],
        grads[2],
    )


@weighted_loss.register_fake
def _(
    hidden, weight, bias, targets, shape, host, weights, consensus, difficulty_reference, normalizer,
    divergence_normalizer, head, rule, names, ignore_index, workspace_mib, dtype, wanted,
):  # fmt: skip
    statistics = torch.promote_types(dtype, torch.float32)
    rationales, rows = shape[0].shape[0] - 1, targets.shape[0]

    def new(*sizes: Any) -> Tensor:
        return hidden.new_empty(sizes, dtype=statistics)

    return (
        new(),
        new(4),
        new(4, rationales),
        new(rows),
        new(4, rows),
        new(*hidden.shape) if wanted[0] else new(0),
        new(*weight.shape) if wanted[1] else new(0),
        new(weight.shape[0]) if wanted[2] else new(0),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias = inputs[:3]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[5:])
    ctx.count = len(inputs[4])
    ctx.wanted, ctx.dtypes = inputs[-1], (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)


def _scale_gradients(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    scaled = [
        torch.ops.compact_kernels.rescale(gradient, upstream, dtype) if wanted and upstream is not None else None
        for gradient, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted)
    ]
    return (*scaled, None, *_nothing(ctx.count), *[None] * 12)


weighted_loss.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@_op("compact_kernels::rescale", mutates_args=())
def rescale(source: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """source·factor in `dtype`."""
    return (source * factor).to(dtype)


@rescale.register_fake
def _(source, factor, dtype):
    return torch.empty_like(source, dtype=dtype)


# ---------------------------------------------------------------------------------------------------- token log-probs


@_op("compact_kernels::token_logprobs", mutates_args=())
def token_logprobs(
    x: Tensor,  # (n, D)
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,  # (n,)
    shape: list[Tensor],  # Ragged.tensors() if evidence is asked for, else empty
    host: list[Tensor],
    head: list[float],
    ignore_index: int,
    workspace_mib: int,
    dtype: torch.dtype,
    keep: bool,  # the gradient of every row's −log-prob is kept, and the entropy has none
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs (n,), entropies (n,), the other statistics (8, n), kept gradients (n, D) or nothing)."""
    ragged = Ragged.of_tensors(shape, host) if shape else None
    if ragged is not None:
        arguments.check_rows(targets, ragged)
    answers = None if ragged is None else Answers.of_batch(ragged)
    call = TokenPass(_head(weight, bias, head), targets, answers, ignore_index, workspace_mib, dtype, True)
    rows, kept = call.forward(x, weight, bias, keep)
    return rows.logprob.clone(), rows.entropy.clone(), torch.stack(rows[2:]), _or_empty(kept, x)


@token_logprobs.register_fake
def _(x, weight, bias, targets, shape, host, head, ignore_index, workspace_mib, dtype, keep):
    statistics, n = torch.promote_types(dtype, torch.float32), x.shape[0]
    table = x.new_empty((len(RowStatistics._fields) - 2, n), dtype=statistics)
    single = x.new_empty(n, dtype=statistics)
    kept = x.new_empty(x.shape) if keep else x.new_empty(0, dtype=statistics)
    return single, torch.empty_like(single), table, kept


@_op("compact_kernels::token_logprobs_backward", mutates_args=())
def token_logprobs_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    rest: Tensor,
    logprob_gradient: Tensor | None,
    entropy_gradient: Tensor | None,
    head: list[float],
    ignore_index: int,
    workspace_mib: int,
    dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dX, dW, db): the logits are made again, block of vocabulary by block."""
    call = TokenPass(_head(weight, bias, head), targets, None, ignore_index, workspace_mib, dtype, True)
    rows = RowStatistics(logprob, entropy, *rest)
    gradients = call.backward(
        x, weight, bias, rows, logprob_gradient, entropy_gradient, (wanted[0], wanted[1], wanted[2])
    )
    return tuple(_or_empty(gradient, x) for gradient in gradients)  # type: ignore[return-value]


@token_logprobs_backward.register_fake
def _(
    x, weight, bias, targets, logprob, entropy, rest, logprob_gradient, entropy_gradient, head, ignore_index,
    workspace_mib, dtype, wanted,
):  # fmt: skip
    owners = (x, weight, bias)
    return tuple(
        owner.new_empty(owner.shape) if want else rest.new_empty(0) for owner, want in zip(owners, wanted, strict=True)
    )


def _keep_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, targets, _, _, head, ignore_index, workspace_mib, dtype, keep = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, targets, *output)
    ctx.count = len(inputs[4])
    ctx.keep, ctx.rest = keep, (head, ignore_index, workspace_mib, dtype)


def _token_gradients(ctx: Any, logprob_gradient: Tensor | None, entropy_gradient: Tensor | None, *_: Any) -> Any:
    x, weight, bias, targets, logprob, entropy, rest, kept = ctx.saved_tensors
    nothing = [None, *_nothing(ctx.count), *[None] * 5]
    if logprob_gradient is None and entropy_gradient is None:
        return (None, None, None, *nothing)
    if ctx.keep and logprob_gradient is not None:
        counted = logprob_gradient.where(targets != ctx.rest[1], 0.0)  # what came to the others may be no number
        return ((kept * -counted[:, None]).to(x.dtype), None, None, *nothing)
    wanted = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.compact_kernels.token_logprobs_backward(
        x, weight, bias, targets, logprob, entropy, rest, logprob_gradient, entropy_gradient, *ctx.rest, wanted
    )
    return (*(gradient if want else None for gradient, want in zip(gradients, wanted)), *nothing)


token_logprobs.register_autograd(_token_gradients, setup_context=_keep_statistics)


def _nothing(count: int) -> tuple[list[None], list[None]]:
    """The gradients of a batch's shape, here and on the host."""
    return [None] * count, [None] * count


def _head(weight: Tensor, bias: Tensor | None, numbers: list[float]) -> LinearHead:
    scale, softcap, temperature = numbers
    return LinearHead(weight, bias, scale, softcap or None, temperature)


def _or_empty(gradient: Tensor | None, like: Tensor, owner: Tensor | None = None) -> Tensor:
    """The gradient in its owner's shape and at least float32, as the fake kernels promise; or nothing."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if gradient is None:
        return like.new_empty(0, dtype=dtype)
    return gradient if owner is None else gradient.to(dtype).reshape(owner.shape)


# ------------------------------------------------------------------------------------------------- answer divergence


@_op("compact_kernels::answer_divergence", mutates_args=())
def answer_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha: Tensor,  # (S,)
    shape: list[Tensor],
    host: list[Tensor],
    kind: str,
    head: list[float],
    workspace_mib: int,
    dtype: torch.dtype,
) -> Tensor:
    """D_q (Q,), float32 at least."""
    owners = [None if tensor is None else tensor.detach() for tensor in (hidden, weight, bias)]
    ragged = Ragged.of_tensors(shape, host)
    return _divergence_beside(owners, ragged, alpha, kind, head, workspace_mib, dtype, [False] * 3)[0]


@answer_divergence.register_fake
def _(hidden, weight, bias, alpha, shape, host, kind, head, workspace_mib, dtype):
    return hidden.new_empty(shape[1].shape[0] - 1, dtype=torch.promote_types(dtype, torch.float32))


@_op("compact_kernels::answer_divergence_backward", mutates_args=())
def answer_divergence_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha: Tensor,
    upstream: Tensor,  # (Q,)
    shape: list[Tensor],
    host: list[Tensor],
    kind: str,
    head: list[float],
    workspace_mib: int,
    dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dW, db)."""
    owners = [None if tensor is None else tensor.detach() for tensor in (hidden, weight, bias)]
    ragged = Ragged.of_tensors(shape, host)
    _, gradients = _divergence_beside(
        owners, ragged, alpha, kind, head, workspace_mib, dtype, wanted, upstream=upstream
    )
    like = [_or_empty(gradient, hidden, owner) for gradient, owner in zip(gradients, owners)]
    return like[0], like[1], like[2]


@answer_divergence_backward.register_fake
def _(hidden, weight, bias, alpha, upstream, shape, host, kind, head, workspace_mib, dtype, wanted):
    statistics = torch.promote_types(hidden.dtype, torch.float32)
    return tuple(
        hidden.new_empty(owner.shape if want else (0,), dtype=statistics)
        for owner, want in zip((hidden, weight, bias), wanted)
    )


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, bias, alpha, shape, host, *rest = inputs
    ctx.save_for_backward(hidden, weight, bias, alpha, *shape, *host)
    ctx.count, ctx.rest = len(shape), rest


def _divergence_gradients(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    hidden, weight, bias, alpha, *both = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    shape, host = both[: ctx.count], both[ctx.count :]
    gradients = torch.ops.compact_kernels.answer_divergence_backward(
        hidden, weight, bias, alpha, upstream, shape, host, *ctx.rest, wanted
    )
    given = [
        gradient.to(owner.dtype) if want else None
        for gradient, owner, want in zip(gradients, (hidden, weight, bias), wanted)
    ]
    return (*given, None, *_nothing(ctx.count), *[None] * 4)


answer_divergence.register_autograd(_divergence_gradients, setup_context=_keep_inputs)


def _divergence_beside(
    owners: list[Tensor | None],
    ragged: Ragged,
    alpha: Tensor,
    kind: str,
    head: list[float],
    workspace_mib: int,
    dtype: torch.dtype,
    wanted: list[bool],
    upstream: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """D_q and the gradients of Σ_q upstream_q D_q that are wanted."""
    hidden, weight, bias = owners
    assert hidden is not None and weight is not None
    arguments.check_packed(hidden, ragged)
    chunks = span_chunks(ragged, weight.shape[0], workspace_mib)
    call = DivergencePass(_head(weight, bias, head), ragged, kind, dtype, chunks)  # type: ignore[arg-type]
    alpha = alpha.to(torch.promote_types(dtype, torch.float32))
    with torch.autocast(hidden.device.type, enabled=False):
        value, scores = call.value(hidden, alpha)
        if not any(wanted):
            return value, [None] * 3
        upstream = torch.ones_like(value) if upstream is None else upstream
        return value, list(call.gradients(hidden, alpha, scores, upstream, (wanted[0], wanted[1], wanted[2])))


# --------------------------------------------------------------------------------------------------------- consensus


@_op("compact_kernels::question_consensus", mutates_args=())
def question_consensus(
    query: Tensor, key: Tensor, shape: list[Tensor], host: list[Tensor], temperature: float, centrality: str
) -> Tensor:
    """S_cons (S,); without a gradient."""
    from compact_kernels.ops import question_consensus as eager

    ragged = Ragged.of_tensors(shape, host)
    return eager(query, key, ragged, temperature=temperature, centrality=centrality)  # type: ignore[arg-type]


@question_consensus.register_fake
def _(query, key, shape, host, temperature, centrality):
    return query.new_empty(query.shape[0], dtype=torch.promote_types(query.dtype, torch.float32))
