"""Pictures of the student's inside, from the arrays of :func:`compact.states.read_states`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from compact.metrics import PEAK, SIGNS
from compact.pictures import (
    ACCENT,
    GREY,
    WIDTH,
    colours,
    dots,
    figure,
    legend_below,
    legend_height,
    plain,
    short_names,
)
from compact.statistics import pca_shift


def figures(arrays: Mapping[str, np.ndarray], teachers: Sequence[str]) -> dict[str, Figure]:
    """By name; t-SNE is there where scikit-learn is."""
    out = {"latent": latent(arrays, teachers), "metrics": metrics(arrays, teachers)}
    out["evidence"] = evidence(arrays, teachers)
    try:
        points = tsne(np.concatenate([arrays["last_before"], arrays["last_after"]]))
    except ModuleNotFoundError:
        return out
    half = len(points) // 2
    out["tsne"] = _clouds(points[:half], points[half:], arrays["teacher_before"], teachers, "t-SNE of the last states")
    return out


def tsne(points: np.ndarray, seed: int = 0) -> np.ndarray:
    """(n, d) → (n, 2).

    Raises:
        ModuleNotFoundError: scikit-learn is not installed, and how to get it.
    """
    try:
        from sklearn.manifold import TSNE
    except ModuleNotFoundError as error:
        message = "the t-SNE picture needs scikit-learn: pip install scikit-learn, or the extra `tsne`"
        raise ModuleNotFoundError(message, name=error.name) from error
    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(points.astype(np.float64))


def latent(arrays: Mapping[str, np.ndarray], teachers: Sequence[str]) -> Figure:
    """Mean states before and after in the main plane of those before."""
    plane = pca_shift(arrays["pooled_before"], arrays["pooled_after"])
    title = "Main plane of the mean states before"
    return _clouds(plane["before"], plane["after"], arrays["teacher_before"], teachers, title)


def metrics(arrays: Mapping[str, np.ndarray], teachers: Sequence[str]) -> Figure:
    """Mean z-score of each metric for each teacher, signed as it enters the score."""
    return _bars(arrays, teachers, [f"z_{name}" for name in SIGNS], [f"{name}" for name in SIGNS])


def evidence(arrays: Mapping[str, np.ndarray], teachers: Sequence[str]) -> Figure:
    """Jumps of the evidence: how many count as peaks, the largest, all together."""
    titles = [f"jumps above {PEAK} nats", "largest jump, nats", "whole rise, nats"]
    return _bars(arrays, teachers, ["peaks", "sharpest", "rise"], titles)


def _clouds(before: np.ndarray, after: np.ndarray, teacher: np.ndarray, teachers: Sequence[str], title: str) -> Figure:
    fig = figure(WIDTH, 4.2 + legend_height(teachers))
    axes = fig.subplots(1, 2, sharex=True, sharey=True)
    names = short_names(teachers)
    for ax, points, when in zip(axes, (before, after), ("before", "after")):
        for index, (name, colour) in enumerate(colours(teachers).items()):
            own = points[teacher == index]
            dots(ax, own[:, 0], own[:, 1], index, colour, plain(names[name]))
        ax.set_title(f"{when} training")
    if legend_height(teachers):
        legend_below(fig, *axes[0].get_legend_handles_labels(), markerscale=2)
    else:
        axes[0].legend(loc="best", fontsize=8, markerscale=2)
    fig.suptitle(title, fontsize=10)
    return fig


def _bars(
    arrays: Mapping[str, np.ndarray], teachers: Sequence[str], columns: Sequence[str], titles: Sequence[str]
) -> Figure:
    """A panel a column: each teacher's mean before (grey) and after, with two standard errors."""
    fig = figure(WIDTH, 1.2 + 0.5 * len(teachers))
    axes, drawn = fig.subplots(1, len(columns), sharey=True), {}
    for ax, column, title in zip(axes, columns, titles):
        for y, _ in enumerate(teachers):
            for when, colour, shift in (("before", GREY, -0.15), ("after", ACCENT, 0.15)):
                own = arrays[f"{column}_{when}"][arrays[f"teacher_{when}"] == y]
                if len(own):
                    error = 2 * own.std() / np.sqrt(len(own))
                    bar = ax.errorbar(own.mean(), y + shift, xerr=error, fmt="o", color=colour, markersize=5)
                    drawn[f"{when} training"] = bar
        ax.axvline(0, color=GREY, linewidth=0.8)
        ax.set_title(title)
    axes[0].set_yticks(range(len(teachers)), [plain(name) for name in short_names(teachers).values()])
    axes[0].invert_yaxis()
    fig.legend(drawn.values(), drawn, loc="outside lower center", ncols=2, fontsize=8)
    return fig
