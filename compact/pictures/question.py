"""The pictures of one question: evidence along its rationales, and the graph between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np
from matplotlib.figure import Figure

from compact.pictures import (
    AMBER,
    GREY,
    INK,
    PALETTE,
    WIDTH,
    colours,
    figure,
    legend_below,
    legend_height,
    plain,
    short_names,
)


def trajectory(traces: Mapping[str, Mapping[str, Any]], teachers: Sequence[str], epsilon: float = 0.1) -> Figure:
    """I_t (eq. 2) along each rationale of one question, before and after training.

    Amber bands are thinking tokens (M = 1). Triangles are the terms ReLU(I_t − I_{t−1})·M_t of eq. 3 that are at least
    a fifth of the picture's largest. Short rationales are labelled with their tokens.

    Args:
        traces: "before", "after" or both → :func:`compact.trace.trace_question`.
        epsilon: M at other than thinking tokens.
    """
    before, after = traces.get("before"), traces.get("after")
    shown = after or before
    assert shown is not None
    palette, names = colours(teachers), short_names([r["teacher"] for r in shown["rationales"]])
    rationales = shown["rationales"]
    short = max(len(rationale["tokens"]) for rationale in rationales) <= 48
    fig = figure(WIDTH, 0.5 + (2.15 if short else 1.75) * len(rationales))
    axes = fig.subplots(len(rationales), 1, squeeze=False)[:, 0]
    earlier = {r["teacher"]: r for r in before["rationales"]} if before and after else {}
    low = min(min(r["evidence"]) for r in [*rationales, *earlier.values()])
    high = max(max(r["evidence"]) for r in [*rationales, *earlier.values()])
    gains = [terms(np.array(r["evidence"]), r["thinking"], epsilon) for r in rationales]
    threshold = 0.2 * max(gain.max() for gain in gains)
    for ax, rationale, gain in zip(axes, rationales, gains):
        colour = palette.get(rationale["teacher"], INK)
        evidence = np.array(rationale["evidence"])
        steps = np.arange(len(evidence))
        for t in np.flatnonzero(rationale["thinking"]):
            ax.axvspan(t - 0.5, t + 0.5, color=AMBER, alpha=0.55, linewidth=0)
        if rationale["teacher"] in earlier:
            ax.plot(steps, earlier[rationale["teacher"]]["evidence"], color=GREY, linewidth=1.3)
        ax.plot(steps, evidence, color=colour)
        peaks = np.flatnonzero((gain > 0) & (gain >= threshold))
        ax.plot(steps[peaks], evidence[peaks], "^", color=colour, markersize=6.5, markeredgecolor="white")
        wrong = ", wrong answer" if rationale["wrong"] else ""
        label = (
            f"{names[rationale['teacher']]}{wrong}   S_MI {rationale['adaptability']:.2f}   α {rationale['alpha']:.2f}"
        )
        ax.set_title(plain(label), color=colour, fontsize=10, pad=5)
        room = (high - low) or 1.0
        ax.set(ylim=(low - 0.06 * room, high + (0.08 if short else 0.22) * room), xlim=(-0.5, len(evidence) - 0.5))
        ax.grid(axis="x", visible=False)
        if short:
            tokens = ["⟨prompt⟩", *map(plain, rationale["tokens"][1:])]
            ax.set_xticks(steps, tokens, rotation=55, ha="right", rotation_mode="anchor", fontsize=7.5)
            ax.tick_params(axis="x", pad=2)
        else:
            for t in peaks[np.argsort(gain[peaks])[-3:]]:
                ax.annotate(
                    plain(rationale["tokens"][t]), (t, evidence[t]), (0, 6), textcoords="offset points",
                    ha="center", fontsize=7.5, color=INK,
                )  # fmt: skip
    if not short:
        axes[-1].set_xlabel("tokens of the rationale read")
    fig.supylabel("I_t: mean log-probability of the gold answer's tokens", fontsize=10)
    lines = [axes[0].plot([], [], color=INK)[0], axes[0].plot([], [], "^", color=INK)[0]]
    lines += [axes[0].fill_between([], [], color=AMBER)]
    labels = ["after training" if after else "before training", "a large term of eq. 3", "thinking token"]
    if earlier:
        lines.insert(0, axes[0].plot([], [], color=GREY)[0])
        labels.insert(0, "before training")
    fig.legend(lines, labels, loc="outside upper right", ncols=len(labels), fontsize=8.5)
    return fig


def terms(evidence: np.ndarray, thinking: Sequence[bool], epsilon: float) -> np.ndarray:
    """The terms of eq. 3 as they are counted, (B + 1,): ReLU(I_t − I_{t−1})·M_t, 0 at t = 0."""
    rises = np.maximum(np.diff(evidence, prepend=evidence[:1]), 0.0)
    return rises * np.where(np.asarray(thinking, dtype=bool), 1.0, epsilon)


def graph_of(trace: Mapping[str, Any]) -> nx.DiGraph:
    """A question's consensus graph (eq. 4): edge i → j with weight A_ij, i ≠ j; nodes are rationales."""
    graph = nx.DiGraph()
    for i, rationale in enumerate(trace["rationales"]):
        graph.add_node(i, **{key: rationale[key] for key in ("teacher", "alpha", "consensus", "wrong")})
    for i, row in enumerate(trace["affinity"]):
        graph.add_edges_from((i, j, {"weight": float(weight)}) for j, weight in enumerate(row) if i != j)
    return graph


