"""Answer divergence by itself: the answer rows of a batch through the head, a chunk of whole questions at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compact_kernels import arguments, divergence_torch
from compact_kernels.dispatch import on_its_device, triton_applies
from compact_kernels.head.backend import backend_for
from compact_kernels.head.exponentials import exponentials
from compact_kernels.head.linear import LinearHead
from compact_kernels.head.passes import product_dtype, refuse_beside_unweighted
from compact_kernels.head.rows import product
from compact_kernels.ragged import Ragged
from compact_kernels.weighting import Kind


@on_its_device
def answer_divergence(
    hidden: Tensor,
    head_weight: Tensor,
    ragged: Ragged,
    alpha: Tensor,
    *,
    kind: Kind = "kl",
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace_mib: int = 512,
) -> Tensor:
    """How much the rationales of a question disagree about the answer, on the rows that predict it.

    kl:  Σ_k α_k Σ_{j≠k} α_j KL(P_k ‖ P_j)      (eq. 9–11)
    jsd: Σ_{i<j} α_i α_j JSD(P_i ‖ P_j)          (MIND)
    each the mean over the answer's rows. Pairs whose spans differ in length are left out. α is detached.
    A probability below e⁻⁸⁷, float32's smallest number, counts as that; KL's gradient is approximate there.

    Args:
        hidden: (T, D). head_weight: (V, D). alpha: (S,).
        workspace_mib: size of the probabilities that may exist at once, in float32; a question is never split.

    Returns:
        (Q,) nats, float32 (float64 for float64 input), differentiable in `hidden` and the head.
    """
    if kind not in ("kl", "jsd"):
        raise ValueError(f"kind is {kind!r}; it is kl or jsd")
    arguments.check_packed(hidden, ragged)
    arguments.check_head(hidden, head_weight, bias)
    arguments.check_numbers(logit_scale, softcap, temperature, workspace_mib)
    arguments.check_per_rationale("alpha", alpha, ragged)
    arguments.check_weights("alpha", alpha)
    arguments.check_finite(hidden)
    dtype = product_dtype(hidden, head_weight)
    if torch.is_grad_enabled() and hidden.requires_grad:
        refuse_beside_unweighted("answer_divergence")
    if torch.compiler.is_compiling():
        numbers = LinearHead(head_weight, bias, logit_scale, softcap, temperature).numbers
        shape, host = ragged.tensors(), ragged.host.tensors()
        return torch.ops.compact_kernels.answer_divergence(
            hidden, head_weight, bias, alpha.detach(), shape, host, kind, numbers, workspace_mib, dtype
        )
    head = LinearHead(head_weight.detach(), None if bias is None else bias.detach(), logit_scale, softcap, temperature)
    call = DivergencePass(head, ragged, kind, dtype, span_chunks(ragged, head.vocabulary, workspace_mib))
    alpha = alpha.detach().to(torch.promote_types(dtype, torch.float32))
    return AnswerDivergence.apply(hidden, head_weight, bias, alpha, call)


class SpanChunk(NamedTuple):
    """Questions first … last − 1 and their entries first_span … last_span − 1 of `ragged.span_rows`."""

    first: int
    last: int
    first_span: int
    last_span: int


def span_chunks(ragged: Ragged, vocabulary: int, workspace_mib: int) -> tuple[SpanChunk, ...]:
    """As many whole questions at a time as fit the workspace in float32, but at least one."""
    capacity = (workspace_mib << 20) // (4 * max(vocabulary, 1))
    sizes = ragged.sizes
    ends = [sizes.cu_span[rationale] for rationale in sizes.cu_questions]  # span entries before each question
    chunks, first = [], 0
    for question in range(ragged.num_questions):
        following = question + 1
        if following == ragged.num_questions or ends[following + 1] - ends[first] > capacity:
            chunks.append(SpanChunk(first, following, ends[first], ends[following]))
            first = following
    return tuple(chunks)


@dataclass(frozen=True)
class DivergencePass:
    """One call of the op, but for the tensors that may require gradients."""

    head: LinearHead
    ragged: Ragged
    kind: Kind
    dtype: torch.dtype  # of the products
    chunks: tuple[SpanChunk, ...]

    def rows(self, hidden: Tensor) -> Tensor:
        """The answer rows of the packed hidden states, (G, D)."""
        return hidden.index_select(0, self._positions()).to(self.dtype)

    def value(self, hidden: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """D (Q,) and C (G,), float32."""
        x, head = self.rows(hidden), self.head.in_dtype(self.head.weight, self.head.bias, self.dtype)
        dtype = torch.promote_types(self.dtype, torch.float32)
        out = (hidden.new_empty(self.ragged.num_questions, dtype=dtype), x.new_empty(len(x), dtype=dtype))
        for chunk in self.chunks:
            e = exponentials(x[chunk.first_span : chunk.last_span], head)
            place = (self.ragged, alpha, chunk.first, chunk.last, chunk.first_span, self.kind)
            if triton_applies(x):
                from compact_kernels.divergence_triton import span_divergence

                span_divergence(e.buffer, e.sums, e.pivots, *place, masses=e.masses, gathered=True, out=out)
            else:
                divergence_torch.span_divergence(e.buffer, e.sums, *place, out)
        return out

    def gradients(
        self, hidden: Tensor, alpha: Tensor, scores: Tensor, upstream: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Σ_q upstream_q ∂D_q by hidden (T, D), weight (V, D) and bias (V,): those `wanted`; sums in float32."""
        x, head = self.rows(hidden), self.head.in_dtype(self.head.weight, self.head.bias, self.dtype)
        dtype = torch.promote_types(self.dtype, torch.float32)
        gain = alpha * upstream.to(dtype)[self.ragged.question_of_sequence] * head.slope
        grad_hidden = hidden.new_zeros(hidden.shape) if wanted[0] else None
        grad_weight = torch.zeros(head.weight.shape, dtype=dtype, device=hidden.device) if wanted[1] else None
        grad_bias = torch.zeros(head.vocabulary, dtype=dtype, device=hidden.device) if wanted[2] else None
        positions, launched = self._positions(), triton_applies(x)
        for chunk in self.chunks:
            span = slice(chunk.first_span, chunk.last_span)
            if span.start == span.stop:
                continue
            e = exponentials(x[span], head, slope=not launched)
            place = (self.ragged, alpha, chunk.first, chunk.last, chunk.first_span, self.kind, scores, gain)
            if launched:
                from compact_kernels.divergence_triton import add_span_gradient_

                add_span_gradient_(
                    e.buffer,
                    e.sums,
                    e.pivots,
                    *place,
                    masses=e.masses,
                    gathered=True,
                    replace=True,
                    softcap=head.softcap,
                    temperature=head.temperature,
                    shift=e.shift,
                )
            else:
                divergence_torch.replace_by_gradient_(e.buffer, e.sums, *place)
                if e.slope is not None:
                    e.buffer.mul_(e.slope)
            dz = e.buffer.to(backend_for(x).buffer_dtype(self.dtype))
            if grad_hidden is not None:
                grad_hidden.index_copy_(0, positions[span], product(dz, head.weight).to(hidden.dtype))
            if grad_weight is not None:
                product(dz.t(), x[span], out=grad_weight, accumulate=True)
            if grad_bias is not None:
                grad_bias += e.buffer.sum(0, dtype=dtype)
        return grad_hidden, grad_weight, grad_bias

    def _positions(self) -> Tensor:
        return self.ragged.rows[self.ragged.span_rows]


class AnswerDivergence(torch.autograd.Function):
    """(hidden, weight, bias, α) → D; the probabilities are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor, call: DivergencePass
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            value, scores = call.value(hidden, alpha)
        ctx.call = call
        ctx.save_for_backward(hidden, weight, bias, alpha, scores)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        arguments.refuse_second_derivative("answer_divergence")
        hidden, weight, bias, alpha, scores = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            found = ctx.call.gradients(hidden, alpha, scores, upstream, ctx.needs_input_grad[:3])
        leaves = (hidden, weight, bias)
        converted = [None if g is None else g.to(leaf.dtype) for g, leaf in zip(found, leaves)]
        return (*converted, None, None)
