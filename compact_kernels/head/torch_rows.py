"""The head's row pass in plain torch, for CPUs, float64 and whatever has no Triton."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compact_kernels import native_cuda
from compact_kernels import weighting as weighting_module
from compact_kernels.dispatch import native_cuda_applies
from compact_kernels.head.linear import LinearHead
from compact_kernels.head.planner import Chunk
from compact_kernels.head.rows import Answers, RowStatistics, product
from compact_kernels.ragged import Ragged
from compact_kernels.rule import TokenStatistics
from compact_kernels.weighting import Decision, Settled


def buffer_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits and gradient rows are held in, where the head computes in `dtype`."""
    return dtype


def chunk_mib(dtype: torch.dtype, sums: bool) -> int:
    """Logits at once that pay: all there are where every chunk adds to the head's gradient, `sums`."""
    return 1 << 30 if sums else 1280


def bytes_per_logit(dtype: torch.dtype) -> int:
    """What a logit takes while a chunk is worked on: three numbers of at least float32, one of the products' dtype."""
    return 3 * torch.promote_types(dtype, torch.float32).itemsize + dtype.itemsize


def statistics(
    x: Tensor,
    head: LinearHead,
    targets: Tensor,
    answers: Answers | None,
    ignore_index: int,
    table: Tensor,
    first_row: int,
    buffer: Tensor | None = None,
) -> None:
    """Statistics of the rows x (n, D), into the table's columns from `first_row` on.

    With a `buffer` (n, V), also their gradient rows, (p − e_target)∘slope.
    """
    z = head(x)  # (n, V)
    counted = targets != ignore_index
    column = targets.where(counted, 0)[:, None]
    slope = None if head.softcap is None or buffer is None else capped_slope(z, head)
    target_slope = capped_slope(z.gather(1, column).squeeze(1), head)
    pivot = z.amax(-1, keepdim=True)
    logp = z.sub_(pivot)  # z − log-sum-exp would round at the size of the logits
    target_mass = logp.gather(1, column).squeeze(1).exp()
    total = logp.exp().sum(-1, keepdim=True)
    logp -= total.log()
    logprob = logp.gather(1, column).squeeze(1)
    if answers is None:
        evidence = torch.zeros_like(logprob)
    else:
        ids, asked = padded_answers(answers)
        row = torch.arange(first_row, first_row + x.shape[0], device=x.device)
        owner = torch.searchsorted(answers.cu_rows[1:].long(), row, right=True)
        asked = asked[owner]
        evidence = logp.gather(1, ids[owner]).where(asked, 0.0).sum(-1) / asked.sum(-1).clamp_min(1)
    p = logp.exp_()
    entropy = torch.special.entr(p).sum(-1)
    p.scatter_(1, column, 0.0)  # the others: p_target − 1 = −Σ of them, without cancellation for confident tokens
    others = p.sum(-1)
    grad_norm = (others.square() + torch.linalg.vector_norm(p, dim=-1).square()).sqrt()
    # log p of a confident token is −log1p of what the others weigh against it.
    logprob = torch.where(others < 0.5, torch.log1p(-others.clamp_max(0.5)), logprob)
    if buffer is not None:
        p.scatter_(1, column, -others[:, None])
        if slope is not None:
            p *= slope
        buffer.copy_(p)
    rows = RowStatistics(
        logprob=logprob.where(counted, 0.0),
        entropy=entropy,
        evidence=evidence,
        grad_norm=grad_norm.where(counted, 0.0),
        others=others,
        inverse_sum=counted.to(others.dtype),
        pivot=pivot.squeeze(1),
        total=total.squeeze(1),
        target_mass=target_mass,
        target_slope=target_slope,
    )
    torch.stack(rows, out=table[:, first_row : first_row + x.shape[0]])


