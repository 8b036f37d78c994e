"""Means over seeds and questions at once, and intervals that allow for both being samples."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean, its standard error and the degrees of freedom of that error; None where nothing varies."""

    mean: float
    se: float | None
    dof: float

    def interval(self, level: float = 0.95) -> list[float] | None:
        """The two-sided interval of a t distribution."""
        if self.se is None:
            return None
        half = self.se * t_quantile(0.5 + level / 2, self.dof)
        return [self.mean - half, self.mean + half]


def crossed(values: np.ndarray) -> Estimate:
    """The mean of a table of seeds × questions, as an estimate for other seeds *and* other questions.

    Both are random effects: value = μ + seed + question + rest. With mean squares MS of the two-way table the variance
    of the mean is (MS_seed + MS_question − MS_rest) / (S·N), at least the larger of the first two alone over S·N; its
    degrees of freedom are Satterthwaite's. One seed leaves the questions' variance alone, and the other way round:
    such an interval says nothing of what varies with what there is one of.

    Args:
        values: (S, N), without gaps.
    """
    seeds, items = values.shape
    grand = float(values.mean())
    if (values == values[0, 0]).all():  # of values that are all alike none tells how others would differ
        return Estimate(grand, None, 0.0)
    if seeds == 1 or items == 1:
        return Estimate(grand, float(values.std(ddof=1)) / math.sqrt(values.size), values.size - 1.0)
    rows, columns = values.mean(1), values.mean(0)
    rest = values - rows[:, None] - columns[None] + grand
    dofs = seeds - 1, items - 1, (seeds - 1) * (items - 1)
    squares = items * ((rows - grand) ** 2).sum(), seeds * ((columns - grand) ** 2).sum(), (rest**2).sum()
    by_seed, by_item, residual = (float(square) / dof for square, dof in zip(squares, dofs))
    variance = max(by_seed + by_item - residual, by_seed, by_item)
    if variance == 0:
        return Estimate(grand, None, 0.0)
    dof = variance**2 / (by_seed**2 / dofs[0] + by_item**2 / dofs[1] + residual**2 / dofs[2])
    return Estimate(grand, math.sqrt(variance / values.size), max(dof, float(dofs[0])))


def clustered(values: np.ndarray, seeds: np.ndarray, items: np.ndarray) -> Estimate:
    """As :func:`crossed`, where seeds were asked different questions, some of them perhaps the same.

    The variance of the mean of values with two kinds of clusters (Cameron, Gelbach and Miller 2011): by seed, plus by
    question, less that of values that are each for themselves.

    Args:
        values: of every seed and question that there is. (n,) seeds, items: which they are of. (n,)
    """
    grand = float(values.mean())
    if (values == values[0]).all():
        return Estimate(grand, None, 0.0)
    rest = values - grand
    parts = []
    for labels in (seeds, items, np.arange(len(values))):
        _, cluster = np.unique(labels, return_inverse=True)
        count = int(cluster.max()) + 1
        total = float((np.bincount(cluster, weights=rest) ** 2).sum())
        parts.append((total * count / (count - 1), count - 1) if count > 1 else (0.0, 1))
    (by_seed, _), (by_item, _), (alone, _) = parts
    variance = max(by_seed + by_item - alone, by_seed, by_item)
    dof = variance**2 / sum(part**2 / dof for part, dof in parts)
    return Estimate(grand, math.sqrt(variance) / len(values), max(dof, float(parts[0][1])))


def t_quantile(probability: float, dof: float) -> float:
    """Of Student's t, for 0.5 < probability < 1, by bisection of its integral."""
    low, high = 0.0, 1.0
    while _t_cdf(high, dof) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, dof) < probability else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, dof: float) -> float:
    """For t ≥ 0. With x = √dof·tan(u) the density is a power of a cosine: smooth, on a short interval."""
    end = math.atan(t / math.sqrt(dof))
    u = np.linspace(0.0, end, 2001)
    weights = np.ones_like(u)
    weights[1:-1:2], weights[2:-1:2] = 4, 2  # Simpson's rule
    area = float((np.cos(u) ** (dof - 1) * weights).sum()) * end / 2000 / 3
    scale = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(math.pi)
    return 0.5 + scale * area
