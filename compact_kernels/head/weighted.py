"""Loss and gradients in one pass over the head, the weights decided inside it: 3 products, 2 with a frozen head.

For a chunk of rows: logits → unnormalised gradient rows G and statistics → α of the chunk's questions → dX = v ⊙ (G W)
and dW += Gᵀ (v ⊙ X), where v holds everything that is one number a row (α, the loss's normalisation, 1/ΣE). The
backward pass multiplies by the upstream gradient, and only if that is not 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compact_kernels.head.backend import backend_for
from compact_kernels.head.linear import LinearHead
from compact_kernels.head.planner import Chunk
from compact_kernels.head.rows import Answers, product, row_buffer
from compact_kernels.ragged import Ragged
from compact_kernels.rule import TokenStatistics
from compact_kernels.weighting import Decision, Weighting, given_row_weight, segment_sum


@dataclass(frozen=True)
class WeightedPass:
    """One call of the pass, but for the tensors that may require gradients."""

    head: LinearHead  # its weight and bias are those given to :meth:`run`, in the dtype that computes
    targets: Tensor  # (N,) of the scored rows
    ragged: Ragged
    weighting: Weighting
    folded: bool  # the divergence is part of this pass
    chunks: tuple[Chunk, ...]
    dtype: torch.dtype  # of the products

    def run(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]) -> Result:
        """Loss, statistics and the gradients that are `wanted` of (hidden, weight, bias)."""
        ragged, weighting = self.ragged, self.weighting
        head = replace(self.head, weight=weight.to(self.dtype), bias=None if bias is None else bias.to(self.dtype))
        backend = backend_for(hidden, self.dtype)
        every_row = ragged.num_rows == hidden.shape[0]
        x = (hidden if every_row else hidden.index_select(0, ragged.rows)).to(self.dtype)
        answers = Answers.of_batch(ragged)
        stat_dtype = torch.promote_types(self.dtype, torch.float32)
        tokens = TokenStatistics(*hidden.new_empty((4, ragged.num_rows), dtype=stat_dtype).unbind())
        decision = Decision.empty(ragged, stat_dtype)
        if given := weighting.weights is not None:
            counted = segment_sum((self.targets != weighting.ignore_index).to(stat_dtype), ragged.cu_rows)
            alpha = weighting.weights.detach().to(stat_dtype)
            decision.row_weight.copy_(given_row_weight(alpha, counted, ragged, weighting))
        divergence = hidden.new_zeros(ragged.num_questions, dtype=stat_dtype)

        largest = max((chunk.last - chunk.first for chunk in self.chunks), default=0)
        buffer = row_buffer(largest, head.vocabulary, x)
        wants_hidden, wants_weight, wants_bias = wanted
        grad_hidden = None
        if wants_hidden:
            grad_hidden = torch.empty_like(hidden) if every_row else torch.zeros_like(hidden)
        grad_weight = self._room_for_weight(weight) if wants_weight else None
        grad_bias = head.weight.new_empty(1, head.vocabulary, dtype=stat_dtype) if wants_bias else None

        for i, chunk in enumerate(self.chunks):
            x_c, targets = x[chunk.rows], self.targets[chunk.rows]
            rows_c = buffer[: chunk.last - chunk.first]
            asked = None if answers is None else answers.of(chunk.rows)
            statistics = backend.statistics(x_c, head, targets, asked, weighting.ignore_index, rows_c)
            for whole, part in zip(tokens, statistics):
                whole[chunk.rows] = part
            if chunk.last_question:
                backend.decide(chunk, tokens, self.targets, ragged, weighting, decision)
                if self.folded:
                    backend.add_divergence(
                        chunk, rows_c, statistics, self.targets, ragged, weighting, decision, divergence
                    )
            weight_c = decision.row_weight[chunk.rows]
            if grad_hidden is not None:
                unscaled = product(rows_c, head.weight)
                place = None if every_row else ragged.rows[chunk.rows]
                out = grad_hidden[chunk.rows] if every_row else grad_hidden
                backend.scale_rows(unscaled, weight_c, statistics.inverse_sum, head.slope, out, place)
            if grad_weight is not None:
                weighted = backend.scale_rows(x_c, weight_c, statistics.inverse_sum, head.slope, torch.empty_like(x_c))
                if grad_weight.dtype == self.dtype:
                    torch.mm(rows_c.t(), weighted, out=grad_weight)
                else:
                    product(rows_c.t(), weighted, out=grad_weight, accumulate=i > 0)
            if grad_bias is not None:
                factor = (weight_c * statistics.inverse_sum * head.slope).to(self.dtype)[None]
                product(factor, rows_c, out=grad_bias, accumulate=i > 0)
        if not self.chunks:
            for gradient in (grad_weight, grad_bias):
                if gradient is not None:
                    gradient.zero_()
        if given or not self.chunks:
            everything = Chunk(0, ragged.num_rows, 0, ragged.num_questions)
            if not (self.chunks and self.chunks[0].last_question):
                backend.decide(everything, tokens, self.targets, ragged, weighting, decision)
        sft = -(decision.row_weight * tokens.logprob).sum()
        mixed = divergence.sum() * weighting.divergence_normalizer
        return Result(
            loss=sft + weighting.divergence_weight * mixed if self.folded else sft.clone(),
            sft=sft,
            divergence=mixed,
            decision=decision,
            tokens=tokens,
            gradients=(grad_hidden, grad_weight, grad_bias),
        )

    def _room_for_weight(self, weight: Tensor) -> Tensor:
        """One chunk's product is rounded once, to the weight's dtype; several add up in float32."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        if len(self.chunks) == 1 and weight.dtype == self.dtype:
            dtype = self.dtype
        return torch.empty(weight.shape, dtype=dtype, device=weight.device)


class Result(NamedTuple):
    loss: Tensor
    sft: Tensor
    divergence: Tensor
    decision: Decision
    tokens: TokenStatistics
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


class WeightedLoss(torch.autograd.Function):
    """(hidden, weight, bias) → (loss, sft, divergence, *decision, *tokens); only the loss has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: WeightedPass
    ) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            result = call.run(hidden, weight, bias, wanted)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, result.decision.alpha)
        ctx.call, ctx.wanted, ctx.gradients = call, wanted, result.gradients
        rest = (result.sft, result.divergence, *result.decision, *result.tokens)
        ctx.mark_non_differentiable(*rest)
        return (result.loss, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None, None
        hidden, weight, bias, alpha = ctx.saved_tensors
        # The gradients are handed over, not kept: a second backward pass (retain_graph) computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        with torch.autocast(hidden.device.type, enabled=False):
            if gradients is None:
                weighting = replace(ctx.call.weighting, weights=alpha)
                gradients = replace(ctx.call, weighting=weighting).run(hidden, weight, bias, ctx.wanted).gradients
            return (*hand_over(gradients, upstream, hidden, weight, bias), None)


def hand_over(
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients times the upstream one, in the dtypes of what they belong to."""
    backend = backend_for(hidden)
    result: list[Tensor | None] = []
    for gradient, owner in zip(gradients, (hidden, weight, bias)):
        if gradient is None or owner is None:
            result.append(None)
        else:
            result.append(backend.rescale(gradient, upstream, owner.dtype).reshape(owner.shape))
    return tuple(result)
