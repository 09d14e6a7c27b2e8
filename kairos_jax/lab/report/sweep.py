"""What a sweep found, as a page: its curves, beside the baseline and the paper."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from kairos_jax.lab.answer import Held, answer, rates_held
from kairos_jax.lab.cells import Cell, Layout, Result
from kairos_jax.lab.claims import (
    HELD,
    Comparison,
    Gain,
    compare,
    load_text,
    pairs_of,
    shown_rate,
    tuned,
    variant_text,
    verdict,
)
from kairos_jax.lab.report import figures
from kairos_jax.lab.report.comparison import SHARE, Line, render, table_of
from kairos_jax.lab.report.figures import Figure, figure


def essence(results: Sequence[Result]) -> list[tuple[str, list[Line]]]:
    """For a terminal: of each layout, the pairs at the rate that the page shows."""
    found = []
    for layout in dict.fromkeys(each.cell.layout for each in results):
        mine = [each for each in results if each.cell.layout == layout]
        rate = shown_rate(mine)
        found.append((f"{layout}, {rate:g} requests/s", lines_at(mine, layout, rate)))
    return found


def lines_at(results: Sequence[Result], layout: Layout, rate: float) -> list[Line]:
    """Each pair of policies at a load, at its best cap and packing."""
    best = _best_at(results, (layout, rate))
    caps = len({each.cell.max_batch for each in results}) > 1
    return [
        Line(
            _label(result.cell) + (f", cap {result.cell.max_batch}" if caps else ""), result.summary
        )
        for result in best
    ]


def write_report(
    path: Path, results: Sequence[Result], title: str, facts: Mapping[str, str]
) -> None:
    """Writes one HTML file that needs nothing else.

    results: of a grid; the first pair of policies is the baseline. facts: what the reader must know
    to repeat it.
    """
    layouts = list(dict.fromkeys(each.cell.layout for each in results))
    comparisons = compare(results) if len(pairs_of(results)) > 1 else []
    claims = [_claims_table(each, len(layouts) > 1) for each in comparisons]
    sections = [_section(results, layout, at) for at, layout in enumerate(layouts, 1)]
    cells = _cells_table(results)
    html = render(
        "sweep",
        title=title,
        facts=facts,
        # No line is broken between a number and its unit.
        answer=answer(results).replace(" %", "\N{NO-BREAK SPACE}%"),
        held=_held_table(rates_held(results)),
        contents=_contents(claims, sections, len(cells["rows"])),
        claims=claims,
        sections=sections,
        cells=cells,
    )
    path.write_text(html, encoding="utf-8")


def _contents(
    claims: Sequence[Any], sections: Sequence[Mapping[str, Any]], num_cells: int
) -> list[tuple[str, str]]:
    """Where on the page what is."""
    entries = [("claims", "Against the baseline, and the paper")] if claims else []
    for each in sections:
        entries.append((each["id"], f"{each['title']}, by rate"))
        entries.append((f"{each['id']}-rate", f"{each['title']}, {each['rate']} requests/s"))
    return [*entries, ("cells", f"All {num_cells} cells")]


def _held_table(found: Sequence[Held]) -> dict[str, Any]:
    """The answer in a table: a row for each pair of policies, a column for each layout."""
    layouts = list(dict.fromkeys(each.layout for each in found))
    best = max(each.rank for each in found)
    sizes = len({layout.instances for layout in layouts})
    cells = {(each.pair, each.layout): _held_cell(each, best, sizes > 1) for each in found}
    pairs = dict.fromkeys(each.pair for each in found)
    return {
        "title": f"Highest rate held, requests/s: at least {HELD:g} % attain both SLOs",
        "columns": ["policies", *map(str, layouts)],
        "firsts": [],
        "rows": [
            [" + ".join(pair), *(cells.get((pair, layout), "-") for layout in layouts)]
            for pair in pairs
        ],
    }


def _held_cell(each: Held, best: tuple[float, float], several_sizes: bool) -> str:
    if each.held is None:
        nearest = each.nearest
        near = f"{nearest.summary['e2e_attainment']:.1f} % at {nearest.cell.rate:g}"
        return Markup("none<br><small>{}</small>").format(near)
    rate = each.held.cell.rate
    note = f"{each.held.summary['e2e_attainment']:.1f} %"
    if several_sizes:
        note += f", {rate / each.layout.instances:.3g} per instance"
    form = "<b>{}</b>" if each.rank == best else "{}"
    return Markup(f"{form}<br><small>{{}}</small>").format(f"{rate:g}", note)


def _section(results: Sequence[Result], layout: Layout, at: int) -> dict[str, Any]:
    """at: from 1 on, in the order of the page."""
    mine = [each for each in results if each.cell.layout == layout]
    rate = shown_rate(mine)
    return {
        "id": f"layout-{at}",
        "title": str(layout),
        "rate": f"{rate:g}",
        "labels": [" + ".join(pair) for pair in pairs_of(mine)],
        "by_rate": _by_rate(mine, str(layout)),
        "table": table_of(lines_at(mine, layout, rate)),
        "at_rate": _at_rate(_best_at(mine, (layout, rate)), str(layout)),
    }


def _by_rate(results: Sequence[Result], salt: str) -> list[Figure]:
    """Each pair's figures against rate."""
    rates = sorted({each.cell.rate for each in results})
    curves = []
    for pair in pairs_of(results):
        best = tuned([each for each in results if each.cell.policies == pair])
        curves.append(sorted(best.values(), key=lambda each: each.cell.rate))

    def against_rate(key: str, label: str | None = None) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for index, curve in enumerate(curves):
                at = [each.cell.rate for each in curve]
                figures.line(axes, index, (at, [each.summary[key] for each in curve]), mark=True)
            axes.set_xlabel("requests/s")
            if label is None:
                figures.percent_axis(axes)
                figures.mark_horizontal(axes, HELD)
            else:
                axes.set_ylabel(label)
                axes.set_ylim(bottom=0)

        return draw

    def against_attainment(axes: Axes) -> None:
        for index, curve in enumerate(curves):
            attained = [each.summary["e2e_attainment"] for each in curve]
            tokens = [each.summary["decode_tokens_per_s"] for each in curve]
            figures.line(axes, index, (attained, tokens), mark=True)
            figures.emphasize(axes, index, (attained[-1], tokens[-1]))
        axes.set_xlabel("% of requests that attained both")
        axes.set_xlim(0, 102)
        axes.set_ylabel("decode tokens/s")

    held = f"Percent of all requests; the line is at {HELD:g} %."
    return [
        figure("End-to-end attainment", held, against_rate("e2e_attainment"), salt),
        figure("Goodput", "Met both objectives.", against_rate("goodput_rps", "requests/s"), salt),
        figure("TTFT attainment", held, against_rate("ttft_attainment"), salt),
        figure("TPOT attainment", held, against_rate("tpot_attainment"), salt),
        figure(
            "Decode throughput",
            "Output tokens after each request's first, over the whole run.",
            against_rate("decode_tokens_per_s", "tokens/s"),
            salt,
        ),
        figure(
            "Decode throughput against attainment",
            f"A point a rate; the large one is the highest, {rates[-1]:g} requests/s. Up and to "
            "the right is better.",
            against_attainment,
            salt,
        ),
    ]


