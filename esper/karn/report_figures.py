"""The figures of a report: SVG, drawn in a colour-blind-safe palette (Okabe and Ito), marks told apart by shape too."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from esper.karn.comparison_table import number
from esper.karn.report_data import CohortTrace, Trace
from esper.leyline.actions import Op
from esper.leyline.comparison import ArmResult

INK, MUTED, FAINT = "#1f2933", "#616e7c", "#c3cad3"
BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"

GROUP_MARKS = {
    "control": (MUTED, "o"),
    "rule": (ORANGE, "^"),
    "schedule": (GREEN, "s"),
    "from scratch": (PURPLE, "D"),
    "learned": (BLUE, "P"),
}
OP_COLOURS = {
    Op.WAIT: "#dfe3e8",
    Op.GERMINATE: BLUE,
    Op.ADVANCE: SKY,
    Op.FOSSILIZE: GREEN,
    Op.PRUNE: VERMILLION,
}
OP_MARKS = {"GERMINATE": "o", "ADVANCE": ">", "PRUNE": "X", "FOSSILIZE": "s"}
OP_WORDS = {"GERMINATE": "germinate", "ADVANCE": "advance", "FOSSILIZE": "fossilize", "PRUNE": "prune"}
WARM_EPOCHS = 3
"""Epochs in which every host rises steeply."""

LABELLED_EPISODES = 12
"""Cohorts of at most this size have every lineage labelled; of larger ones the best and the worst are."""

MAX_METRICS = 12

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.hashsalt": "esper",
    "figure.facecolor": "white",
    "legend.frameon": False,
}


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of a size in inches, in the style of the report."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def data_uri(figure: Figure) -> str:
    """Return the figure as a data URI; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Return positions in the order of the values, at least `gap` apart and as near to them as that allows."""
    order = np.argsort(values, kind="stable")
    placed = np.asarray(values, dtype=float)[order]
    offsets = np.arange(len(placed)) * gap
    # Isotonic regression of what is left after the gaps: pool neighbours that would overlap.
    blocks: list[tuple[float, int]] = []
    for value in placed - offsets:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    levels = np.concatenate([[level] * count for level, count in blocks]) if blocks else np.empty(0)
    result = np.empty(len(placed))
    result[order] = levels + offsets
    return [float(value) for value in result]


def _capped(positions: Sequence[float], highest: float, gap: float) -> list[float]:
    """Push positions down where they would rise above the axes, in order and still `gap` apart."""
    capped, limit = list(positions), highest
    for index in np.argsort(positions, kind="stable")[::-1]:
        capped[index] = min(capped[index], limit)
        limit = capped[index] - gap
    return capped


def margin_labels(axes: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write (x, y, text, colour) labels in the right margin, clear of each other, with a thin leader to each point."""
    low, high = axes.get_ylim()
    height = axes.figure.get_size_inches()[1] * 0.8
    gap = (high - low) * 0.155 / height
    positions = _capped(spread([point[1] for point in points], gap), high, gap)
    for (x, y, text, colour), position in zip(points, positions):
        axes.annotate(
            text,
            xy=(x, y),
            xycoords="data",
            xytext=(1.03, (position - low) / (high - low)),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3},
        )


