"""Tensors in, tensors out: the weighted loss of a language model's head, its statistics and its weights.

"method §2" and "eq. 4" in docstrings are sections of docs/method.md and the papers' equations.
"""

from compact_kernels import library as library  # registers the ops
from compact_kernels.divergence import answer_divergence
from compact_kernels.ops import (
    CompatibilityOutput,
    compatibility_loss,
    linear_logprob,
    linear_token_stats,
    question_consensus,
)
from compact_kernels.ragged import Ragged
from compact_kernels.reference import question_affinity
from compact_kernels.rule import AdaptabilityOptions, CompatibilityRule, Statistics, TokenStatistics
from compact_kernels.sample_norms import SampleGradNorms, SampleNorms, sample_grad_norms

__all__ = [
    "AdaptabilityOptions",
    "CompatibilityOutput",
    "CompatibilityRule",
    "Ragged",
    "SampleGradNorms",
    "SampleNorms",
    "Statistics",
    "TokenStatistics",
    "answer_divergence",
    "compatibility_loss",
    "linear_logprob",
    "linear_token_stats",
    "question_affinity",
    "question_consensus",
    "sample_grad_norms",
]
