"""The figures of the health page, in the style of the report's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from esper.karn.health_page_data import Calibration, Coverage
from esper.karn.report_figures import (
    BLUE,
    FAINT,
    INK,
    MUTED,
    OP_WORDS,
    ORANGE,
    VERMILLION,
    canvas,
    data_uri,
    margin_labels,
)
from esper.leyline.actions import DWELL_EPOCHS, LEVER_SIZES, NUM_OPS, TEMPO_EPOCHS, Op

Line = Sequence[tuple[int, float]]

WASH = "#f6f8fa"
SHADES = LinearSegmentedColormap.from_list("coverage", ["#e8f1f8", "#0072B2"])

LEVER_VALUES = (
    *("linear", "sig. ½", "sig. 1", "sig. 2", "gated"),
    *(str(epochs) for epochs in (*TEMPO_EPOCHS, *DWELL_EPOCHS)),
    *("isol.", "coad.", "×½", "×1", "×2"),
)
LEVER_GROUPS = ("blend", "tempo, epochs", "dwell, epochs", "isolation", "learning rate")


def entropy_figure(lines: Mapping[str, Line], warn: float | None, block: float | None) -> str:
    """Draw the entropy of the op by step: all behaviours together bold (key ""), each one thin, and the thresholds."""
    with canvas(5.6, 3.1) as figure:
        axes = figure.add_subplot()
        own = {name: line for name, line in lines.items() if name and len(line) > 1}
        for line in own.values():
            axes.plot(*zip(*line), color="#9bbdd6", linewidth=0.9, zorder=2)
        pooled = lines[""]
        axes.plot(*zip(*pooled), color=INK, linewidth=2.2, zorder=4, solid_capstyle="round", marker="o", markersize=2.5)
        axes.set_ylim(-0.03, np.log(NUM_OPS) * 1.04)
        axes.axhline(np.log(NUM_OPS), color=FAINT, linewidth=0.8, zorder=1)
        first = min(step for step, _ in pooled)
        axes.text(first, np.log(NUM_OPS) - 0.03, "all five ops alike", va="top", fontsize=7.5, color=MUTED)
        for limit, word, colour in ((warn, "warn", ORANGE), (block, "block", VERMILLION)):
            if limit is not None:
                axes.axhline(limit, color=colour, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
                place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
                axes.text(0.995, limit, word, fontsize=7.5, color=colour, **place)
        axes.set_xlabel("step")
        axes.set_ylabel("entropy of the op, nats")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        labels = [(float(pooled[-1][0]), pooled[-1][1], "all behaviours", INK)]
        ends = sorted(own, key=lambda name: float(np.mean([value for _, value in own[name]])))
        shown = ends[:1] + ends[-2:] if len(ends) > 3 else ends
        labels += [(float(own[name][-1][0]), own[name][-1][1], name, "#2b6f9e") for name in shown]
        margin_labels(axes, labels)
        return data_uri(figure)


def slots_figure(coverage: Coverage) -> str:
    """Draw how often each op was taken in each slot: the count, and the share of the decisions where it was valid."""
    taken, valid = coverage.taken_SO, coverage.valid_SO
    with canvas(3.6, 0.95 + 0.42 * max(1, len(taken))) as figure:
        axes = figure.add_subplot()
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(valid > 0, taken / valid, np.nan)
        for row, col in np.ndindex(taken.shape):
            number, part, there = int(taken[row, col]), float(share[row, col]), bool(valid[row, col] > 0)
            lines = "never valid" if not there else f"{_compact(number)}\n{_percent(part)}"
            _cell(axes, row, col, part, number, there, lines, 7.5)
        _grid_axes(axes, [f"slot {slot}" for slot in range(len(taken))], [OP_WORDS[op.name] for op in list(Op)[1:]])
        return data_uri(figure)


def levers_figure(coverage: Coverage) -> str:
    """Draw how many germinations had each pair of a blueprint and another lever's value."""
    counts, possible = coverage.germinated_BL, coverage.possible_BL
    top = np.log1p(counts.max(initial=1))
    with canvas(7.6, 3.3) as figure:
        axes = figure.add_subplot()
        for row, col in np.ndindex(counts.shape):
            number = int(counts[row, col])
            shade = float(np.log1p(number) / top)
            _cell(axes, row, col, shade, number, bool(possible[row, col]), _compact(number), 7.5)
        _grid_axes(axes, list(coverage.blueprints), list(LEVER_VALUES))
        edge = -0.5
        for name, size in zip(LEVER_GROUPS, LEVER_SIZES[1:]):
            axes.text(edge + size / 2, -1.5, name, ha="center", va="bottom", fontsize=8, fontweight="bold")
            if edge > 0:
                axes.axvline(edge, color="white", linewidth=4, zorder=4)
            edge += size
        return data_uri(figure)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def _compact(number: int) -> str:
    return str(number) if number < 10_000 else f"{number / 1000:.0f}k" if number < 1_000_000 else f"{number / 1e6:.1f}M"