def trace_figure(cohort: CohortTrace) -> str:
    """Draw one cohort: the trunk bold, every other lineage thin, marks where actions were carried out."""
    with canvas(5.6, 3.5) as figure:
        axes = figure.add_subplot()
        trunk = 100 * np.array(cohort.trunk)
        axes.add_collection(LineCollection(_lineage_edges(cohort), colors="#8fb4d0", linewidths=0.8, alpha=0.75))
        axes.plot(np.arange(len(trunk)), trunk, color=INK, linewidth=2.4, zorder=4, solid_capstyle="round")
        for op, marker in OP_MARKS.items():
            places = _action_places(cohort, op)
            if places:
                x, y = zip(*places)
                colour = OP_COLOURS[Op[op]]
                axes.scatter(
                    x,
                    y,
                    s=19,
                    marker=marker,
                    c=colour,
                    edgecolors="white",
                    linewidths=0.4,
                    zorder=5,
                    label=OP_WORDS[op],
                )
        axes.autoscale_view()
        _zoom(axes, cohort)
        axes.set_xlim(-0.4, len(trunk) - 0.6)
        axes.set_xlabel("host epoch")
        axes.set_ylabel("validation accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        labels = [(len(trunk) - 1, float(trunk[-1]), "trunk: never act", INK)] if len(trunk) else []
        labels += [(len(one.accuracy) - 1, 100 * one.accuracy[-1], one.label, "#2b6f9e") for one in _named(cohort)]
        margin_labels(axes, labels)
        if any(episode.actions for episode in cohort.episodes):
            figure.legend(loc="outside upper left", ncols=4, fontsize=8, handletextpad=0.2, columnspacing=1.2)
        return data_uri(figure)


def _zoom(axes: Any, cohort: CohortTrace) -> None:
    """Cut the first epochs off at the bottom where they would press everything later together."""
    values = [100 * value for line in (cohort.trunk, *(one.accuracy for one in cohort.episodes)) for value in line]
    late = [100 * value for one in cohort.episodes for value in one.accuracy[WARM_EPOCHS:]]
    late += [100 * value for value in cohort.trunk[WARM_EPOCHS:]]
    if late and max(values) - min(late) < 0.4 * (max(values) - min(values)):
        margin = 0.08 * (max(values) - min(late))
        axes.set_ylim(min(late) - margin, max(values) + margin)


def _lineage_edges(cohort: CohortTrace) -> list[list[tuple[float, float]]]:
    """Each piece of a lineage once, however many episodes ride it."""
    edges: dict[tuple[int, str, str], list[tuple[float, float]]] = {
        (step, episode.host_keys[step], episode.host_keys[step + 1]): [
            (step, 100 * episode.accuracy[step]),
            (step + 1, 100 * episode.accuracy[step + 1]),
        ]
        for episode in cohort.episodes
        for step in range(len(episode.accuracy) - 1)
    }
    return list(edges.values())


def _action_places(cohort: CohortTrace, op: str) -> list[tuple[float, float]]:
    places = {
        (step, episode.host_keys[step]): (float(step), 100 * episode.accuracy[step])
        for episode in cohort.episodes
        for step, name in episode.actions
        if name == op
    }
    return list(places.values())


def _named(cohort: CohortTrace) -> list[Trace]:
    """The episodes that get a label: one per lineage end, all of them or the extremes."""
    ends: dict[str, Trace] = {}
    trunk_keys = {
        episode.host_keys[0] for episode in cohort.episodes if not episode.label.startswith(("bigger", "wider"))
    }
    for episode in cohort.episodes:
        if episode.host_keys[-1] not in trunk_keys:
            ends.setdefault(episode.host_keys[-1], episode)
    ordered = sorted(ends.values(), key=lambda episode: episode.accuracy[-1])
    return ordered if len(cohort.episodes) <= LABELLED_EPISODES else [*ordered[:1], *ordered[-3:]]


def frontier_figure(arms: Sequence[ArmResult], rent_points: float | None) -> str:
    """Draw the gain over never-act against parameters, with intervals, and the line where a gain pays its rent."""
    shown = [arm for arm in arms if "never-act" in arm.gain_over]
    with canvas(5.6, 3.7) as figure:
        axes = figure.add_subplot()
        axes.axhline(0, color=FAINT, linewidth=0.8, zorder=1)
        growth = np.log2([arm.growth_factor for arm in shown])
        gains = [arm.gain_over["never-act"] for arm in shown]
        for arm, x, gain in zip(shown, growth, gains):
            colour, marker = GROUP_MARKS[arm.group]
            bar = [[gain.mean - gain.low], [gain.high - gain.mean]]
            axes.errorbar(
                x, gain.mean, yerr=bar, fmt=marker, color=colour, markersize=6, linewidth=1.3, capsize=2.5, zorder=3
            )
        right = max(1.0, float(growth.max()) if len(growth) else 1.0) * 1.06
        axes.set_xlim(-0.05 * right, right)
        axes.margins(y=0.12)
        bottom, top = axes.get_ylim()
        if rent_points:
            line = np.array([0.0, right])
            axes.plot(line, rent_points * line, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
            end = min(0.97 * right, 0.93 * top / rent_points)
            words: dict[str, Any] = {"ha": "right", "va": "top", "fontsize": 7.5, "color": MUTED}
            axes.text(end, rent_points * end - 0.045 * (top - bottom), "gain = rent", **words)
        axes.set_ylim(bottom, top)
        _growth_axis(axes, shown, right)
        axes.set_ylabel("gain over never-act, test points")
        points = [
            (float(x), gain.mean, arm.arm, GROUP_MARKS[arm.group][0]) for arm, x, gain in zip(shown, growth, gains)
        ]
        margin_labels(axes, points)
        return data_uri(figure)


def _growth_axis(axes: Any, arms: Sequence[ArmResult], right: float) -> None:
    """Ticks at whole doublings, with the parameters that each adds to this host."""
    hosts = [arm.seed_params / (arm.growth_factor - 1) for arm in arms if arm.growth_factor > 1]
    ticks = np.arange(0, int(right) + 1)
    texts = [f"×{2**tick}" + (f"\n+{hosts[0] * (2**tick - 1):,.0f}" if hosts else "") for tick in ticks]
    axes.set_xticks(ticks, texts)
    axes.set_xlabel("parameters: multiple of the bare host, number added (log scale)")


def forest_figure(arms: Sequence[ArmResult], reference: str) -> str:
    """Draw every arm's paired return difference to one arm, with intervals."""
    shown = [arm for arm in arms if reference in arm.return_over][::-1]
    with canvas(5.6, max(1.7, 0.75 + 0.32 * len(shown))) as figure:
        axes = figure.add_subplot()
        axes.axvline(0, color=INK, linewidth=1, zorder=1)
        for row, arm in enumerate(shown):
            interval = arm.return_over[reference]
            colour, marker = GROUP_MARKS[arm.group]
            axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=2, zorder=2)
            axes.plot(interval.mean, row, marker, color=colour, markersize=6.5, zorder=3)
            axes.annotate(
                number(interval.mean, 2, signed=True),
                (1.02, row),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
                color=colour,
                annotation_clip=False,
            )
        axes.set_yticks(range(len(shown)), [arm.arm for arm in shown])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.grid(axis="x", color="#eceff2", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"return minus {reference}'s, same environment seeds")
        return data_uri(figure)


def shares_figure(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Draw the share of each op among a controller's decisions, one bar per controller."""
    names = list(shares)[::-1]
    with canvas(5.6, 0.95 + 0.24 * len(names)) as figure:
        axes = figure.add_subplot()
        left = np.zeros(len(names))
        for op in Op:
            widths = np.array([100 * shares[name][op.name] for name in names])
            axes.barh(names, widths, left=left, color=OP_COLOURS[op], height=0.74, label=op.name.lower())
            left += widths
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of decisions that were not forced")
        axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=8.5)
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside upper left", ncols=5, fontsize=8, handlelength=1, handleheight=1, columnspacing=1.1)
        return data_uri(figure)


def curve_figure(name: str, points: Sequence[tuple[float, float]]) -> str:
    """Draw one metric of one policy against the step."""
    with canvas(2.75, 1.75) as figure:
        axes = figure.add_subplot()
        steps, values = zip(*points)
        style: dict[str, Any] = {"marker": "o", "markersize": 3} if len(steps) <= 25 else {}
        axes.plot(steps, values, color=BLUE, linewidth=1.4, **style)
        axes.set_title(name.replace("_", " "))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y", color="#eceff2", linewidth=0.8)
        axes.tick_params(labelsize=8)
        return data_uri(figure)
