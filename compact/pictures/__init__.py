"""The pictures of a run: matplotlib figures from plain values. Nothing of the importer's matplotlib is changed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from compact.metrics import EQUAL
from compact.results import SPLITS

End = tuple[float, str, str]  # of a line: its last value, its name, its colour
WIDTH = 9.0  # inches; at 160 dots an inch a README shows it at about half size
PALETTE = ("#2F6DB5", "#E1812C", "#2E9C74", "#C44536", "#7D5BA6", "#20A4B8", "#B3568B", "#8A7A3B")
INK, GREY, FAINT, AMBER = "#22272E", "#8B949E", "#E4E7EB", "#F5D48A"
ACCENT = "#4338A8"  # the student after training; no teacher's colour
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}


def style() -> AbstractContextManager[None]:
    """Draw and save inside it."""
    return matplotlib.rc_context(STYLE)


def colours(teachers: Sequence[str]) -> dict[str, str]:
    """A colour for each teacher, the same in every picture of a run."""
    return {teacher: PALETTE[i % len(PALETTE)] for i, teacher in enumerate(teachers)}


def looks(teachers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each teacher's line is drawn: where the colours come again, in other dashes."""
    return {
        teacher: {"color": colour, "linestyle": _again(i, ("-", "--", ":", "-."))}
        for i, (teacher, colour) in enumerate(colours(teachers).items())
    }


def dots(ax: Axes, x: np.ndarray, y: np.ndarray, index: int, colour: str, label: str | None = None) -> None:
    """The dots of a teacher, the `index`-th: where the colours come again, of another shape."""
    ax.scatter(x, y, s=9, color=colour, marker=_again(index, "o^sD"), alpha=0.7, linewidths=0, label=label)


