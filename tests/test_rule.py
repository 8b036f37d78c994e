"""From metrics to weights: eq. 7, and what a z-score over few teachers means."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compact_kernels import CompatibilityRule, Ragged, Statistics, TokenStatistics
from compact_kernels.rule import question_softmax, question_spread, question_zscore, segment_sum
from tests import brute_force as loops

COUNTS = (3, 1, 2, 5)
METRICS = ("adaptability", "consensus", "difficulty")


def batch_of(counts: tuple[int, ...]) -> Ragged:
    return Ragged.build(
        sequence_lengths=[2] * sum(counts), prompt_lengths=[1] * sum(counts), rationales_per_question=counts
    )


def statistics_of(counts: tuple[int, ...], metrics: Tensor) -> Statistics:
    """Statistics with the given (3, S) metrics, in the order of METRICS."""
    zeros = torch.zeros(sum(counts))
    return Statistics(
        batch_of(counts), TokenStatistics(*[zeros] * 4), **dict(zip(METRICS, metrics)), targets_per_rationale=zeros
    )


@pytest.mark.parametrize("tau", [1.0, 0.3])
@pytest.mark.parametrize("beta", [(1.0, 1.0, 1.0), (0.5, 2.0, 0.0), (0.0, 0.0, 3.0)])
def test_alpha_is_eq_7(beta, tau):
    metrics = torch.randn(3, sum(COUNTS), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha = CompatibilityRule(beta[0], beta[1], beta[2], temperature=tau)(statistics_of(COUNTS, metrics))
    expected = [a for part in metrics.split(COUNTS, dim=1) for a in loops.alpha(list(zip(*part.tolist())), beta, tau)]
    torch.testing.assert_close(alpha, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(segment_sum(alpha, batch_of(COUNTS).cu_questions), torch.ones(4, dtype=torch.float64))


def test_one_rationale_has_all_the_weight_and_two_have_scores_of_one():
    metrics = 1e3 * torch.rand(3, 1)
    assert CompatibilityRule()(statistics_of((1,), metrics)).tolist() == [1.0]
    for gap in (1e-3, 1.0, 1e6):
        z = question_zscore(torch.tensor([5.0, 5.0 - gap, 2.0, 2.0 + gap]), batch_of((2, 2)))
        torch.testing.assert_close(z, torch.tensor([1.0, -1.0, -1.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 0.1, -7.3, 12345.6])
def test_a_spread_that_is_rounding_says_nothing(level, dtype):
    rounding = 1e-7 * torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=dtype)
    values = level + rounding * max(1.0, abs(level))
    assert question_zscore(values, batch_of((4,))).tolist() == [0.0] * 4
    metrics = torch.stack([values, torch.full_like(values, level), values.flip(0)])
    assert CompatibilityRule()(statistics_of((4,), metrics)).tolist() == [0.25] * 4
    real = question_zscore(level + 1e3 * rounding * max(1.0, abs(level)), batch_of((4,)))
    torch.testing.assert_close(real.square().mean(), torch.ones((), dtype=dtype), atol=1e-2, rtol=0.0)


def test_a_favourite_of_three_metrics_takes_nearly_everything_however_small_the_gaps():
    metrics = torch.tensor([[1.0, 1.001], [2.0, 2.001], [3.001, 3.0]], dtype=torch.float64)
    assert CompatibilityRule()(statistics_of((2,), metrics))[1] > 0.99


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_without_weight_changes_nothing_and_one_with_weight_does(metric):
    metrics = torch.randn(3, sum(COUNTS), generator=torch.Generator().manual_seed(1))
    before = statistics_of(COUNTS, metrics)
    other: dict[str, Any] = {metric: metrics[METRICS.index(metric)].square() + 3}
    after = replace(before, **other)
    without = CompatibilityRule(**{metric: 0.0})
    assert torch.equal(without(before), without(after))
    assert not torch.allclose(CompatibilityRule()(before), CompatibilityRule()(after))


@pytest.mark.parametrize(("metric", "sign"), list(zip(METRICS, (1, 1, -1))))
def test_more_of_a_metric_moves_weight_the_right_way(metric, sign):
    metrics = torch.zeros(3, 3)
    metrics[METRICS.index(metric), 1] = 1.0
    alpha = CompatibilityRule()(statistics_of((3,), metrics))
    assert sign * (alpha[1] - alpha[0]) > 0.2 and alpha[0] == alpha[2]


def test_scale_and_shift_of_a_metric_do_not_matter():
    metrics = torch.randn(3, sum(COUNTS), dtype=torch.float64)
    expected = CompatibilityRule()(statistics_of(COUNTS, metrics))
    torch.testing.assert_close(CompatibilityRule()(statistics_of(COUNTS, 40 * metrics - 7)), expected)


def test_spreads_are_means_and_population_deviations():
    values = torch.randn(sum(COUNTS), dtype=torch.float64)
    mean, std = question_spread(values, batch_of(COUNTS))
    for part, m, s in zip(values.split(COUNTS), mean, std):
        torch.testing.assert_close(m, part.mean())
        torch.testing.assert_close(s, part.std(correction=0))


def test_a_softmax_of_huge_scores_is_finite():
    alpha = question_softmax(torch.tensor([1e30, -1e30, 5.0, -3e38, 88.0, 89.0]), batch_of((2, 1, 3)))
    torch.testing.assert_close(alpha[:4], torch.tensor([1.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(alpha[4:], torch.tensor([88.0, 89.0]).softmax(0))


def test_sums_of_segments_include_empty_ones():
    offsets = torch.tensor([0, 0, 2, 2, 3], dtype=torch.int32)
    assert segment_sum(torch.tensor([1.0, 2.0, 4.0]), offsets).tolist() == [0.0, 3.0, 0.0, 4.0]
    assert segment_sum(torch.zeros(0), torch.tensor([0, 0])).tolist() == [0.0]
    both = segment_sum(torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]), offsets)
    assert both.tolist() == [[0.0, 3.0, 0.0, 4.0], [0.0, 24.0, 0.0, 32.0]]
