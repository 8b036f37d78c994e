"""The rule of :mod:`compact_kernels.rule` on the device, in one launch: token statistics → α → the weight of each row.

Nothing is read back and nothing is copied to the device, so a launch can be part of a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compact_kernels.ragged import Ragged
from compact_kernels.rule import AdaptabilityOptions, CompatibilityRule
from compact_kernels.weighting import Decision

TILE = 2048  # rationales × rows that a program holds at once


def decide(
    first_question: int,
    last_question: int,
    ragged: Ragged,
    logprob: Tensor,
    evidence: Tensor,
    targets_of_rows: Tensor,
    *,
    rule: CompatibilityRule | None,
    options: AdaptabilityOptions,
    consensus: Tensor | None,
    difficulty_reference: Tensor | None,
    normalizer: Tensor,
    divide_by_targets: bool,
    ignore_index: int,
    out: Decision,
    weights: Tensor | None = None,
) -> None:
    """Metrics, α and row weights of the questions `first_question` … `last_question − 1` (eq. 3, 6, 7).

    Only the entries of `out` that belong to those questions are written, and only the rows of those questions are
    read, so that the rest of the batch may still be unscored. One program a question; deterministic.

    Args:
        logprob, evidence: of every scored row. (N,) float32
        targets_of_rows: (N,) int64, `ignore_index` where a row has no target; `logprob` is not looked at there.
        rule: eq. 7's weights; not looked at when `weights` is given.
        consensus: S_cons; None is zeros. (S,)
        difficulty_reference: divides the mean loss (IFD). (S,)
        normalizer: R/Q or R/N (method §3). () float32 on the device
        divide_by_targets: a row weighs α·normalizer/T_k (`sft_reduction="mean"`), not α·normalizer.
        weights: α given beforehand: copied to `out.alpha`, the metrics are computed all the same. (S,)
    """
    if last_question <= first_question:
        return
    rule = CompatibilityRule() if rule is None else rule
    largest = triton.next_power_of_2(ragged.sizes.most_rationales)
    consensus, difficulty_reference, weights = (
        None if vector is None else vector.contiguous() for vector in (consensus, difficulty_reference, weights)
    )
    _decide_kernel[(last_question - first_question,)](
        logprob,
        evidence,
        targets_of_rows,
        ragged.thinking.view(torch.uint8),
        ragged.cu_questions,
        ragged.cu_rows,
        ragged.body_lengths,
        consensus,
        difficulty_reference,
        weights,
        normalizer,
        *out,
        first_question,
        ignore_index,
        float(rule.adaptability),
        float(rule.consensus),
        float(rule.difficulty),
        float(rule.temperature),
        float(options.epsilon),
        BODY_ONLY=options.span == "body",
        PER_BODY_TOKEN=options.length_norm == "mean",
        PER_TARGET=divide_by_targets,
        K=largest,
        BLOCK=max(TILE // largest, 32),
        num_warps=8,
    )


@triton.jit
def _zscore(values, m_k, count):
    """z-score over the rationales of a question, 0 where the spread is rounding. (K,)"""
    mean = tl.sum(values, 0) / count
    centred = tl.where(m_k, values - mean, 0.0)
    # The mean rounds at the size of the values, which may be far more than their spread: take away what is left.
    centred = tl.where(m_k, centred - tl.sum(centred, 0) / count, 0.0)
    std = tl.sqrt(tl.sum(centred * centred, 0) / count)
    flat = std <= 1e-6 * tl.maximum(tl.abs(mean), 1.0)
    return tl.where(flat, 0.0, centred / tl.where(flat, 1.0, std))


@triton.jit(do_not_specialize=["first_question", "ignore_index"])
def _decide_kernel(
    logprob_ptr,
    evidence_ptr,
    targets_ptr,
    thinking_ptr,
    cu_questions_ptr,
    cu_rows_ptr,
    body_ptr,
    consensus_ptr,
    reference_ptr,
    weights_ptr,
    normalizer_ptr,
    alpha_ptr,
    adaptability_ptr,
    difficulty_ptr,
    counted_ptr,
    row_weight_ptr,
    first_question,
    ignore_index,
    beta_adaptability,
    beta_consensus,
    beta_difficulty,
    temperature,
    epsilon,
    BODY_ONLY: tl.constexpr,
    PER_BODY_TOKEN: tl.constexpr,
    PER_TARGET: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One question: its K rationales (rows of a tile) × `BLOCK` steps t of each (columns), twice over.

    First S_MI = Σ_t ReLU(I_t − I_{t−1})·M_t, T_k and Σ log p, summed column by column and reduced once, so that the
    order of the sum depends on nothing but the lengths; then α; then the weight of every row.
    """
    question = first_question + tl.program_id(0)
    first = tl.load(cu_questions_ptr + question)
    count = tl.load(cu_questions_ptr + question + 1) - first
    slot = tl.arange(0, K)
    m_k = slot < count
    start = tl.load(cu_rows_ptr + first + slot, mask=m_k, other=0)
    length = tl.load(cu_rows_ptr + first + slot + 1, mask=m_k, other=0) - start
    body = tl.load(body_ptr + first + slot, mask=m_k, other=0)
    start, longest = start.to(tl.int64), tl.max(length, 0)
    last = length - 1  # the last step whose jump counts
    if BODY_ONLY:
        last = tl.minimum(last, body)

    jumps = tl.zeros((K, BLOCK), dtype=tl.float32)
    losses = tl.zeros((K, BLOCK), dtype=tl.float32)
    counts = tl.zeros((K, BLOCK), dtype=tl.float32)
    for o_step in range(0, longest, BLOCK):
        step = o_step + tl.arange(0, BLOCK)
        row = start[:, None] + step[None, :]
        m_row = step[None, :] < length[:, None]
        m_jump = (step[None, :] >= 1) & (step[None, :] <= last[:, None])
        target = tl.load(targets_ptr + row, mask=m_row, other=0)
        m_target = m_row & (target != ignore_index)
        losses -= tl.load(logprob_ptr + row, mask=m_target, other=0.0)
        counts += tl.where(m_target, 1.0, 0.0)
        now = tl.load(evidence_ptr + row, mask=m_jump, other=0.0)
        before = tl.load(evidence_ptr + row - 1, mask=m_jump, other=0.0)
        thinking = tl.load(thinking_ptr + row, mask=m_jump, other=0)
        jump = now - before
        jump = tl.where(jump < 0, 0.0, jump)  # a NaN stays one
        jumps += tl.where(thinking != 0, jump, jump * epsilon)

    adaptability = tl.sum(jumps, 1)
    if PER_BODY_TOKEN:
        adaptability = adaptability / tl.maximum(body, 1).to(tl.float32)
    counted = tl.sum(counts, 1)
    difficulty = tl.sum(losses, 1) / tl.maximum(counted, 1.0)
    if reference_ptr is not None:
        difficulty = difficulty / tl.load(reference_ptr + first + slot, mask=m_k, other=1.0).to(tl.float32)

    if weights_ptr is not None:
        alpha = tl.load(weights_ptr + first + slot, mask=m_k, other=0.0).to(tl.float32)
    else:
        score = tl.zeros((K,), dtype=tl.float32)
        if beta_adaptability != 0:  # a metric that nobody weighs may be infinite
            score += beta_adaptability * _zscore(adaptability, m_k, count)
        if beta_difficulty != 0:
            score -= beta_difficulty * _zscore(difficulty, m_k, count)
        if consensus_ptr is not None:
            if beta_consensus != 0:
                consensus = tl.load(consensus_ptr + first + slot, mask=m_k, other=0.0).to(tl.float32)
                score += beta_consensus * _zscore(consensus, m_k, count)
        score = tl.where(m_k, score / temperature, -float("inf"))
        weight = tl.exp(score - tl.max(score, 0))
        alpha = weight / tl.sum(weight, 0)

    tl.store(alpha_ptr + first + slot, alpha, mask=m_k)
    tl.store(adaptability_ptr + first + slot, adaptability, mask=m_k)
    tl.store(difficulty_ptr + first + slot, difficulty, mask=m_k)
    tl.store(counted_ptr + first + slot, counted, mask=m_k)

    weight = alpha * tl.load(normalizer_ptr)
    if PER_TARGET:
        weight = weight / tl.maximum(counted, 1.0)
    for o_step in range(0, longest, BLOCK):
        step = o_step + tl.arange(0, BLOCK)
        row = start[:, None] + step[None, :]
        m_row = step[None, :] < length[:, None]
        tl.store(row_weight_ptr + row, tl.broadcast_to(weight[:, None], (K, BLOCK)), mask=m_row)
