"""Per-token log-probs as a differentiable output: any upstream gradient, any rule, α from the whole batch.

With a frozen head one pass is enough: a row's gradient is its upstream number times (e_y − p) W, which the forward
pass leaves behind. Otherwise, and for the entropy's gradient, the logits are made again in the backward pass, block
of vocabulary by block, so that every part of the weight's gradient is written once and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compact_kernels.arguments import refuse_second_derivative
from compact_kernels.head.backend import backend_for, paying_mib
from compact_kernels.head.linear import LinearHead
from compact_kernels.head.planner import row_chunks, rows_that_fit, vocabulary_blocks
from compact_kernels.head.rows import Answers, RowStatistics, in_rows, product, row_buffer
from compact_kernels.sample_norms.head import HeadNorms


@dataclass(frozen=True)
class TokenPass:
    """One call of the pass, but for the tensors that may require gradients."""

    head: LinearHead  # its weight and bias are those given to the methods, in the dtype that computes
    targets: Tensor  # (n,)
    answers: Answers | None
    ignore_index: int
    workspace_mib: int
    dtype: torch.dtype  # of the products
    trains: bool  # gradients may be asked for
    norms: HeadNorms | None = None  # collects the rationales' norms of the weight's gradient

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool
    ) -> tuple[RowStatistics, Tensor | None]:
        """Statistics of the rows x (n, D), and if `keep` the gradient of each row's −log-prob, (n, D)."""
        head, x_d = self.head.in_dtype(weight, bias, self.dtype), in_rows(x, self.dtype)
        backend = backend_for(x, self.dtype)
        workspace = paying_mib(backend, self.workspace_mib, self.dtype)
        chunks = row_chunks(x.shape[0], rows_that_fit(workspace, head.vocabulary, self.dtype))
        kept = x.new_empty(x.shape) if keep else None
        size = max((chunk.last - chunk.first for chunk in chunks), default=0)
        buffer = row_buffer(size, head.vocabulary, x_d, backend.buffer_dtype(self.dtype)) if keep else None
        table = RowStatistics.table(x.shape[0], x)
        for chunk in chunks:
            x_c, targets = x_d[chunk.rows], self.targets[chunk.rows]
            rows_c = None if buffer is None else buffer[: chunk.last - chunk.first]
            backend.statistics(x_c, head, targets, self.answers, self.ignore_index, table, chunk.first, rows_c)
            if kept is not None and rows_c is not None:
                unscaled = product(rows_c, head.weight)
                inverse = RowStatistics(*table[:, chunk.rows]).inverse_sum
                backend.scale_rows(unscaled, inverse, None, head.slope, kept[chunk.rows])
        return RowStatistics(*table.unbind()), kept

    def backward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: RowStatistics,
        logprob_gradient: Tensor | None,
        entropy_gradient: Tensor | None,
        wanted: tuple[bool, bool, bool],
        norms: HeadNorms | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of Σ logprob·logprob_gradient + entropy·entropy_gradient.

        ∂/∂z_v = g·(1[v = y] − p_v) − h·p_v (log p_v + H), and log p = u − log ΣE with u = z − pivot, p = exp(u)/ΣE:
        exp(u)·(a + b·u) with two numbers a row, but for the target's entry, which g·(1 − p) would cancel in.
        """
        head, x_d = self.head.in_dtype(weight, bias, self.dtype), in_rows(x, self.dtype)
        backend = backend_for(x, self.dtype)
        counted = self.targets != self.ignore_index
        zeros = torch.zeros_like(rows.total)
        g = zeros if logprob_gradient is None else logprob_gradient.to(zeros.dtype).where(counted, 0.0)
        slope, curve, at_target = -g, None, g * rows.others
        if entropy_gradient is not None:
            h = entropy_gradient.to(zeros.dtype)
            slope = slope - h * (rows.entropy - rows.total.log())
            curve = -h / rows.total * head.slope
            logprob = rows.logprob.clamp_min(-1e4)  # −∞ where the target is forbidden, and its mass 0
            at_target = at_target - h * rows.target_mass / rows.total * (logprob + rows.entropy)
        slope = slope / rows.total * head.slope
        at_target = at_target * rows.target_slope * head.slope

        wants_x, wants_weight, wants_bias = wanted
        sum_dtype = torch.promote_types(self.dtype, torch.float32)
        grad_x = torch.zeros(x.shape, dtype=sum_dtype, device=x.device) if wants_x else None
        grad_weight = weight.new_empty(weight.shape) if wants_weight else None
        grad_bias = torch.empty_like(bias) if wants_bias and bias is not None else None
        workspace = paying_mib(backend, self.workspace_mib, self.dtype)
        blocks = vocabulary_blocks(head.vocabulary, x.shape[0], workspace, self.dtype)
        width = max(last - first for first, last in blocks)
        buffer = row_buffer(x.shape[0], width, x_d, backend.buffer_dtype(self.dtype))
        ones = buffer.new_ones(1, x.shape[0])
        if norms is not None:
            norms.start()
        for first, last in blocks:
            block = buffer[:, : last - first]
            backend.gradient_block(x_d, head, self.targets, rows, slope, curve, at_target, first, block)
            if grad_x is not None:
                product(block, head.weight[first:last], out=grad_x, accumulate=True)
            if grad_weight is not None:
                if grad_weight.dtype == block.dtype == x_d.dtype:
                    torch.mm(block.t(), x_d, out=grad_weight[first:last])
                else:
                    product(block.t(), x_d, out=grad_weight[first:last])
            if grad_bias is not None:
                grad_bias[first:last] = product(ones, block)[0]
            if norms is not None:
                norms.add(block, x_d, None, first_column=first)
        return None if grad_x is None else grad_x.to(x.dtype), grad_weight, grad_bias


class TokenLogprobs(torch.autograd.Function):
    """(x, weight, bias) → (logprob, entropy, evidence, grad_norm); the first two have gradients.

    With `call.norms` it takes their slot and, under a tied embedding, its carrier: their gradients are the norms.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: TokenPass,
        slot: Tensor | None = None,
        carrier: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        frozen = wants_x and not wants_weight and not wants_bias
        keep = call.trains and frozen and call.dtype != torch.float16
        with torch.autocast(x.device.type, enabled=False):
            rows, kept = call.forward(x, weight, bias, keep)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, kept, call.targets, *rows)  # targets: so that a change is an error
        ctx.call, ctx.wanted = call, (wants_x, wants_weight, wants_bias)
        ctx.mark_non_differentiable(rows.evidence, rows.grad_norm)
        # Fresh tensors: an output that is also saved would keep its own graph alive.
        return rows.logprob.clone(), rows.entropy.clone(), rows.evidence, rows.grad_norm

    @staticmethod
    def backward(ctx: Any, logprob: Tensor | None, entropy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("the head's log-prob")
        x, weight, bias, kept, targets, *rows = ctx.saved_tensors
        if logprob is None and entropy is None:
            return (None,) * 6
        call = ctx.call
        with torch.autocast(x.device.type, enabled=False):
            if kept is not None and logprob is not None and entropy is None:
                counted = logprob.where(targets != call.ignore_index, 0.0)  # what came to the others may be no number
                backend = backend_for(x, call.dtype)
                return (backend.scale_rows(kept, counted, None, -1.0, x.new_empty(x.shape)), *(None,) * 5)
            rows = RowStatistics(*rows)
            gradients = call.backward(x, weight, bias, rows, logprob, entropy, ctx.wanted, call.norms)
            norms = (None, None) if call.norms is None else call.norms.gradients(rows.total.new_ones(()))
            return (*gradients, None, *norms)
