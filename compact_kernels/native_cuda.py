"""The CUDA ops of the native library (csrc/cuda): the rule and the consensus, each in one launch, without Triton.

They take what :mod:`compact_kernels.rule_triton` and :mod:`compact_kernels.consensus` take. Nothing is read back and
nothing is copied to the device, so a launch can be part of a CUDA graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compact_kernels.native import run
from compact_kernels.ragged import Ragged
from compact_kernels.rule import AdaptabilityOptions, CompatibilityRule
from compact_kernels.weighting import Decision


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
    """Metrics, α and row weights of some questions (eq. 3, 6, 7): see :func:`compact_kernels.rule_triton.decide`."""
    if last_question <= first_question:
        return
    rule = CompatibilityRule() if rule is None else rule
    run(
        torch.ops.compact_native.decide_questions,
        logprob,
        evidence,
        targets_of_rows,
        ragged.thinking.view(torch.uint8),
        ragged.cu_questions,
        ragged.cu_rows,
        ragged.body_lengths,
        _numbers(consensus),
        _numbers(difficulty_reference),
        _numbers(weights),
        normalizer,
        *out,
        first_question,
        last_question,
        ignore_index,
        rule.adaptability,
        rule.consensus,
        rule.difficulty,
        rule.temperature,
        options.epsilon,
        options.span == "body",
        options.length_norm == "mean",
        divide_by_targets,
    )


def in_degree(query: Tensor, key: Tensor, ragged: Ragged, temperature: float = 1.0) -> Tensor:
    """S_cons (S,) float32 (eq. 4–5): see :func:`compact_kernels.consensus.in_degree`."""
    if query.dim() == 2:
        query, key = query[:, None], key[:, None]
    query, key = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key))
    degree = torch.empty(query.shape[0], dtype=torch.float32, device=query.device)
    if ragged.num_questions:
        scale, most = 1.0 / (math.sqrt(query.shape[-1]) * temperature), ragged.sizes.most_rationales
        op = torch.ops.compact_native.question_in_degree
        run(op, query, key, ragged.cu_questions, scale, most, degree)
    return degree


def _numbers(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.detach().float().contiguous()
