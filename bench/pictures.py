"""Time against memory, one point a contender, one panel a head (a step: one panel a student)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.records import Record
from bench.targets import MODES, is_ours

AVAILABLE = importlib.util.find_spec("matplotlib") is not None
# One look a contender, the same in every picture; ours are stars.
COLORS = {
    "torch_eager": "#7f7f7f",
    "torch_compile": "#1f77b4",
    "torch_compile_compacted": "#17becf",
    "torch_linear_cross_entropy": "#8c564b",
    "liger": "#2ca02c",
    "liger_fp32": "#98df8a",
    "liger_16": "#bcbd22",
    "cce": "#9467bd",
    "cce_exact": "#c5b0d5",
    "quack": "#e377c2",
    "sdpa_separate": "#7f7f7f",
    "sdpa_padded": "#c7c7c7",
    "sdpa_masked": "#8c564b",
    "flex": "#9467bd",
    "flash_attn_2": "#98df8a",
    "flash_attn_3": "#bcbd22",
    "flash_attn_4": "#2ca02c",
    "opacus_ghost": "#1f77b4",
}
OURS = {
    "compact": "#d62728",
    "compact_no_divergence": "#ff7f0e",
    "compact_given": "#ff7f0e",
    "compact_rule": "#d62728",
    "compact_varlen": "#d62728",
    "compact_without_norms": "#ff7f0e",
    "compact_with_information": "#9467bd",
    "compact_with_mind": "#2ca02c",
    "compact_without_mind": "#98df8a",
}


def draw(records: Sequence[Record], title: str, path: Path, *, memory: str, panel: str = "head") -> bool:
    """Write a PNG of the records of one work or of the steps; False where none has both a time and a memory.

    Args:
        memory: label of the horizontal axis: what `peak_mib` is.
        panel: the field of a record that says on which panel it stands.
    """
    points = [record for record in records if "error" not in record and record.get("peak_mib") is not None]
    if not points or not AVAILABLE:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys(record[panel] for record in points))
    columns = min(3 if panel == "head" else 2, len(panels))
    lines = -(-len(panels) // columns)
    spare = len(panels) < columns * lines  # the legend goes there, else to the right of all
    size = (4.1 * columns + (0 if spare else 2.6), max(3.5 * lines, 0.24 * len({r["contender"] for r in points}) + 1))
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    handles: dict[str, Any] = {}
    for at, axis in enumerate(axes.flat):
        if at >= len(panels):
            axis.axis("off")
            continue
        _panel(axis, [record for record in points if record[panel] == panels[at]], handles)
        axis.set_title(panels[at].replace("x", " × ") if panel == "head" else panels[at], fontsize=10)
        axis.set_xlabel(memory, fontsize=9)
        if at % columns == 0:
            axis.set_ylabel("time of a round (ms)", fontsize=9)
    order = sorted(handles, key=lambda name: (name == "floor", not name.startswith("compact"), name))
    look = {"fontsize": 8.5, "frameon": False, "labelspacing": 0.8}
    if spare:
        axes.flat[-1].legend(
            [handles[name] for name in order], order, loc="center", ncols=1 + len(order) // 14, **look
        )
    else:
        figure.legend([handles[name] for name in order], order, loc="outside right upper", **look)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _panel(axis: Any, records: Sequence[Record], handles: dict[str, Any]) -> None:
    """One point a record, bars from the 20% to the 80% quantile; `handles` gathers one a name for the legend."""
    for record in records:
        name, base = record["contender"], _base(record["contender"])
        color = OURS.get(base, "#ff7f0e") if is_ours(record) else COLORS.get(base, "black")
        below, above = record["median_ms"] - record["p20_ms"], record["p80_ms"] - record["median_ms"]
        handles[name] = axis.errorbar(
            _held(record),
            record["median_ms"],
            yerr=[[below], [above]],
            marker="*" if is_ours(record) else "o",
            markersize=15 if is_ours(record) else 8,
            markerfacecolor=color if name == base else "white",  # hollow: head frozen, or layers compiled
            markeredgecolor=color,
            color=color,
            linestyle="none",
            zorder=3 if is_ours(record) else 2,
        )
    floors = [record["floor_ms"] for record in records if record.get("floor_ms")]
    if floors:
        handles["floor"] = axis.axhline(floors[0], color="black", linestyle=":", linewidth=1.2)
    _scale(axis, "y", [record["median_ms"] for record in records] + floors, lambda value: f"{value:g}")
    _scale(axis, "x", [_held(record) for record in records], _mib)
    axis.grid(True, which="major", alpha=0.25)
    axis.tick_params(labelsize=8)


def _held(record: dict[str, Any]) -> float:
    """MiB held at once, the float32 buffer of a head's gradient included; 1 at least, for the logarithm."""
    return max(record["peak_mib"] + (record.get("dw_accum_mib") or 0.0), 1.0)


def _scale(axes: Any, which: str, values: Sequence[float], label: Callable[[float], str]) -> None:
    """Axis x (MiB) or y (ms): logarithmic where the largest is over four times the smallest, else linear."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = min(values), max(values)
    axis = axes.xaxis if which == "x" else axes.yaxis
    if high > 4 * low:
        axes.set(**{f"{which}scale": "log", f"{which}lim": (low / 1.5, high * 1.5)})
        if which == "x":
            axis.set_major_locator(FixedLocator([4.0**k for k in range(10)]))
            axis.set_minor_locator(NullLocator())
        else:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
            axis.set_minor_formatter(NullFormatter())
    else:
        margin = 0.12 * (high - low) + 0.02 * high
        axes.set(**{f"{which}lim": (low - margin, high + margin)})
        if which == "x":  # at round numbers of MiB or GiB: a power of two, of which at most five fit
            step = 2.0 ** max(0, math.ceil(math.log2((high - low + 2 * margin) / 5)))
            axis.set_major_locator(FixedLocator([k * step for k in range(int((high + margin) / step) + 1)]))
        else:
            axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


def _base(name: str) -> str:
    return next((name.removesuffix(ending) for ending in MODES if name.endswith(ending)), name)


def _mib(value: float) -> str:
    return f"{value / 1024:g} GiB" if value >= 1024 else f"{value:g} MiB"
