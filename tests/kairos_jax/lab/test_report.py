import csv
import io
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from kairos_jax.lab.cells import Cell, Layout, result
from kairos_jax.lab.curves import cdf
from kairos_jax.lab.report import figures, sweep
from kairos_jax.lab.report.comparison import Run, _draw_count, print_table, write_report
from kairos_jax.lab.report.table import row, write_table
from schedulers.ledger.request import Slo
from schedulers.simulation.attainment import Outcome

SLO = Slo(ttft=0.5, tpot=0.05)


def outcome(arrival: float, ttft: float, tpot: float, num_output: int = 11) -> Outcome:
    first = arrival + ttft
    return Outcome(SLO, arrival, first, first + (num_output - 1) * tpot, num_output)


def failed(arrival: float) -> Outcome:
    return Outcome(SLO, arrival, ok=False)


FAST = Run(
    "urgency + slack",
    [outcome(0, 0.1, 0.01), outcome(1, 0.2, 0.02), outcome(2, 0.3, 0.0, num_output=1)],
)
SLOW = Run("fcfs [x] <b>", [outcome(0, 0.4, 0.01), outcome(1, 12.3, 0.9), failed(2)])


def printed(runs: list[Run], width: int = 120) -> str:
    buffer = io.StringIO()
    print_table(runs, Console(file=buffer, width=width))
    return buffer.getvalue()


def page(tmp_path, runs: list[Run], **options) -> str:
    write_report(tmp_path / "report.html", runs, **options)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_table_has_a_row_per_run():
    rows = printed([FAST, SLOW]).splitlines()[-2:]
    # TTFT, TPOT, both %; goodput, decode tokens/s; TTFT and TPOT at p50, p90, p99.
    assert rows[0].split()[3:8] == ["100.0", "100.0", "100.0", "1.30", "8.7"]
    assert rows[0].split()[8:] == ["0.200", "0.280", "0.298", "15.0", "19.0", "19.9"]
    assert rows[1].startswith("fcfs [x] <b>")
    assert rows[1].split()[3:8] == ["33.3", "33.3", "33.3", "0.04", "0.9"]