def _at_rate(best: Sequence[Result], salt: str) -> list[Figure]:
    """What happened within a run of each pair."""

    def distribution(name: str, scale: float, unit: str) -> Callable[[Axes], None]:
        slos = {each[name] for result in best for each in result.summary["e2e_by_class"]}
        slo_s = slos.pop() if len(slos) == 1 else None
        curves = [getattr(each, f"{name}_s") for each in best]
        return lambda axes: figures.cdf_lines(axes, curves, name.upper(), slo_s, scale, unit)

    def over_time(key: str, label: str, scale: float = 1.0) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for index, each in enumerate(best):
                values = [scale * value for value in each.timeline[key]]
                points = (each.timeline["at_s"], values)
                figures.line(axes, index, points, step=True, thin=True)
            if scale == 1.0:
                figures.count_axis(axes, label)
            else:
                figures.time_axis(axes)
                axes.set_ylabel(label)
                figures.mark_horizontal(axes, 0.0)

        return draw

    def by_length(axes: Axes) -> None:
        for index, each in enumerate(best):
            tenths = [
                (tenth, percent)
                for tenth, percent in enumerate(each.summary["e2e_by_output_decile"], 1)
                if percent is not None
            ]
            where, percents = [at for at, _ in tenths], [percent for _, percent in tenths]
            figures.line(axes, index, (where, percents), mark=True)
        axes.set_xlabel("tenth of the requests, by output length")
        axes.set_xticks(range(1, 11))
        figures.percent_axis(axes)

    step = "Of the first instance that decodes"
    return [
        figure("Time to first token", SHARE, distribution("ttft", 1, "s"), salt),
        figure("Time per output token", SHARE, distribution("tpot", 1000, "ms"), salt),
        figure("Queue", "Requests whose prompt waits.", over_time("queue", "requests"), salt),
        figure("Decode batch", f"{step}.", over_time("batch", "sequences a step"), salt),
        figure(
            "Step slack",
            f"{step}: least TPOT of the batch less the predicted step time.",
            over_time("slack_s", "ms", 1000),
            salt,
        ),
        figure("Attainment by output length", "Both objectives; shortest first.", by_length, salt),
    ]


