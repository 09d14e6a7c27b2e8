"""What policies achieved, side by side: a table for the terminal, and a self-contained page."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kairos_jax.lab.curves import cdf, thin
from kairos_jax.lab.report import figures
from kairos_jax.lab.report.figures import Figure, figure
from kairos_jax.lab.report.page import TEMPLATES
from schedulers.simulation.attainment import Outcome, summarize


@dataclass(frozen=True)
class Run:
    """One policy (pair) under one workload. pace: measured over predicted step time, of all steps
    in sum; 1 where it is not known.
    """

    label: str
    outcomes: Sequence[Outcome]
    pace: float = 1.0

    @cached_property
    def summary(self) -> dict[str, Any]:
        return summarize(self.outcomes)


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a table whose outcomes are no longer there. summary: of `summarize`."""

    label: str
    summary: dict[str, Any]


Row = Run | Line

_Span = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True)
class _Column:
    group: str
    name: str
    value: Callable[[dict[str, Any]], float | None]
    format: Callable[[float], str]
    best: Callable[[list[float]], float]

    def text(self, run: Row) -> str:
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


def print_table(runs: Sequence[Row], console: Console | None = None) -> None:
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
    warnings: Sequence[str] = (),
) -> None:
    """Writes one HTML file that needs nothing else, to be read on any screen.

    Args:
      path: of the HTML file.
      runs: the first is drawn first; colours repeat after eight.
      facts: what the reader must know to repeat the runs: model, device, workload, versions.
      warnings: what the reader must know before any figure, a sentence each.
    """
    html = render(
        "runs",
        title=title,
        facts={"SLO": _slo_text(runs), **(facts or {})},
        warnings=warnings,
        table=table_of(runs),
        runs=runs,
        figures=_figures(runs),
    )
    Path(path).write_text(html, encoding="utf-8")


def render(page: str, **values: Any) -> str:
    """One of the pages of `report_page`."""
    loader = jinja2.DictLoader(TEMPLATES)
    jinja = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return jinja.get_template(page).render(light=figures.COLORS, dark=figures.DARK, **values)


def table_of(rows: Sequence[Row]) -> dict[str, Any]:
    """What a page needs to show a table of all the columns."""
    groups = list(dict.fromkeys(column.group for column in _COLUMNS))
    return {
        "groups": [(group, sum(c.group == group for c in _COLUMNS)) for group in groups],
        "columns": _COLUMNS,
        "firsts": [next(c for c in _COLUMNS if c.group == group) for group in groups],
        "rows": rows,
        "best": _best(rows),
    }


def _best(runs: Sequence[Row]) -> set[tuple[int, int]]:
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


SHARE = "Percent of requests, failed ones included, at or under each value."


def _figures(runs: Sequence[Run]) -> list[Figure]:
    """Each plot that there is data for."""

    def distribution(name: str, scale: float, unit: str) -> Callable[[Axes], None]:
        curves = [cdf(run.outcomes, f"{name}_s") for run in runs]
        slo_s = _common_slo(runs, name)
        return lambda axes: figures.cdf_lines(axes, curves, name.upper(), slo_s, scale, unit)

    def attainments(axes: Axes) -> None:
        columns = [column for column in _COLUMNS if column.group.startswith("SLO")]
        heights = [[column.value(run.summary) or 0.0 for column in columns] for run in runs]
        figures.bars(axes, [column.name for column in columns], heights)

    def counts(span: Callable[[Outcome], _Span]) -> Callable[[Axes], None]:
        return lambda axes: _draw_count(axes, runs, "requests", span)

    drawn = [
        figure("SLO attainment", "Percent of all requests.", attainments),
        figure("Time to first token", SHARE, distribution("ttft", 1, "s")),
        figure("Time per output token", SHARE, distribution("tpot", 1000, "ms")),
    ]
    if any(outcome.done for run in runs for outcome in run.outcomes):
        queue = counts(lambda o: (o.arrival, o.first_token_at))
        batch = counts(lambda o: (o.first_token_at, o.last_token_at))
        drawn += [
            figure("Queue", "Requests without a first token.", queue),
            figure("Decode batch", "Requests between first and last token.", batch),
        ]
    return drawn


def _draw_count(
    axes: Axes, runs: Sequence[Run], label: str, span: Callable[[Outcome], _Span]
) -> None:
    """How many answered requests are within their span, over time."""
    for i, run in enumerate(runs):
        spans = [span(outcome) for outcome in run.outcomes if outcome.done]
        if spans:
            begins, ends = np.sort(np.asarray(spans, dtype=float), axis=0).T
            times = np.unique(np.concatenate([begins, ends]))
            times = times[thin(len(times))]
            inside = np.searchsorted(begins, times, "right") - np.searchsorted(ends, times, "right")
            figures.line(axes, i, (times, inside), step=True, thin=True)
    figures.count_axis(axes, label)