def test_table_fits_a_narrow_terminal():
    text = printed([FAST, SLOW], width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "p90" not in text
    assert "p99" in text


@pytest.mark.parametrize("runs", [[], [Run("nothing", [])], [Run("all failed", [failed(0)])]])
def test_runs_without_answers_are_reported_too(runs, tmp_path):
    assert printed(runs).count(" - ") == (5 if runs else 0)
    assert "<svg" in page(tmp_path, runs)


def test_page_needs_nothing_from_outside(tmp_path):
    html = page(tmp_path, [FAST, SLOW], facts={"model": "tiny"})
    assert not re.findall(r"(?:src|href)=\"(?!#)|<link|<script|url\((?!#)|@import", html)
    assert set(re.findall(r"https?://[\w./]+", html)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }


def test_page_escapes_labels_and_shows_facts(tmp_path):
    html = page(tmp_path, [FAST, SLOW], title="A & B", facts={"device": "<cpu>"})
    assert "fcfs [x] &lt;b&gt;" in html
    assert "<dt>device</dt><dd>&lt;cpu&gt;</dd>" in html
    assert "<h1>A &amp; B</h1>" in html
    assert "TTFT 0.5 s, TPOT 50 ms" in html
    assert "<b>100.0</b>" in html


def test_figures_are_well_formed_and_follow_dark_mode(tmp_path):
    html = page(tmp_path, [FAST, SLOW])
    figures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(figures) == 5
    ids = []
    for figure in figures:
        ids += [id for e in ET.fromstring(figure).iter() if (id := e.get("id"))]
        # No colour is fixed but through a variable that dark mode changes.
        assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{3,6}", figure)
    assert len(ids) == len(set(ids))
    assert "SLO 0.5 s" in figures[1]
    assert "SLO 50 ms" in figures[2]


def test_no_answers_no_figure_of_the_batch(tmp_path):
    assert page(tmp_path, [Run("all failed", [failed(0)])]).count("<svg") == 3


def test_counts_over_time(tmp_path):
    axes = Figure().subplots()
    overlapping = [outcome(0, 1, 0.1), outcome(0.5, 1, 0.1), failed(3)]
    span = lambda o: (o.arrival, o.first_token_at)  # noqa: E731
    _draw_count(axes, [Run("two", overlapping)], "requests", span)
    (line,) = axes.lines
    assert [tuple(point) for point in line.get_xydata()] == [(0, 1), (0.5, 2), (1, 1), (1.5, 0)]


def test_page_is_the_same_every_time(tmp_path):
    assert page(tmp_path, [FAST, SLOW]) == page(tmp_path, [FAST, SLOW])


def test_slo_line_only_where_there_is_one_slo(tmp_path):
    other = Outcome(Slo(1.0, 0.1), 0.0, 0.2, 0.4, 3)
    html = page(tmp_path, [Run("mixed", [*FAST.outcomes, other])])
    assert "differs by request" in html
    assert "SLO 0.5 s" not in html


def test_long_runs_stay_light(tmp_path):
    outcomes = [outcome(i / 10, 0.1 + i / 1e4, 0.01) for i in range(20000)]
    assert len(page(tmp_path, [Run("long", outcomes)])) < 400_000


@pytest.mark.parametrize("scale", [1.0, 0.05])
def test_times_are_shown_up_to_their_99th_percentile(scale):
    # Half of the requests are far beyond the SLO, or all are within.
    outcomes = [outcome(i, scale * (0.1 if i % 2 else 20.0 + i / 10), 0.01) for i in range(200)]
    tail = np.quantile([each.ttft_s for each in outcomes], 0.99)
    axes = Figure().subplots()
    figures.cdf_lines(axes, [cdf(outcomes, "ttft_s")], "TTFT", SLO.ttft, 1, "s")
    assert axes.get_xlim()[1] >= tail
    assert axes.get_xlim()[1] >= SLO.ttft
    assert axes.get_xscale() == ("log" if tail > 6 * SLO.ttft else "linear")
    assert (", logarithmic" in axes.get_xlabel()) == (axes.get_xscale() == "log")


def test_the_tail_of_each_row_is_shown_and_not_that_of_the_best_alone():
    axes = Figure().subplots()
    quick, slow = ([outcome(i, ttft, 0.01) for i in range(50)] for ttft in (0.2, 2.0))
    curves = [cdf(each, "ttft_s") for each in (quick, slow)]
    figures.cdf_lines(axes, curves, "TTFT", SLO.ttft, 1, "s")
    assert axes.get_xlim()[1] >= 2.0


def test_notes_stand_above_the_axes_where_no_curve_runs():
    axes = Figure().subplots()
    figures.cdf_lines(axes, [cdf(FAST.outcomes, "ttft_s")], "TTFT", SLO.ttft, 1, "s")
    (note,) = axes.texts
    assert note.get_text() == "SLO 0.5 s"
    axes.figure.canvas.draw()
    assert note.get_window_extent().y0 >= axes.get_window_extent().y1


def test_warnings_come_before_all_else(tmp_path):
    html = page(tmp_path, [FAST, SLOW], facts={"model": "tiny"}, warnings=["<careful>"])
    assert 0 < html.index("&lt;careful&gt;</p>") < html.index("<dl>") < html.index("<table>")
    assert 'class="warning"' not in page(tmp_path, [FAST, SLOW])


def test_wide_tables_scroll_with_a_hint(tmp_path):
    html = page(tmp_path, [FAST, SLOW])
    assert '<p class="hint wide" aria-hidden="true">The table scrolls sideways' in html
    assert 'tabindex="0" role="region" aria-label="Table of all figures"' in html


# Of a sweep.

BASE, OURS = ("fcfs", "continuous"), ("kairos", "kairos")
TIMELINE = {"at_s": [0.0, 1.0], "queue": [3, 0], "batch": [1, 2], "slack_s": [0.04, 0.01]}
ONE_ONE, BIG = Layout(1, 1), Layout(4, 4)


def cell_result(policies, rate, run, layout=ONE_ONE, cap=8, pack=0.0):
    return result(Cell(layout, policies, cap, pack, rate), run.outcomes, TIMELINE)


SWEPT = [
    cell_result(policies, rate, run, layout, cap)
    for layout in (ONE_ONE, Layout(colocated=2))
    for policies, run in ((BASE, SLOW), (OURS, FAST))
    for cap in (8, 16)
    for rate in (1.0, 2.0)
]


def test_the_answer_is_the_first_that_a_sweep_shows(tmp_path):
    html = sweep_page(tmp_path, SWEPT)
    answer, table = html.index('<p class="answer">kairos + kairos on'), html.index("<table>")
    assert html.index("<h1>") < answer < table < html.index("<dl>") < html.index("<nav")
    first = html[table : html.index("</table>")]
    assert re.findall("<th>(.*?)</th>", first) == [
        "policies",
        "1 prefill + 1 decode",
        "2 colocated",
    ]
    # The layouts are of different sizes only where that is so.
    assert "per instance" not in first
    assert "per instance" in sweep_page(tmp_path, [*SWEPT, cell_result(OURS, 1.0, FAST, BIG)])


def test_a_list_of_contents_names_all_sections(tmp_path):
    html = sweep_page(tmp_path, SWEPT)
    listed = re.findall('<li><a href="#(.*?)">(.*?)</a>', html)
    assert [id for id, _ in listed] == [
        *("claims", "layout-1", "layout-1-rate", "layout-2", "layout-2-rate", "cells")
    ]
    assert all(html.count(f' id="{id}"') == 1 for id, _ in listed)
    assert "<nav" not in sweep_page(tmp_path, SWEPT[:1])


def test_a_layout_has_one_name_in_all_that_is_written(tmp_path):
    html = sweep_page(tmp_path, SWEPT)
    assert "1 prefill + 1 decode" in html
    assert not re.search(r"\b1:1\b|xcolocated", html)


def sweep_page(tmp_path, results) -> str:
    sweep.write_report(tmp_path / "sweep.html", results, "A & B", {"SLO": "<tight>"})
    return (tmp_path / "sweep.html").read_text(encoding="utf-8")


def test_a_sweep_has_a_section_for_each_layout(tmp_path):
    html = sweep_page(tmp_path, SWEPT)
    headings = re.findall("<h2.*?>(.*?)</h2>", html)
    assert headings == [
        "Against the baseline, and the paper",
        "1 prefill + 1 decode",
        "1 prefill + 1 decode, 2 requests/s",
        "2 colocated",
        "2 colocated, 2 requests/s",
    ]
    assert html.count("<svg") == 2 * 12
    assert "All 16 cells" in html
    assert "&lt;tight&gt;" in html
    assert "+66.7" in html  # 33.3 to 100 % of the requests


def test_figures_of_a_sweep_are_well_formed_and_follow_dark_mode(tmp_path):
    html = sweep_page(tmp_path, SWEPT)
    ids = []
    for figure in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ids += [id for e in ET.fromstring(figure).iter() if (id := e.get("id"))]
        assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{3,6}", figure)
    assert len(ids) == len(set(ids))
    assert not re.findall(r"(?:src|href)=\"(?!#)|<link|<script|url\((?!#)|@import", html)


def test_a_sweep_of_one_pair_has_nothing_to_compare(tmp_path):
    html = sweep_page(tmp_path, SWEPT[:1])
    assert "and the paper" not in html
    assert html.count("<svg") == 12


def test_a_sweep_in_which_nothing_was_answered(tmp_path):
    none = Run("none", [failed(0), failed(1)])
    html = sweep_page(tmp_path, [cell_result(p, 1.0, none) for p in (BASE, OURS)])
    assert html.count("<svg") == 12


def test_a_tidy_table_has_a_row_per_cell(tmp_path):
    write_table(tmp_path, [*SWEPT, cell_result(OURS, 3.0, FAST, pack=math.inf)])
    with (tmp_path / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 17
    first, last = rows[0], rows[-1]
    assert first["layout"] == "1 prefill + 1 decode"
    assert (first["prefill_policy"], first["max_batch"]) == ("fcfs", "8")
    assert (last["rate"], last["pack"], last["e2e_attainment"]) == ("3.0", "inf", "100.0")
    assert float(first["ttft_p50_s"]) == pytest.approx(6.35)
    assert {key for key in row(SWEPT[0]) if key.startswith("class_1_")} >= {"class_1_ttft"}
    assert not any(isinstance(value, dict | list) for value in row(SWEPT[0]).values())


def test_the_terminal_shows_the_rate_that_is_held():
    heading, lines = sweep.essence(SWEPT)[0]
    assert heading == "1 prefill + 1 decode, 2 requests/s"
    assert [each.label for each in lines] == ["fcfs + continuous, cap 8", "kairos + kairos, cap 8"]
