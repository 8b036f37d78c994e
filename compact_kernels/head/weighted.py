"""Loss and gradients of a batch in the forward pass, its weights decided inside: 3 products, 2 with a frozen head.

For a chunk of rows: logits → unnormalised gradient rows G and statistics → α of the chunk's questions → dX = v ⊙ (G W)
and dW += Gᵀ (v ⊙ X), where v holds everything that is one number a row (α, the loss's normalisation, 1/ΣE). The
backward pass multiplies by the upstream gradient, and only if that is not 1.

A batch of which a question is larger than the workspace takes two passes: statistics of every row, the decision, then
the gradients (4 products; 2 with a frozen head, whose dX needs α only in the end).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compact_kernels import arguments
from compact_kernels.head.backend import backend_for, logits_mib, paying_mib
from compact_kernels.head.exponentials import add_to_rows
from compact_kernels.head.linear import LinearHead
from compact_kernels.head.planner import Chunk, weighted_chunks
from compact_kernels.head.rows import Answers, RowStatistics, in_rows, product, row_buffer
from compact_kernels.head.tokens import TokenPass
from compact_kernels.ragged import Ragged
from compact_kernels.rule import TokenStatistics, segment_sum
from compact_kernels.sample_norms.head import HeadNorms
from compact_kernels.weighting import Decision, Settled, Weighting, given_row_weight, settled


@dataclass(frozen=True)
class WeightedPass:
    """One call of the pass, but for the tensors that may require gradients."""

    head: LinearHead  # its weight and bias are those given to :meth:`run`, in the dtype that computes
    targets: Tensor  # (N,) of the scored rows
    ragged: Ragged
    weighting: Weighting
    workspace_mib: int
    dtype: torch.dtype  # of the products
    trains: bool  # gradients may be asked for
    norms: HeadNorms | None = None  # collects the rationales' norms of the weight's gradient

    def run(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]) -> Result:
        """Loss, statistics and the gradients that are `wanted` of (hidden, weight, bias)."""
        arguments.check_packed(hidden, self.ragged)
        arguments.check_rows(self.targets, self.ragged)
        backend = backend_for(hidden, self.dtype)
        given = self.weighting.weights is not None
        if not any(wanted):
            return self._whole_batch(backend, hidden, weight, bias, wanted)
        # The head's norms are of its whole gradient: the divergence's share has to be in the same rows.
        here = self.norms is not None or backend.folds_divergence(self.head)
        folded = bool(self.weighting.divergence_weight) and here
        workspace = logits_mib(backend, self.workspace_mib, self.dtype)
        pays = paying_mib(backend, self.workspace_mib, self.dtype, sums=wanted[1])
        if self.norms is not None:
            self.norms.start()
        chunks = weighted_chunks(
            self.ragged,
            weight.shape[0],
            self.dtype,
            workspace,
            given=given,
            divergence=folded or self.norms is not None,  # norms take whole rationales, as it takes whole questions
            pays_mib=pays,
        )
        if chunks is None:
            if self.norms is not None and self.weighting.divergence_weight:
                raise ValueError(
                    "norms of a head that trains with a divergence need a whole question's logits at once: raise "
                    "workspace_mib, or leave float16"
                )
            return self._whole_batch(backend, hidden, weight, bias, wanted)
        return self._by_chunk(backend, hidden, weight, bias, wanted, chunks, folded)

    def _by_chunk(
        self,
        backend: ModuleType,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: tuple[bool, bool, bool],
        chunks: tuple[Chunk, ...],
        folded: bool,
    ) -> Result:
        ragged, every_row = self.ragged, self.ragged.num_rows == hidden.shape[0]
        head = self.head.in_dtype(weight, bias, self.dtype)
        answers = Answers.of_batch(ragged)
        table = RowStatistics.table(ragged.num_rows, head.weight)
        most = max((chunk.last - chunk.first for chunk in chunks), default=0)
        buffer = row_buffer(most, head.vocabulary, head.weight, backend.buffer_dtype(self.dtype))

        def score(chunk: Chunk) -> Tensor:
            """The chunk's rows (n, D), whose statistics are then in the table and whose logits' gradient is stored."""
            x = in_rows(self._rows(hidden, chunk.rows), self.dtype)
            targets, stored = self.targets[chunk.rows], buffer[: chunk.last - chunk.first]
            ignored = self.weighting.ignore_index
            backend.statistics(x, head, targets, answers, ignored, table, chunk.first, stored)
            return x

        # The first product is launched before anything else: while it runs, the host prepares what comes after.
        x_c = score(chunks[0]) if chunks else hidden
        weighting = settled(self.weighting, self.targets, ragged, table.dtype)
        decision, divergence = self._room_for_decision(weighting, table)
        gradients = self._room_for_gradients(hidden, weight, wanted, buffer.dtype if len(chunks) == 1 else None)
        rows = RowStatistics(*table.unbind())
        for i, chunk in enumerate(chunks):
            if i > 0:
                x_c = score(chunk)
            rows_c = buffer[: chunk.last - chunk.first]
            if chunk.last_question:
                backend.decide(chunk, rows.tokens, self.targets, ragged, weighting, decision)
            if folded and not backend.folds_divergence(self.head):
                add_to_rows(chunk, x_c, head, rows_c, rows, ragged, weighting, decision, divergence)
            elif folded:
                backend.add_divergence(chunk, rows_c, rows, self.targets, ragged, weighting, decision, divergence)
            weight_c, inverse = decision.row_weight[chunk.rows], rows.inverse_sum[chunk.rows]
            if gradients.hidden is not None:
                out = gradients.hidden[chunk.rows] if every_row else gradients.hidden
                place = None if every_row else ragged.rows[chunk.rows]
                unscaled = product(rows_c, head.weight)
                backend.scale_rows(unscaled, weight_c, inverse, head.slope, out, place)
                del unscaled  # before the next of its size is made
            if gradients.weight is not None:
                scaled = backend.scale_rows(
                    x_c, weight_c, inverse, head.slope, torch.empty_like(x_c, dtype=buffer.dtype)
                )
                if len(chunks) == 1 and gradients.weight.dtype == buffer.dtype:
                    torch.mm(rows_c.t(), scaled, out=gradients.weight)
                elif i == len(chunks) - 1 and weight.dtype == self.dtype != gradients.weight.dtype:
                    summed = backend.last_product(rows_c, scaled, gradients.weight, weight.dtype)
                    gradients = gradients._replace(weight=summed)
                else:
                    product(rows_c.t(), scaled, out=gradients.weight, accumulate=i > 0)
                del scaled
            if gradients.bias is not None:
                factor = (weight_c * inverse * head.slope)[None]
                if factor.is_cuda:  # elsewhere it stays in float32: its rounding would be one error in every column
                    factor = factor.to(buffer.dtype)
                product(factor, rows_c, out=gradients.bias, accumulate=i > 0)
            if self.norms is not None:
                cu = ragged.sizes.cu_questions
                rationales = cu[chunk.first_question], cu[chunk.last_question]
                self.norms.add(rows_c, x_c, weight_c * inverse * head.slope, rationales, chunk.first)
        if not chunks:  # not one scored row
            for gradient in gradients:
                if gradient is not None:
                    gradient.zero_()
        if not chunks or not chunks[0].last_question:  # α was given, and rows taken as they came
            self._decide_all(backend, rows, weighting, decision)
        return self._result(weighting, decision, rows, divergence if folded else None, gradients)

    def _whole_batch(
        self,
        backend: ModuleType,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: tuple[bool, bool, bool],
    ) -> Result:
        x = self._rows(hidden)
        answers = Answers.of_batch(self.ragged)
        ignored = self.weighting.ignore_index
        call = TokenPass(self.head, self.targets, answers, ignored, self.workspace_mib, self.dtype, self.trains)
        frozen = wanted == (True, False, False) and self.dtype != torch.float16
        rows, unweighted = call.forward(x, weight, bias, frozen)
        weighting = settled(self.weighting, self.targets, self.ragged, rows.total.dtype)
        decision = Decision.empty(self.ragged, rows.total.dtype)
        self._decide_all(backend, rows, weighting, decision)
        gradients = Gradients(None, None, None)
        if any(wanted):
            if unweighted is not None:
                backend.scale_rows(unweighted, decision.row_weight, None, 1.0, unweighted)
                gradients = Gradients(unweighted, None, None)
            else:
                slope = -decision.row_weight
                gradients = Gradients(*call.backward(x, weight, bias, rows, slope, None, wanted, self.norms))
            grad_x = gradients.hidden
            if grad_x is not None and len(grad_x) < len(hidden):
                gradients = gradients._replace(
                    hidden=hidden.new_zeros(hidden.shape).index_copy_(0, self.ragged.rows, grad_x)
                )
        return self._result(weighting, decision, rows, None, gradients)

    def _rows(self, hidden: Tensor, part: slice = slice(None)) -> Tensor:  # noqa: B008  immutable
        """The scored rows, or a part of them."""
        every_row = self.ragged.num_rows == hidden.shape[0]
        return hidden[part] if every_row else hidden.index_select(0, self.ragged.rows[part])

    def _result(
        self,
        weighting: Settled,
        decision: Decision,
        rows: RowStatistics,
        per_question: Tensor | None,
        gradients: Gradients,
    ) -> Result:
        sft = -(decision.row_weight * rows.logprob).sum()
        if per_question is None:
            return Result(sft.clone(), sft, None, decision, rows.tokens, weighting, gradients)
        divergence = per_question.sum() * weighting.divergence_normalizer
        loss = sft + weighting.divergence_weight * divergence
        return Result(loss, sft, divergence, decision, rows.tokens, weighting, gradients)

    def _decide_all(self, backend: ModuleType, rows: RowStatistics, weighting: Settled, out: Decision) -> None:
        everything = Chunk(0, self.ragged.num_rows, 0, self.ragged.num_questions)
        backend.decide(everything, rows.tokens, self.targets, self.ragged, weighting, out)

    def _room_for_decision(self, weighting: Settled, table: Tensor) -> tuple[Decision, Tensor]:
        decision = Decision.empty(self.ragged, table.dtype)
        if weighting.weights is not None:
            counted = segment_sum((self.targets != weighting.ignore_index).to(table.dtype), self.ragged.cu_rows)
            alpha = weighting.weights.detach().to(table.dtype)
            decision.row_weight.copy_(given_row_weight(alpha, counted, self.ragged, weighting))
        return decision, table.new_zeros(self.ragged.num_questions)

    def _room_for_gradients(
        self,
        hidden: Tensor,
        weight: Tensor,
        wanted: tuple[bool, bool, bool],
        alone: torch.dtype | None,
    ) -> Gradients:
        """One chunk's product, `alone` in its dtype, is rounded once, to the weight's; several add up in float32."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return Gradients(
            torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None,
            weight.new_empty(weight.shape, dtype=alone if weight.dtype == alone else dtype) if wanted[1] else None,
            weight.new_empty(1, weight.shape[0], dtype=dtype) if wanted[2] else None,
        )


