"""Pictures of gradient norms and of information, from what a run and :mod:`compact.influence` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from compact.pictures import (
    GREY,
    WIDTH,
    End,
    colours,
    dots,
    figure,
    label_ends,
    legend_below,
    legend_height,
    looks,
    plain,
    series,
    short_names,
    show_span,
    smooth,
)
from compact.statistics import ranks, residual


def influence(rows: Sequence[Mapping[str, Any]], teachers: Sequence[str]) -> Figure:
    """Over the steps: each teacher's weight, and the norm of the gradient that flowed through its rationales."""
    fig = figure(WIDTH, 3.2 + legend_height(teachers))
    steps = np.array([row["step"] for row in rows])
    labelled: dict[Any, list[End]] = {}
    names = short_names(teachers)
    panels = {"alpha": "Weight α", "influence": "Influence u: norm of what flowed"}
    for ax, (key, title) in zip(fig.subplots(1, 2), panels.items()):
        ends = []
        for teacher, look in looks(teachers).items():
            values = series(rows, teacher, key)
            known = np.isfinite(values)  # norms may be measured now and then
            if known.any():
                middle, _ = smooth(values[known])
                alone = "." if known.sum() == 1 else None
                ax.plot(steps[known], middle, **look, marker=alone, label=plain(names[teacher]))
                ends.append((middle[-1], names[teacher], look["color"]))
        ax.set(title=title, xlabel="optimizer step")
        ax.set_ylim(bottom=0)
        show_span(ax, steps)
        labelled[ax] = ends
    label_ends(fig, labelled, fontsize=8.5)
    return fig


def norms(arrays: Mapping[str, np.ndarray], teachers: Sequence[str]) -> Figure:
    """After training: n against length, and what is left of n's rank against the loss's, length taken out of both."""
    fig = figure(WIDTH, 3.6 + legend_height(teachers, always=True))
    left, right = fig.subplots(1, 2)
    names = short_names(teachers)
    n, length, loss = (arrays[f"{name}_after"] for name in ("n", "tokens", "difficulty"))
    fixed = ranks(length)
    rest = [residual(ranks(values), fixed) / len(n) for values in (loss, n)]
    for index, (name, colour) in enumerate(colours(teachers).items()):
        own = arrays["teacher_after"] == index
        dots(left, length[own], n[own], index, colour, plain(names[name]))
        dots(right, rest[0][own], rest[1][own], index, colour)
    left.set(title="Norm n against length", xlabel="scored tokens", ylabel="n (log)", yscale="log")
    right.set(
        title="Without length: n against loss", xlabel="rank of the loss, left over", ylabel="rank of n, left over"
    )
    right.axhline(0, color=GREY, linewidth=1)
    right.axvline(0, color=GREY, linewidth=1)
    legend_below(fig, *left.get_legend_handles_labels(), markerscale=2)
    return fig


def information(rows: Sequence[Mapping[str, Any]], teachers: Sequence[str]) -> Figure:
    """Curves over the body in the last quarter of training, and S_MI with its controls over the steps."""
    fig = figure(WIDTH, 5.8 + legend_height(teachers))
    axes = fig.subplots(2, 2)
    last = rows[-max(1, len(rows) // 4) :]
    ends: dict[Any, list[End]] = {}
    names = short_names(teachers)
    for ax, key, title in ((axes[0, 0], "proxy", "Proxy I (nats)"), (axes[0, 1], "phsic", "PHSIC")):
        ends[ax] = []
        for teacher, look in looks(teachers).items():
            curves = [row["teachers"][teacher][key] for row in last if teacher in row["teachers"]]
            if not curves:
                continue
            table = np.array(curves, dtype=float)  # null is NaN
            known = np.isfinite(table)
            middle = np.where(known, table, 0).sum(0) / np.maximum(known.sum(0), 1)
            middle[~known.any(0)] = np.nan
            place = (np.arange(len(middle)) + 0.5) / len(middle)
            ax.plot(place, middle, **look, label=plain(names[teacher]))
            if np.isfinite(middle).any():
                ends[ax].append((middle[np.isfinite(middle)][-1], names[teacher], look["color"]))
        ax.set(title=f"{title} along the body", xlabel="part of the body read", xlim=(0, 1))
    axes[0, 1].axhline(0, color=GREY, linewidth=1)
    steps = np.array([row["step"] for row in rows])
    panels = {"shuffled_mask": "S_MI − S_MI, mask shuffled", "wrong_answer": "S_MI − S_MI, another's answer"}
    for ax, (control, title) in zip(axes[1], panels.items()):
        ends[ax] = []
        for teacher, look in looks(teachers).items():
            gap = series(rows, teacher, "adaptability") - series(rows, teacher, control)
            middle, _ = smooth(gap)
            if np.isfinite(middle).any():
                ax.plot(steps, middle, **look, label=plain(names[teacher]))
                ends[ax].append((middle[np.isfinite(middle)][-1], names[teacher], look["color"]))
        ax.axhline(0, color=GREY, linewidth=1)
        ax.set(title=f"{title} (nats)", xlabel="optimizer step")
        show_span(ax, steps)
    label_ends(fig, ends, fontsize=8)
    return fig