def consensus_graph(traces: Mapping[str, Mapping[str, Any]], teachers: Sequence[str]) -> Figure:
    """One question's graph, a panel for each of `traces` (before, after): edge width A_ij, node area S_cons, its α.

    Names stand beside the nodes where they have room, else numbers do, and the names in a legend.
    """
    shown = [r for trace in traces.values() for r in trace["rationales"]]
    names = short_names(list(dict.fromkeys(r["teacher"] for r in shown)))
    roomy = len(names) <= len(PALETTE) and max(map(len, names.values())) <= 12
    flat, palette = len(names) <= 2, colours(teachers)
    height = (1.8 if flat else 4.5) + (0 if roomy else legend_height(names, always=True))
    fig = figure(WIDTH if len(traces) > 1 or not roomy else 5.4, height)
    handles = {}
    for ax, (when, trace) in zip(fig.subplots(1, len(traces), squeeze=False)[0], traces.items()):
        graph = graph_of(trace)
        place = nx.circular_layout(graph)
        # The first node at the top; of two nodes, at the left.
        place = {n: np.array([-y, x] if len(graph) > 2 else [-x, y]) for n, (x, y) in place.items()}
        weight = nx.get_edge_attributes(graph, "weight")
        area = {n: 500 + 1500 * d["consensus"] / max(1.0, len(graph) / 3) for n, d in graph.nodes(data=True)}
        nx.draw_networkx_edges(
            graph, place, ax=ax, width=[0.3 + 7 * weight[e] for e in graph.edges], node_size=[area[n] for n in graph],
            edge_color=[palette.get(graph.nodes[i]["teacher"], INK) for i, _ in graph.edges], alpha=0.55,
            arrowsize=[8 + 12 * weight[e] for e in graph.edges], connectionstyle="arc3,rad=0.12",
        )  # fmt: skip
        nx.draw_networkx_nodes(
            graph, place, ax=ax, node_size=[area[n] for n in graph], edgecolors="white", linewidths=2,
            node_color=[palette.get(d["teacher"], INK) for _, d in graph.nodes(data=True)],
        )  # fmt: skip
        scores = {n: f"{d['consensus']:.2f}" for n, d in graph.nodes(data=True)}
        nx.draw_networkx_labels(
            graph, place, scores, ax=ax, font_size=8.5, font_color="white", font_weight="bold",
            font_family="DejaVu Sans",
        )  # fmt: skip
        for n, d in graph.nodes(data=True):
            x, y = place[n]
            colour = palette.get(d["teacher"], INK)
            lines = [names[d["teacher"]], *(["wrong answer"] if d["wrong"] else [])]
            if roomy:
                side = int(np.sign(x)) if abs(x) > 0.2 else 0  # names stand outside of the circle
                shift = 27 * side, 12 * y if side else (27 if y > 0 else -27)
                ha, va = ("center", "left", "right")[side], "center" if side else ("bottom" if y > 0 else "top")
            else:
                number = list(names).index(d["teacher"]) + 1
                handles[f"{number}  {lines[0]}{' (wrong)' if d['wrong'] else ''}"] = ax.plot(
                    [], [], "o", color=colour
                )[0]
                lines, shift, ha, va = [str(number)], (35 * x, 32 * y), "center", "center"
            text = "\n".join([*lines, f"α {d['alpha']:.2f}"])
            ax.annotate(
                plain(text), (x, y), shift, textcoords="offset points", fontsize=9 if roomy else 7.5, weight="bold",
                ha=ha, va=va, color=colour,
            )  # fmt: skip
        if len(graph) <= 4:
            nx.draw_networkx_edge_labels(
                graph, place, {e: f"{w:.2f}" for e, w in weight.items()}, ax=ax, label_pos=0.32, font_size=7.5,
                font_color=INK, font_family="DejaVu Sans", connectionstyle="arc3,rad=0.12", rotate=False,
                bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
            )  # fmt: skip
        wide, high = 1.75 if roomy else 1.5, 0.8 if flat else 1.6 if roomy else 1.45
        ax.set(title=f"{when} training", xlim=(-wide, wide), ylim=(-high, high))
        ax.set_axis_off()
    if handles:
        legend_below(fig, list(handles.values()), list(map(plain, handles)), handletextpad=0.1)
    return fig
