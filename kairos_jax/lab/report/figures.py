"""Plots as SVG to be put into a page, whose colours follow the reader's dark mode."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Figures are drawn in the light colours, which then become CSS variables.
COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#db2777", "#0891b2", "#a16207", "#64748b")
DARK = ("#60a5fa", "#fb923c", "#34d399", "#c084fc", "#f472b6", "#22d3ee", "#facc15", "#94a3b8")
INK, GRID = "#0f172a", "#dbe2ea"
_VARIABLES = {INK: "var(--ink)", GRID: "var(--grid)"} | {
    color: f"var(--c{i})" for i, color in enumerate(COLORS)
}
_DASHES = ("-", "--", "-.", ":")  # for readers who can't tell the colours apart
_MARKERS = "osD^vPX*"
# From so many times the SLO on, times are on a logarithmic axis.
_LOG_FROM = 6


@dataclass(frozen=True, slots=True)
class Figure:
    """One plot of a page."""

    title: str
    caption: str
    svg: str


Points = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]


def figure(title: str, caption: str, draw: Callable[[Axes], None], salt: str = "") -> Figure:
    """salt: tells apart figures of one title on a page."""
    return Figure(title, caption, _svg(f"{title} {salt}", draw))


def line(
    axes: Axes,
    index: int,
    points: Points,
    *,
    step: bool = False,
    mark: bool = False,
    thin: bool = False,
) -> None:
    """One of several lines; colours repeat after eight. mark: shows each point. thin: for lines
    that go up and down, which dashes would break up.
    """
    style: dict[str, Any] = {
        "color": COLORS[index % len(COLORS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "linewidth": 1.8,
    }
    if thin:
        style |= {"linestyle": "-", "linewidth": 1.1}
    if mark:
        style |= {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 5}
    if step:
        axes.step(*points, where="post", **style)
    else:
        axes.plot(*points, **style)


def emphasize(axes: Axes, index: int, point: tuple[float, float]) -> None:
    """Makes one point of a marked line larger."""
    color, marker = COLORS[index % len(COLORS)], _MARKERS[index % len(_MARKERS)]
    axes.plot(*point, color=color, marker=marker, markersize=10, linestyle="none")


def bars(axes: Axes, names: Sequence[str], heights: Sequence[Sequence[float]]) -> None:
    """A group of bars for each name [G], with one of each series [S][G], in percent."""
    width = 0.8 / max(len(heights), 1)
    for i, series in enumerate(heights):
        left = np.arange(len(names)) + (i - (len(heights) - 1) / 2) * width
        drawn = axes.bar(left, series, 0.9 * width, color=COLORS[i % len(COLORS)])
        if len(heights) <= 5:  # with more, the figures would run into each other
            axes.bar_label(drawn, fmt="%.0f", fontsize=9, color=INK, padding=1)
    axes.set_xticks(range(len(names)), names)
    percent_axis(axes, 109)
    axes.grid(False, axis="x")


def cdf_lines(
    axes: Axes, curves: Sequence[Points], name: str, slo_s: float | None, scale: float, unit: str
) -> None:
    """Distribution functions of a time in seconds, shown in a `unit` of which a second has `scale`.
    The axis reaches the 99th percentile of each; it is logarithmic where that would squeeze the
    rest.

    slo_s: drawn, if it is the same for all.
    """
    drawn = [
        (i, scale * np.asarray(values), p) for i, (values, p) in enumerate(curves) if len(values)
    ]
    for i, values, percent in drawn:
        line(axes, i, (values, percent), step=True)
    right = max((_quantile(values, percent, 0.99) for _, values, percent in drawn), default=0.0)
    middle = max((_quantile(values, percent, 0.5) for _, values, percent in drawn), default=0.0)
    if slo_s is not None:
        middle = scale * slo_s
        right = max(right, 1.25 * middle)
        mark_vertical(axes, middle, f"SLO {middle:g} {unit}")
    percent_axis(axes)
    least = min((values[values > 0].min(initial=math.inf) for _, values, _ in drawn), default=0.0)
    if right > _LOG_FROM * middle > 0 and least < middle:
        axes.set_xscale("log")
        axes.set_xlim(0.9 * least, 1.1 * right)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        unit += ", logarithmic"
    else:
        axes.set_xlim(0, 1.02 * right or 1.0)
    axes.set_xlabel(f"{name} ({unit})")


def _quantile(values: np.ndarray, percent: Sequence[float] | np.ndarray, share: float) -> float:
    """Of the requests that were answered."""
    within = int(np.searchsorted(percent, share * percent[-1]))
    return float(values[min(within, len(values) - 1)])


def percent_axis(axes: Axes, top: float = 102) -> None:
    axes.set_ylabel("% of requests")
    axes.set_ylim(0, top)
    axes.set_yticks(range(0, 101, 20))


def count_axis(axes: Axes, label: str) -> None:
    """Whole numbers over the time of a run."""
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    time_axis(axes)


def time_axis(axes: Axes) -> None:
    axes.set_xlabel("time (s)")
    axes.set_xlim(left=0)


def mark_vertical(axes: Axes, at: float, note: str) -> None:
    """A thin line with a note above the axes, where no curve runs."""
    axes.axvline(at, color=INK, linewidth=1, linestyle=(0, (2, 2)))
    where = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
    axes.annotate(note, (at, 1), (0, 3), **where, ha="center", color=INK, fontsize=9)


def mark_horizontal(axes: Axes, at: float) -> None:
    axes.axhline(at, color=INK, linewidth=1, linestyle=(0, (2, 2)))


def _svg(salt: str, draw: Callable[[Axes], None]) -> str:
    style: dict[Any, Any] = {
        "axes.edgecolor": GRID,
        "axes.grid": True,
        "axes.labelcolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 10,
        "grid.color": GRID,
        "svg.fonttype": "none",  # the page's own font, and text that can be selected
        "svg.hashsalt": salt,  # stable ids, distinct between the figures of one page
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=(5.4, 3.1), layout="constrained")
        axes = canvas.add_subplot()
        axes.set_axisbelow(True)
        draw(axes)
        buffer = io.StringIO()
        canvas.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", '<svg role="img"', 1)
    # Names such as "patch_1" come again in each figure, and nothing refers to them.
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg
