"""What policies achieved, side by side: a table for the terminal, and a self-contained page."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kairos_jax.report_page import PAGE
from schedulers.attainment import Outcome, summarize

# Figures are drawn in the light colours, which then become CSS variables: the page follows the
# reader's dark mode.
_COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#db2777", "#0891b2", "#a16207", "#64748b")
_DARK = ("#60a5fa", "#fb923c", "#34d399", "#c084fc", "#f472b6", "#22d3ee", "#facc15", "#94a3b8")
_INK, _GRID = "#0f172a", "#dbe2ea"
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--grid)"} | {
    color: f"var(--c{i})" for i, color in enumerate(_COLORS)
}
_DASHES = ("-", "--", "-.", ":")  # For readers who can't tell the colours apart.
_MAX_POINTS = 600  # Of one line: more cannot be seen, and make the page heavy.


@dataclass(frozen=True)
class Run:
    """One policy (pair) under one workload."""

    label: str
    outcomes: Sequence[Outcome]

    @cached_property
    def summary(self) -> dict[str, Any]:
        return summarize(self.outcomes)


_Span = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True)
class _Column:
    group: str
    name: str
    value: Callable[[dict[str, Any]], float | None]
    format: Callable[[float], str]
    best: Callable[[list[float]], float]

    def text(self, run: Run) -> str:
        value = self.value(run.summary)
        return "-" if value is None else self.format(value)


def _three_digits(value: float) -> str:
    """Such as 0.280, 1.56, 36.7 and 1234."""
    before = math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(2 - before, 0), 3)}f}"


def _attainment(name: str, key: str) -> _Column:
    return _Column("SLO attainment %", name, lambda s: s[key], "{:.1f}".format, max)


def _latency(group: str, key: str, quantile: str, scale: float) -> _Column:
    def value(summary: dict[str, Any]) -> float | None:
        seconds = summary[key][quantile]
        return None if seconds is None else scale * seconds

    return _Column(group, quantile, value, _three_digits, min)


_COLUMNS = (
    _attainment("TTFT", "ttft_attainment"),
    _attainment("TPOT", "tpot_attainment"),
    _attainment("both", "e2e_attainment"),
    _Column("Rate", "goodput req/s", lambda s: s["goodput_rps"], "{:.2f}".format, max),
    _Column("Rate", "decode tok/s", lambda s: s["decode_tokens_per_s"], "{:.1f}".format, max),
    *(_latency("TTFT s", "ttft_s", q, 1) for q in ("p50", "p90", "p99")),
    *(_latency("TPOT ms", "tpot_s", q, 1000) for q in ("p50", "p90", "p99")),
)


def print_table(runs: Sequence[Run], console: Console | None = None) -> None:
    """Prints a row per run, the best of each column bold; without p90 if the terminal is narrow."""
    console = console or Console()
    kept = [j for j, column in enumerate(_COLUMNS) if console.width >= 100 or column.name != "p90"]
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("policy", vertical="bottom", overflow="fold")
    for column in (_COLUMNS[j] for j in kept):
        group = "" if column.group == "Rate" else column.group.replace("attainment ", "")
        header = f"{group} {column.name}".strip().replace(" ", "\n")
        table.add_column(header, justify="right", vertical="bottom", no_wrap=True)
    best = _best(runs)
    for i, run in enumerate(runs):
        cells = [("[bold]{}[/]" if (i, j) in best else "{}", _COLUMNS[j].text(run)) for j in kept]
        table.add_row(escape(run.label), *(form.format(text) for form, text in cells))
    console.print(table)


def write_report(
    path: str | Path,
    runs: Sequence[Run],
    title: str = "kairos_jax report",
    facts: Mapping[str, str] | None = None,
) -> None:
    """Writes one HTML file that needs nothing else, to be read on any screen.

    Args:
      path: of the HTML file.
      runs: the first is drawn first; colours repeat after eight.
      facts: what the reader must know to repeat the runs: model, device, workload, versions.
    """
    page = jinja2.Template(PAGE, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = page.render(
        title=title,
        facts=facts or {},
        slo=_slo_text(runs),
        light=_COLORS,
        dark=_DARK,
        groups=[(g, sum(c.group == g for c in _COLUMNS)) for g in _groups()],
        columns=_COLUMNS,
        firsts=[next(c for c in _COLUMNS if c.group == g) for g in _groups()],
        runs=runs,
        best=_best(runs),
        figures=_figures(runs),
    )
    Path(path).write_text(html, encoding="utf-8")


def _groups() -> list[str]:
    return list(dict.fromkeys(column.group for column in _COLUMNS))


def _best(runs: Sequence[Run]) -> set[tuple[int, int]]:
    """(row, column) of the best values, ties as printed included; none where there is one run."""
    best: set[tuple[int, int]] = set()
    for j, column in enumerate(_COLUMNS if len(runs) > 1 else ()):
        values = [value for run in runs if (value := column.value(run.summary)) is not None]
        if values:
            winner = column.format(column.best(values))
            best |= {(i, j) for i, run in enumerate(runs) if column.text(run) == winner}
    return best


def _common_slo(runs: Sequence[Run], name: str) -> float | None:
    """The objective in seconds, if it is the same for every request."""
    values = {getattr(outcome.slo, name) for run in runs for outcome in run.outcomes}
    return values.pop() if len(values) == 1 else None


def _slo_text(runs: Sequence[Run]) -> str:
    ttft, tpot = _common_slo(runs, "ttft"), _common_slo(runs, "tpot")
    if ttft is None or tpot is None:
        return "differs by request"
    return f"TTFT {ttft:g} s, TPOT {1000 * tpot:g} ms"


def _figures(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """(title, caption, SVG) of each plot that there is data for."""

    def cdf(name: str, scale: float, unit: str) -> Callable[[Axes], None]:
        return lambda axes: _draw_cdf(axes, runs, name, scale, unit)

    def count(label: str, span: Callable[[Outcome], _Span]) -> Callable[[Axes], None]:
        return lambda axes: _draw_count(axes, runs, label, span)

    share = "Percent of requests, failed ones included, at or under each value; up to the 99th."
    plots: list[tuple[str, str, Callable[[Axes], None]]] = [
        ("SLO attainment", "Percent of all requests.", lambda axes: _draw_bars(axes, runs)),
        ("Time to first token", share, cdf("ttft", 1, "s")),
        ("Time per output token", share, cdf("tpot", 1000, "ms")),
    ]
    if any(outcome.done for run in runs for outcome in run.outcomes):
        queue, batch = "Requests without a first token.", "Requests between first and last token."
        plots += [
            ("Queue", queue, count("requests", lambda o: (o.arrival, o.first_token_at))),
            (
                "Decode batch",
                batch,
                count("requests", lambda o: (o.first_token_at, o.last_token_at)),
            ),
        ]
    return [(title, caption, _svg(title, draw)) for title, caption, draw in plots]


def _draw_cdf(axes: Axes, runs: Sequence[Run], name: str, scale: float, unit: str) -> None:
    slo = _common_slo(runs, name)
    right = 0.0 if slo is None else 2 * scale * slo
    for i, run in enumerate(runs):
        raw = (getattr(outcome, f"{name}_s") for outcome in run.outcomes if outcome.done)
        values = np.sort([scale * value for value in raw if value is not None])
        if not len(values):
            continue
        total = len(values) + sum(not outcome.done for outcome in run.outcomes)
        kept = _thin(len(values))
        axes.step(
            *(values[kept], 100 * (kept + 1) / total),
            where="post",
            color=_COLORS[i % len(_COLORS)],
            linestyle=_DASHES[i % len(_DASHES)],
            linewidth=1.8,
        )
        right = max(right, float(np.quantile(values, 0.99)))
    if slo is not None:
        axes.axvline(scale * slo, color=_INK, linewidth=1, linestyle=(0, (2, 2)))
        note, at = f"SLO {scale * slo:g} {unit}", (scale * slo, 3)
        axes.annotate(note, at, (4, 0), textcoords="offset points", color=_INK, fontsize=9)
    axes.set_xlabel(f"{name.upper()} ({unit})")
    axes.set_ylabel("% of requests")
    axes.set_ylim(0, 102)
    axes.set_xlim(0, 1.02 * right or 1.0)


def _draw_bars(axes: Axes, runs: Sequence[Run]) -> None:
    columns = [column for column in _COLUMNS if column.group.startswith("SLO")]
    width = 0.8 / max(len(runs), 1)
    for i, run in enumerate(runs):
        heights = [column.value(run.summary) or 0.0 for column in columns]
        left = np.arange(len(columns)) + (i - (len(runs) - 1) / 2) * width
        bars = axes.bar(left, heights, 0.9 * width, color=_COLORS[i % len(_COLORS)])
        if len(runs) <= 5:  # With more, the figures would run into each other.
            axes.bar_label(bars, fmt="%.0f", fontsize=9, color=_INK, padding=1)
    axes.set_xticks(range(len(columns)), [column.name for column in columns])
    axes.set_ylabel("% of requests")
    axes.set_ylim(0, 109)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(False, axis="x")


def _draw_count(
    axes: Axes, runs: Sequence[Run], label: str, span: Callable[[Outcome], _Span]
) -> None:
    """How many answered requests are within their span, over time."""
    for i, run in enumerate(runs):
        spans = [span(outcome) for outcome in run.outcomes if outcome.done]
        if spans:
            begins, ends = np.sort(np.asarray(spans, dtype=float), axis=0).T
            times = np.unique(np.concatenate([begins, ends]))
            times = times[_thin(len(times))]
            inside = np.searchsorted(begins, times, "right") - np.searchsorted(ends, times, "right")
            color = _COLORS[i % len(_COLORS)]
            axes.step(times, inside, where="post", color=color, linewidth=1.4)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("time (s)")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)


def _thin(count: int) -> np.ndarray:
    """Indices of at most _MAX_POINTS of `count` points, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, _MAX_POINTS)).round().astype(int))


def _svg(title: str, draw: Callable[[Axes], None]) -> str:
    style: dict[Any, Any] = {
        "axes.edgecolor": _GRID,
        "axes.grid": True,
        "axes.labelcolor": _INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 10,
        "grid.color": _GRID,
        "svg.fonttype": "none",  # The page's own font, and text that can be selected.
        "svg.hashsalt": title,  # Stable ids, distinct between the figures of one page.
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(
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