def gradient_block(
    x: Tensor,
    head: LinearHead,
    targets: Tensor,
    rows: RowStatistics,
    slope: Tensor,
    curve: Tensor | None,
    target_gradient: Tensor,
    first_column: int,
    block: Tensor,
) -> None:
    """Fill `block` (n, width), columns first_column …, with exp(u)·(slope + curve·u), u = z − pivot.

    The target's entry is given.
    """
    width = block.shape[1]
    columns = slice(first_column, first_column + width)
    bias = None if head.bias is None else head.bias[columns]
    z = LinearHead(head.weight[columns], bias, head.logit_scale, head.softcap, head.temperature)(x)
    u = z - rows.pivot[:, None]
    gradient = u.exp()
    factor = slope[:, None]
    if curve is not None:  # exp(u)·u is 0 for a forbidden token, whose logit is −∞
        factor = factor + curve[:, None] * u.clamp_min(-1e4)
    gradient *= factor
    if head.softcap is not None:
        gradient *= capped_slope(z, head)
    block.copy_(gradient)
    column = targets - first_column
    here = (column >= 0) & (column < width)
    column = column.where(here, 0)[:, None]
    value = target_gradient[:, None].to(block.dtype).where(here[:, None], block.gather(1, column))
    block.scatter_(1, column, value)


def last_product(rows: Tensor, x: Tensor, sums: Tensor, dtype: torch.dtype) -> Tensor:
    """sums + rowsᵀ x in `dtype`: rows (n, V), x (n, D), sums (V, D)."""
    return product(rows.t(), x, out=sums, accumulate=True).to(dtype)


def scale_rows(
    source: Tensor,
    first: Tensor,
    second: Tensor | None,
    constant: float,
    out: Tensor,
    place: Tensor | None = None,
) -> Tensor:
    """out[place[i]] = source[i]·first[i]·second[i]·constant, rounded once to out's dtype.

    A source that is put in places is scaled where it lies, to save its size.
    """
    factor = (first * constant if second is None else first * second * constant)[:, None]
    if place is not None:
        return out.index_copy_(0, place, source.mul_(factor).to(out.dtype))
    return torch.mul(source, factor, out=out)


def rescale(source: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """source·factor in `dtype`; in place if source has it."""
    return source.mul_(factor) if source.dtype == dtype else (source * factor).to(dtype)


def capped_slope(z: Tensor, head: LinearHead) -> Tensor:
    """1 − tanh², the softcap's own part of dz/draw."""
    if head.softcap is None:
        return torch.ones_like(z)
    return 1 - (z * head.temperature / head.softcap).square()


def padded_answers(answers: Answers) -> tuple[Tensor, Tensor]:
    """Answer ids as a matrix (S, m), and which of its entries exist."""
    counts = answers.cu_ids.diff()
    slot = torch.arange(answers.most, device=counts.device)
    asked = slot < counts[:, None]
    place = (answers.cu_ids[:-1].long()[:, None] + slot).clamp_max(answers.ids.numel() - 1)
    return answers.ids[place], asked


def decide(
    chunk: Chunk, tokens: TokenStatistics, targets: Tensor, ragged: Ragged, weighting: Settled, out: Decision
) -> None:
    """Write the decision about the chunk's questions into that of the batch."""
    if tokens.logprob.dtype == torch.float32 and native_cuda_applies(tokens.logprob):
        first, last, options = chunk.first_question, chunk.last_question, weighting.for_one_launch
        native_cuda.decide(first, last, ragged, tokens.logprob, tokens.evidence, targets, **options, out=out)
        return
    part = ragged.questions(chunk.first_question, chunk.last_question)
    questions = ragged.sizes.cu_questions
    rationales = slice(questions[chunk.first_question], questions[chunk.last_question])
    rows = chunk.rows
    own = replace(
        weighting,
        weights=None if weighting.weights is None else weighting.weights[rationales],
        consensus=None if weighting.consensus is None else weighting.consensus[rationales],
        difficulty_reference=None
        if weighting.difficulty_reference is None
        else weighting.difficulty_reference[rationales],
    )
    decision, _ = weighting_module.decide(TokenStatistics(*(t[rows] for t in tokens)), targets[rows], part, own)
    for whole, piece in zip(out[:4], decision[:4]):
        whole[rationales] = piece
    out.row_weight[rows] = decision.row_weight


def folds_divergence(head: LinearHead) -> bool:
    """Whether the weighted pass can take the answers' divergence along: not here."""
    return False