def _best_at(results: Sequence[Result], load: tuple[Layout, float]) -> list[Result]:
    best = [tuned([r for r in results if r.cell.policies == p]) for p in pairs_of(results)]
    return [each[load] for each in best if load in each]


def _claims_table(comparison: Comparison, several_layouts: bool) -> dict[str, Any]:
    rows = []
    for claim, gains in comparison.gains:
        cells = [_gain_cell(gain, several_layouts) for gain in gains]
        rows.append([claim.name, claim.text(claim.paper, unit=True), *cells])
    return {
        "title": comparison.title,
        "columns": ["claim", "paper, up to", *(" + ".join(pair) for pair in comparison.pairs)],
        "firsts": list(range(1, 2 + len(comparison.pairs))),
        "rows": rows,
        "note": f"Bold reaches the paper's figure. {verdict(comparison)}",
    }


def _gain_cell(gain: Gain | None, several_layouts: bool) -> str:
    if gain is None:
        return "-"
    form = "<b>{}</b>" if gain.reached else "{}"
    at = load_text(gain.ours.cell, several_layouts)
    return Markup(f"{form}<br><small>{{}} at {{}}<br>baseline: {{}}</small>").format(
        gain.claim.text(gain.gain), gain.levels, at, variant_text(gain.baseline.cell)
    )


def _cells_table(results: Sequence[Result]) -> dict[str, Any]:
    columns = {
        "TTFT %": ("ttft_attainment", ".1f"),
        "TPOT %": ("tpot_attainment", ".1f"),
        "both %": ("e2e_attainment", ".1f"),
        "goodput req/s": ("goodput_rps", ".2f"),
        "decode tok/s": ("decode_tokens_per_s", ".1f"),
    }
    rows = [
        [
            _label(each.cell),
            str(each.cell.layout),
            f"{each.cell.rate:g}",
            variant_text(each.cell),
            *(format(each.summary[key], form) for key, form in columns.values()),
        ]
        for each in results
    ]
    names = ["policy", "layout", "requests/s", "variant", *columns]
    return {"title": "", "columns": names, "firsts": [4, 7], "rows": rows}


def _label(cell: Cell) -> str:
    return " + ".join(cell.policies)