class Gradients(NamedTuple):
    hidden: Tensor | None  # (T, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (1, V)


class Result(NamedTuple):
    loss: Tensor
    sft: Tensor
    divergence: Tensor | None  # None: left to the caller
    decision: Decision
    tokens: TokenStatistics
    weighting: Settled
    gradients: Gradients


class WeightedLoss(torch.autograd.Function):
    """(hidden, weight, bias) → (loss, sft, divergence, *decision, *tokens, *normalizers); the loss has a gradient.

    With `call.norms` it takes their slot and, under a tied embedding, its carrier: their gradients are the norms.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: WeightedPass,
        slot: Tensor | None = None,
        carrier: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        wanted = ctx.needs_input_grad[:3] if call.trains else (False, False, False)
        with torch.autocast(hidden.device.type, enabled=False):
            result = call.run(hidden, weight, bias, wanted)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, result.decision.alpha)
        ctx.call, ctx.wanted, ctx.gradients = call, wanted, result.gradients
        both = (result.weighting.normalizer, result.weighting.divergence_normalizer)
        divergence = result.sft.new_empty(0) if result.divergence is None else result.divergence
        rest = (result.sft, divergence, *result.decision, *result.tokens, *both)
        ctx.mark_non_differentiable(*rest)
        return (result.loss, *rest)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 6
        arguments.refuse_second_derivative("compatibility_loss")
        hidden, weight, bias, alpha = ctx.saved_tensors
        # The gradients are handed over, not kept: a second backward pass (retain_graph) computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        with torch.autocast(hidden.device.type, enabled=False):
            if gradients is None:
                weighting = replace(ctx.call.weighting, weights=alpha)
                gradients = replace(ctx.call, weighting=weighting).run(hidden, weight, bias, ctx.wanted).gradients
            norms = (None, None) if ctx.call.norms is None else ctx.call.norms.gradients(upstream)
            return (*hand_over(gradients, upstream, hidden, weight, bias), None, *norms)


def hand_over(
    gradients: Gradients,
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
