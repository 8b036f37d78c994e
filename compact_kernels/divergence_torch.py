"""Eq. 9 and MIND's JSD on rows of unnormalised probabilities: in C++ on CPUs, in plain torch whatever there is.

The mathematics is that of :mod:`compact_kernels.divergence_kernels`; the rows are those of `ragged.span_rows`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from compact_kernels.dispatch import native_applies
from compact_kernels.native import run
from compact_kernels.ragged import Ragged


def span_divergence(
    buffer: Tensor,
    sums: Tensor,
    ragged: Ragged,
    alpha: Tensor,
    first_question: int,
    last_question: int,
    first_row: int,
    kind: str,
    out: tuple[Tensor, Tensor],
) -> None:
    """Write D_q of the questions, and C of their answer rows (see `divergence_triton.span_divergence`)."""
    per_question, scores = out
    if native_applies(buffer):
        _in_native_code(buffer, sums, ragged, alpha, first_question, last_question, first_row, kind, *out, None)
        return
    per_question[first_question:last_question] = 0
    for question, members, entries in _classes(ragged, first_question, last_question):
        weight = alpha[members]
        p, t = _score(buffer, sums, entries - first_row, weight, kind)
        score = (p * t).sum(-1)  # (k, m)
        scores[entries] = score
        per_question[question] += (weight * score.mean(1)).sum()


def replace_by_gradient_(
    buffer: Tensor,
    sums: Tensor,
    ragged: Ragged,
    alpha: Tensor,
    first_question: int,
    last_question: int,
    first_row: int,
    kind: str,
    scores: Tensor,
    gain: Tensor,
) -> None:
    """Overwrite the answer rows by gain_k · (∂D_q/∂z) / α_k; those of a rationale without a partner by 0."""
    if native_applies(buffer):
        place = (ragged, alpha, first_question, last_question, first_row, kind)
        _in_native_code(buffer, sums, *place, sums.new_empty(last_question), scores, gain)
        return
    rows = torch.zeros_like(buffer)
    for _, members, entries in _classes(ragged, first_question, last_question):
        weight = alpha[members]
        p, t = _score(buffer, sums, entries - first_row, weight, kind)
        dz = p * (t - scores[entries][..., None])
        if kind == "kl":
            dz += _above_mean(p, weight)
        rows[entries - first_row] = dz * (gain[members] / entries.shape[1])[:, None, None]
    buffer.copy_(rows)


def _in_native_code(
    buffer: Tensor,
    sums: Tensor,
    ragged: Ragged,
    alpha: Tensor,
    first_question: int,
    last_question: int,
    first_row: int,
    kind: str,
    per_question: Tensor,
    scores: Tensor,
    gain: Tensor | None,
) -> None:
    """csrc/cpu/divergence.cpp: the value, or with a gain the gradient in place of the rows."""
    offsets = (ragged.cu_questions, ragged.cu_span, alpha.contiguous(), first_question, last_question, first_row)
    gain = None if gain is None else gain.contiguous()
    op = torch.ops.compact_native.answer_divergence
    run(op, buffer, sums.contiguous(), *offsets, kind == "jsd", per_question, scores, gain)


def _classes(ragged: Ragged, first_question: int, last_question: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Rationales of a question with spans of one length: the question, they (k,), their span entries (k, m)."""
    sizes = ragged.sizes
    for question in range(first_question, last_question):
        groups: dict[int, list[int]] = {}
        for rationale in range(sizes.cu_questions[question], sizes.cu_questions[question + 1]):
            length = sizes.cu_span[rationale + 1] - sizes.cu_span[rationale]
            groups.setdefault(length, []).append(rationale)
        for length, members in groups.items():
            if length and len(members) > 1:
                starts = torch.tensor([sizes.cu_span[rationale] for rationale in members], device=ragged.device)
                steps = torch.arange(length, device=ragged.device)
                yield question, torch.tensor(members, device=ragged.device), starts[:, None] + steps


def _score(buffer: Tensor, sums: Tensor, rows: Tensor, weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """p and t, (k, m, V): D = Σ_k α_k Σ_v p_k t_k."""
    e, total = buffer[rows], sums[rows][..., None]
    p = e / total
    logp = e.clamp_min(torch.finfo(e.dtype).tiny).log() - total.log()
    if kind == "kl":
        return p, _above_mean(logp, weight)
    t = torch.zeros_like(p)
    for other in range(len(weight)):
        mixed = torch.logaddexp(logp, logp[other]) - math.log(2.0)
        t += 0.5 * weight[other] * (logp - mixed)
    return p, t


def _above_mean(values: Tensor, weight: Tensor) -> Tensor:
    """A·values − Σ α values over a class, (k, m, V), exact where one rationale has nearly all of α."""
    values = values - values[weight.argmax()]
    return weight.sum() * values - (weight[:, None, None] * values).sum(0)