def _cell(axes: Any, row: int, col: int, shade: float, number: int, valid: bool, text: str, size: float) -> None:
    """One cell: shaded by how much, red-rimmed where nothing was tried, blank where nothing can be."""
    place = (col - 0.5, row - 0.5)
    if not valid:
        axes.add_patch(Rectangle(place, 1, 1, facecolor=WASH, edgecolor="white", linewidth=1.5))
        axes.text(col, row, "–" if text == "0" else text, ha="center", va="center", fontsize=size - 1, color=MUTED)
        return
    colour = SHADES(float(np.clip(shade, 0, 1))) if number else "white"
    axes.add_patch(Rectangle(place, 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5, zorder=1))
    if not number:
        inner = (col - 0.46, row - 0.44)
        rim: dict[str, Any] = {"facecolor": "white", "edgecolor": VERMILLION, "linewidth": 1.2, "zorder": 2}
        axes.add_patch(Rectangle(inner, 0.92, 0.88, **rim))
    ink = "white" if number and shade > 0.6 else INK if number else VERMILLION
    axes.text(col, row, text, ha="center", va="center", fontsize=size, color=ink, linespacing=1.05, zorder=3)


def _grid_axes(axes: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, labelcolor=INK, labelsize=7.5)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def returns_figure(returns: Mapping[str, Sequence[float]], unit: str) -> str:
    """Draw every behaviour's returns: range thin, quartiles thick, median as a dot; never acting is the line at 0."""
    names = sorted(returns, key=lambda name: (float(np.median(returns[name])), name))
    with canvas(5.6, 0.95 + 0.24 * len(names)) as figure:
        axes = figure.add_subplot()
        axes.axvline(0, color=INK, linewidth=1, zorder=1)
        for row, name in enumerate(names):
            values = np.asarray(returns[name])
            low, first, median, third, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
            axes.plot([low, high], [row, row], color="#9bbdd6", linewidth=1.2, zorder=2)
            axes.plot([first, third], [row, row], color=BLUE, linewidth=5, zorder=3, solid_capstyle="butt")
            axes.plot(median, row, "o", color="white", markeredgecolor=INK, markersize=5, zorder=4)
            axes.annotate(
                f"{100 * np.mean(values > 0):.0f} % of {len(values)}",
                (1.02, row),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=7.5,
                color=MUTED,
                annotation_clip=False,
            )
        axes.annotate("above never-act", (1.02, 1.0), xycoords="axes fraction", va="bottom", fontsize=7.5, color=MUTED)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=8.5)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color="#eceff2", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(unit)
        return data_uri(figure)


def sample_size_figure(lines: Mapping[str, tuple[Line, int]]) -> str:
    """Draw by horizon how many episodes the data are worth for each behaviour's own greedy policy."""
    with canvas(5.6, 3.1) as figure:
        axes = figure.add_subplot()
        most = max(episodes for _, episodes in lines.values())
        for line, _ in lines.values():
            axes.plot(*zip(*line), color="#9bbdd6", linewidth=1, zorder=2)
        middle = median_line({name: line for name, (line, _) in lines.items()})
        axes.plot(*zip(*middle), color=INK, linewidth=2.2, zorder=4, marker="o", markersize=2.5)
        axes.set_ylim(0, most * 1.06)
        axes.axhline(most, color=FAINT, linewidth=0.8, zorder=1)
        axes.set_xlabel("horizon: decisions from the start")
        axes.set_ylabel("effective episodes")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        ordered = sorted(lines, key=lambda name: lines[name][0][-1][1])
        shown = ordered if len(ordered) <= 2 else [ordered[0], ordered[-1]]
        labels = [(float(lines[name][0][-1][0]), lines[name][0][-1][1], name, "#2b6f9e") for name in shown]
        margin_labels(axes, [(float(middle[-1][0]), middle[-1][1], "median", INK), *labels])
        return data_uri(figure)


def median_line(lines: Mapping[str, Line]) -> list[tuple[int, float]]:
    """Return the median over the lines at every step that any of them has."""
    by_step: dict[int, list[float]] = {}
    for line in lines.values():
        for step, value in line:
            by_step.setdefault(step, []).append(value)
    return [(step, float(np.median(by_step[step]))) for step in sorted(by_step)]


def wilson(taken: NDArray[np.float64], draws: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the ends of Wilson's 95 % interval of shares."""
    z = 1.96
    centre = (taken + z**2 / (2 * draws)) / (1 + z**2 / draws)
    half = z / (1 + z**2 / draws) * np.sqrt(taken * (1 - taken) / draws + z**2 / (4 * draws**2))
    return centre - half, centre + half


def calibration_figure(calibration: Calibration) -> str:
    """Draw what the behaviours said that they would do against what they did, with 95 % intervals."""
    with canvas(5.6, 3.1) as figure:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        low, high = wilson(calibration.taken, calibration.draws)
        inside = (low <= calibration.stated) & (calibration.stated <= high)
        for place in range(len(calibration.stated)):
            colour, marker = (BLUE, "o") if inside[place] else (VERMILLION, "D")
            x = calibration.stated[place]
            axes.plot([x, x], [low[place], high[place]], color=colour, linewidth=1.6, zorder=2)
            axes.plot(x, calibration.taken[place], marker, color=colour, markersize=5.5, zorder=3)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(color="#eceff2", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("stated probability of an op")
        axes.set_ylabel("share in which it was drawn")
        return data_uri(figure)


def outside(calibration: Calibration) -> int:
    """Return in how many bins the stated probability lies outside the 95 % interval of what was drawn."""
    low, high = wilson(calibration.taken, calibration.draws)
    return int(((calibration.stated < low) | (calibration.stated > high)).sum())
