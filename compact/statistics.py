"""Numbers about numbers: shares and means, over seeds and questions at once, correlations, and how states compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# ---------------------------------------------------------------------------------------------------- shares and means


def wilson(right: int, n: int, z: float = 1.96) -> list[float]:
    """95% interval of a share; unlike p ± 1.96 se it has a width at 0 and at 1."""
    p = right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of n ≥ 2 values."""
    if len(values) < 2:
        return None
    middle = sum(values) / len(values)
    return math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values))


def binomial_error(right: int, n: int) -> float:
    return math.sqrt(right * (n - right) / n) / n


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided test that a changed item is as likely lost as won."""
    changed = lost + won
    tail = sum(math.comb(changed, i) for i in range(min(lost, won) + 1)) / 2**changed
    return min(1.0, 2 * tail)


# -------------------------------------------------------------------------------------------- over seeds and questions


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
    if variance == 0:  # what varies cancels in every seed and question: nothing tells how far
        return Estimate(grand, None, 0.0)
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


# -------------------------------------------------------------------------------------------------------- correlations


def ranks(values: np.ndarray) -> np.ndarray:
    """0 … n − 1, ties sharing their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return (last - (counts - 1) / 2)[place]


def residual(values: np.ndarray, *given: np.ndarray) -> np.ndarray:
    """What is left of the values when a linear function of `given` has explained what it can."""
    known = np.stack([np.ones(len(values)), *given], axis=1)
    return values - known @ np.linalg.lstsq(known, values, rcond=None)[0]


def spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    """Rank correlation; None where one of them does not vary."""
    return _correlation(ranks(one), ranks(other))


def partial_spearman(one: np.ndarray, other: np.ndarray, *given: np.ndarray) -> float | None:
    """Rank correlation with the ranks of all `given` partialled out of both."""
    fixed = [ranks(values) for values in given]
    return _correlation(residual(ranks(one), *fixed), residual(ranks(other), *fixed))


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    x, y = one - one.mean(), other - other.mean()
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / size if size > 1e-9 * len(x) else None


# -------------------------------------------------------------------------------------------------------------- states


def linear_cka(one: np.ndarray, other: np.ndarray) -> float | None:
    """Linear centred kernel alignment of two representations of the same items (Kornblith et al. 2019), in [0, 1].

    Args:
        one, other: (n, d) and (n, e).
    """
    x, y = (value.astype(np.float64) - value.mean(0, dtype=np.float64) for value in (one, other))
    cross, own, theirs = (np.linalg.norm(a.T @ b) for a, b in ((x, y), (x, x), (y, y)))
    return float(cross**2 / (own * theirs)) if own > 0 and theirs > 0 else None


def chance_of_cka(one: np.ndarray, other: np.ndarray, draws: int = 10) -> float | None:
    """Its mean where the items of `other` are shuffled: far above 0 where they are few beside the dimensions."""
    rng = np.random.default_rng(0)
    found = [linear_cka(one, other[rng.permutation(len(other))]) for _ in range(draws)]
    return mean([value for value in found if value is not None])


def pca_shift(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Both in the plane of the two main directions of `before`, and how far the centre has moved.

    Returns:
        before, after: (n, 2); shift: the distance of the centroids in the plane over the root mean square distance
        of `before` from its own.
    """
    centre = before.mean(0, dtype=np.float64)
    _, _, directions = np.linalg.svd(before.astype(np.float64) - centre, full_matrices=False)
    points = [(value.astype(np.float64) - centre) @ directions[:2].T for value in (before, after)]
    spread = math.sqrt(float((points[0] ** 2).sum(1).mean()))
    moved = float(np.linalg.norm(points[1].mean(0) - points[0].mean(0)))
    return {"before": points[0], "after": points[1], "shift": moved / spread if spread else None}


def auc(score: np.ndarray, wrong: np.ndarray) -> float | None:
    """How often a right rationale scores above a wrong one, ties counted half; 0.5 is chance. None: only one kind."""
    right, bad = score[~wrong.astype(bool)], score[wrong.astype(bool)]
    if not len(right) or not len(bad):
        return None
    return float((right[:, None] > bad).mean() + 0.5 * (right[:, None] == bad).mean())