def _again(index: int, forms: Sequence[str]) -> str:
    return forms[index // len(PALETTE) % len(forms)]


def short_names(teachers: Sequence[str], longest: int = 20) -> dict[str, str]:
    """A name for each teacher that has room in a picture: without "org/", "…" for the middle of long ones.

    No two are the same: a little longer, or else numbered in the teachers' order, where they would be.
    """
    names = {teacher: teacher.rpartition("/")[2] or teacher for teacher in teachers}
    if len(set(names.values())) < len(names):
        names = {teacher: teacher for teacher in teachers}
    for room in range(longest, longest + 6):
        short = {teacher: _shortened(name, room) for teacher, name in names.items()}
        if len(set(short.values())) == len(short):
            return short
    return {teacher: f"{i}: {_shortened(name, longest - 4)}" for i, (teacher, name) in enumerate(names.items(), 1)}


def _shortened(name: str, room: int) -> str:
    return name if len(name) <= room else f"{name[: room // 2]}…{name[len(name) - (room - 1) // 2 :]}"


def figure(width: float, height: float) -> Figure:
    """A figure that no pyplot knows of."""
    fig = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def accuracies(tasks: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Accuracy before and after of each task, with 95% intervals; beside it the log-probability of the gold answer.

    Args:
        tasks: name → {split, before, after: summaries of compact.results or None, forgotten, gained or absent}.
    """
    fig = figure(WIDTH, 1.2 + 0.8 * len(tasks))
    left, right = fig.subplots(1, 2, width_ratios=[1.4, 1], sharey=True)
    top = 0.0
    for y, (name, task) in enumerate(tasks.items()):
        points = [_accuracy_point(task.get(when)) for when in ("before", "after")]
        top = max([top, *(point[2] for point in points if point)])
        _change(left, y, points, "{:.1f}")
        _change(right, y, [_logprob_point(task.get(when)) for when in ("before", "after")], "{:.2f}")
        lines = [(name, INK, 10, "bold", 12), (f"{SPLITS[task['split']]}, n = {task['n']}", GREY, 8.5, "normal", -1)]
        if task.get("forgotten") is not None:
            lines.append((f"+{task['gained']} gained, −{task['forgotten']} forgotten", GREY, 8.5, "normal", -13))
        for text, colour, size, heavy, rise in lines:
            left.annotate(
                plain(text), (0, y), (-8, rise), xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", va="center", fontsize=size, color=colour, weight=heavy,
            )  # fmt: skip
    left.set_yticks(range(len(tasks)), [""] * len(tasks))
    left.set_ylim(len(tasks) - 0.45, -0.55)
    left.set(xlim=(0, next(limit for limit in (10, 25, 50, 100) if top <= limit)), title="Accuracy, %")
    right.set_title("Log p of the gold answer, a token")
    right.margins(x=0.15)
    for ax in (left, right):
        ax.grid(axis="y", visible=False)
        ax.spines["left"].set_visible(False)
        ax.locator_params(axis="x", nbins=5)
    handles = [left.plot([], [], "o", color=colour)[0] for colour in (GREY, ACCENT)]
    names = ["before training", "after training (bars: 95% intervals)"]
    fig.legend(handles, names, loc="outside lower right", ncols=2, fontsize=9, handletextpad=0.1)
    return fig


def _accuracy_point(summary: Mapping[str, Any] | None) -> tuple[float, float, float] | None:
    if summary is None:
        return None
    low, high = summary["flexible"]["interval"]
    return 100 * summary["accuracy"], 100 * low, 100 * high


def _logprob_point(summary: Mapping[str, Any] | None) -> tuple[float, float, float] | None:
    if summary is None or summary["answer_logprob"]["mean"] is None:
        return None
    value, error = summary["answer_logprob"]["mean"], summary["answer_logprob"]["standard_error"] or 0.0
    return value, value - 1.96 * error, value + 1.96 * error


def _change(ax: Axes, y: float, points: Sequence[tuple[float, float, float] | None], form: str) -> None:
    """Two dots on their intervals, before a little above after."""
    for point, colour, shift in zip(points, (GREY, ACCENT), (-0.1, 0.1)):
        if point is None:
            continue
        value, low, high = point
        ax.plot([low, high], [y + shift] * 2, color=colour, alpha=0.35, linewidth=4)
        ax.plot([value], [y + shift], "o", color=colour, markersize=7)
        above = shift < 0
        ax.annotate(
            form.format(value).replace("-", "−"), (value, y + shift), (0, 6 if above else -6),
            ha="center" if value else "left",  # at 0 it would stand in the task's name
            textcoords="offset points", va="bottom" if above else "top", color=colour, fontsize=9, weight="bold",
        )  # fmt: skip


def weights(rows: Sequence[Mapping[str, Any]], alpha_mean: Mapping[str, float | None]) -> Figure:
    """α of each teacher over the steps: running mean, with a band of one running standard deviation.

    Args:
        alpha_mean: teacher → mean α over the last quarter, which stands at the line's end.
    """
    fig = figure(WIDTH, 3.6 + legend_height(alpha_mean))
    ax = fig.subplots()
    steps = np.array([row["step"] for row in rows])
    ends, names = [], short_names(list(alpha_mean))
    for teacher, look in looks(list(alpha_mean)).items():
        values = series(rows, teacher, "alpha")
        if np.isnan(values).all():
            continue
        middle, spread = smooth(values)
        mean = alpha_mean[teacher]
        text = f"{names[teacher]}  {'' if mean is None else f'{mean:.2f}'}"
        ax.fill_between(steps, middle - spread, middle + spread, color=look["color"], alpha=0.13, linewidth=0)
        ax.plot(steps, middle, **look, label=plain(text))
        ends.append((middle[~np.isnan(middle)][-1], text, look["color"]))
    known = {round(float(value), 3) for name in alpha_mean for value in series(rows, name, EQUAL) if value == value}
    if ends and len(known) < 2:  # the same for all teachers in all questions
        equal = known.pop() if known else 1 / len(ends)
        ax.axhline(equal, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        ends.append((equal, f"equal  {equal:.2f}", GREY))
    if len(steps) >= 12:
        quarter = steps[-max(1, len(steps) // 4)]
        ax.axvspan(quarter, steps[-1], color=FAINT, alpha=0.45, linewidth=0)
        ax.annotate(
            "last quarter", (quarter, 1), (4, -10), xycoords=("data", "axes fraction"), textcoords="offset points",
            fontsize=8, color=GREY,
        )  # fmt: skip
    ax.set(title="Weight α of each teacher (with its name: mean of the last quarter)", xlabel="optimizer step")
    ax.set_ylim(bottom=0)
    show_span(ax, steps)
    label_ends(fig, {ax: ends})
    return fig


def losses(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The two components of the loss over the steps: raw in the background, running mean in front."""
    fig = figure(WIDTH, 2.9)
    steps = np.array([row["step"] for row in rows])
    panels = {"loss_sft": "Loss on the rationales, Σ α·L_SFT", "loss_mcon": "Disagreement on the answer, Σ α·L_MCon"}
    for ax, (key, title) in zip(fig.subplots(1, 2), panels.items()):
        values = np.array([row.get(key, math.nan) for row in rows], dtype=float)
        finite = values[np.isfinite(values)]
        ax.plot(steps, values, color=ACCENT, alpha=0.22, linewidth=0.9)
        ax.plot(steps, smooth(values)[0], color=ACCENT)
        ax.set(title=title, xlabel="optimizer step")
        low, high = float(finite.min(initial=0)), float(finite.max(initial=0))
        ax.set_ylim(low, high + 0.05 * (high - low) or 1)  # from 0, and clear of the frame where little changes
        show_span(ax, steps)
    return fig


def statistics(rows: Sequence[Mapping[str, Any]], teachers: Sequence[str]) -> Figure:
    """What α is made from: each teacher's raw metrics over the steps, and the entropy of α."""
    fig = figure(WIDTH, 5.2 + legend_height(teachers))
    axes = fig.subplots(2, 2, sharex=True).flatten()
    steps = np.array([row["step"] for row in rows])
    panels = {
        "adaptability": "Adaptability S_MI (nats)",
        "consensus": "Consensus S_cons",
        "difficulty": "Difficulty S_PPL (nats a token)",
    }
    ends: dict[Axes, list[End]] = {ax: [] for ax in axes[:3]}
    names = short_names(teachers)
    for ax, (key, title) in zip(axes, panels.items()):
        for teacher, look in looks(teachers).items():
            values = series(rows, teacher, key)
            if np.isnan(values).all():
                continue
            middle, _ = smooth(values)
            ax.plot(steps, middle, **look, linewidth=1.6, label=plain(names[teacher]))
            ends[ax].append((middle[~np.isnan(middle)][-1], names[teacher], look["color"]))
        ax.set_title(title)
        show_span(ax, steps)
    entropy = np.array([row.get("alpha_entropy", math.nan) for row in rows], dtype=float)
    axes[3].plot(steps, entropy, color=INK, alpha=0.2, linewidth=0.9)
    axes[3].plot(steps, smooth(entropy)[0], color=INK)
    equal = [value for teacher in teachers for value in series(rows, teacher, EQUAL) if value == value]
    most = -math.log(min(equal, default=1 / max(1, len(teachers))))  # of the largest question
    axes[3].axhline(most, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axes[3].annotate("equal weights", (steps[0], most), (3, 3), textcoords="offset points", fontsize=8, color=GREY)
    axes[3].set(title="Entropy of α (nats)", ylim=(0, most * 1.2 or 1))
    for ax in axes[2:]:
        ax.set_xlabel("optimizer step")
    label_ends(fig, ends, fontsize=8)
    return fig


def differences(records: Sequence[Mapping[str, Any]], baseline: str) -> Figure:
    """Each method's paired difference from the baseline with its 95% interval, a panel a task, at most three to a row.

    Args:
        records: of a study, all of one setting and measure; where `diff_ci95` is None there is a point alone.
    """
    key = f"diff_vs_{baseline}"
    tasks = list(dict.fromkeys((record["task"], record["split"]) for record in records))
    methods = list(dict.fromkeys(record["method"] for record in records))
    columns = 2 if len(tasks) == 4 else min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    fig = figure(1.6 + 2.8 * columns, 0.4 + rows * (0.9 + 0.34 * max(2, len(methods))))
    grid = fig.subplots(rows, columns, sharey=True, squeeze=False)
    axes = grid.ravel()
    for ax in axes[len(tasks) :]:
        ax.set_axis_off()
    for ax, (task, split) in zip(axes, tasks):
        ax.axvline(0, color=GREY, linewidth=1)
        for record in records:
            if (record["task"], record["split"]) == (task, split):
                y, interval = methods.index(record["method"]), record["diff_ci95"]
                low, high = interval or (0.0, 0.0)
                colour = PALETTE[2] if low > 0 else PALETTE[3] if high < 0 else GREY
                if interval is not None:
                    ax.plot([low, high], [y, y], color=colour, linewidth=2.4)
                ax.plot(record[key], y, "o", color=colour, markersize=5)
                text = f"{record[key]:+.1f}".replace("-", "−")
                ax.annotate(
                    text, (record[key], y), (0, 4), textcoords="offset points",
                    ha="center", va="bottom", fontsize=7.5, color=colour,
                    path_effects=[withStroke(linewidth=2.5, foreground="white")],  # legible on the line of zero
                )  # fmt: skip
        ax.set_title(f"{plain(task)}\n{SPLITS[split]}", fontsize=9)
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(methods)), [plain(name) for name in methods])
    axes[0].set_ylim(len(methods) - 0.5, -0.7)
    fig.supxlabel(f"difference from {plain(baseline)}, points", fontsize=9)
    return fig


def series(rows: Sequence[Mapping[str, Any]], teacher: str, key: str) -> np.ndarray:
    """One value a step, NaN where the teacher had no rationale in it."""
    return np.array([row["teachers"].get(teacher, {}).get(key, math.nan) for row in rows], dtype=float)


def smooth(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running mean and standard deviation over a twelfth of the steps, NaNs left out."""
    half = max(1, len(values) // 24)
    means, deviations = np.full(len(values), math.nan), np.full(len(values), math.nan)
    for i in range(len(values)):
        window = values[max(0, i - half) : i + half + 1]
        window = window[np.isfinite(window)]
        if window.size:
            means[i], deviations[i] = window.mean(), window.std()
    return means, deviations


def show_span(ax: Axes, steps: np.ndarray) -> None:
    ax.set_xlim(steps[0], steps[-1] if len(steps) > 1 else steps[0] + 1)
    ax.margins(x=0)


def legend_height(teachers: Collection[str], always: bool = False) -> float:
    """Inches for a legend below the picture, which too many teachers to name beside their lines have."""
    return 0.2 * -(-len(teachers) // 3) if always or len(teachers) > len(PALETTE) else 0.0


def legend_below(fig: Figure, handles: Sequence[Any], names: Sequence[str], **options: Any) -> None:
    fig.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8.5, **options)


def label_ends(fig: Figure, names: Mapping[Axes, Sequence[End]], fontsize: float = 9.5) -> None:
    """Names at the right ends of lines, pushed apart where they would overlap; in a legend where they are many."""
    handles, labels = max((ax.get_legend_handles_labels() for ax in names), key=lambda told: len(told[1]))
    if len(labels) > len(PALETTE):
        legend_below(fig, handles, labels)
        names = {ax: [end for end in ends if plain(end[1]) not in labels] for ax, ends in names.items()}
    fig.draw_without_rendering()  # settles the limits
    for ax, ends in names.items():
        low, high = ax.get_ylim()
        gap = 1.35 * fontsize / 72 * fig.dpi / max(1.0, ax.bbox.height) * (high - low)
        ordered = sorted(ends, key=lambda end: end[0])
        places = [value for value, _, _ in ordered]
        for _ in range(50):
            for i in range(len(places) - 1):
                if (overlap := gap - (places[i + 1] - places[i])) > 0:
                    places[i], places[i + 1] = places[i] - overlap / 2, places[i + 1] + overlap / 2
        lift = max(0.0, low - places[0]) or min(0.0, high - places[-1]) if places else 0.0
        for place, (_, text, colour) in zip(places, ordered):
            ax.annotate(
                plain(text), (1, place + lift), (6, 0), xycoords=("axes fraction", "data"), color=colour,
                textcoords="offset points", va="center", fontsize=fontsize, weight="bold", annotation_clip=False,
            )  # fmt: skip


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: no mathematics, no line breaks inside tokens, no glyphs it lacks."""
    text = text.replace("\r", "").strip(" ") or "␣"
    if not text.strip("\n"):
        text = "↵"
    return "".join("□" if ord(c) > 0x2FFF else c for c in text).replace("$", r"\$")
