"""What a sweep answers first: which policies, on which layout, at which rate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kairos_jax.lab.cells import Layout, Result
from kairos_jax.lab.claims import HELD, Load, highest_held, pairs_of, tuned, variant_text

Pair = tuple[str, str]

# Others that hold the same rate and are named, so that the answer stays a sentence.
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Held:
    """What one pair of policies does on one layout.

    held: at the highest rate that it holds; None if it holds none. nearest: at the rate of its best
    attainment. swept: the highest rate that was swept.
    """

    pair: Pair
    layout: Layout
    held: Result | None
    nearest: Result
    swept: float

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better: the rate that it holds, then attainment."""
        shown = self.held or self.nearest
        return self.held.cell.rate if self.held else 0.0, shown.summary["e2e_attainment"]


def rates_held(results: Sequence[Result]) -> list[Held]:
    """Of each pair of policies on each layout, in their order; each load at its best variant."""
    found = []
    for pair in pairs_of(results):
        best = tuned([each for each in results if each.cell.policies == pair])
        held = {layout: result for (layout, _), result in highest_held(best).items()}
        for layout in dict.fromkeys(layout for layout, _ in best):
            mine = _of(best, layout)
            nearest = max(mine, key=lambda each: each.summary["e2e_attainment"])
            swept = max(each.cell.rate for each in mine)
            found.append(Held(pair, layout, held.get(layout), nearest, swept))
    return found


def answer(results: Sequence[Result]) -> str:
    """Which pair on which layout holds the highest rate, and what the baseline holds."""
    found = rates_held(results)
    best = max(found, key=lambda each: each.rank)
    if best.held is None:
        return (
            f"No policies hold a rate that was swept: nowhere do {HELD:g} % of the requests attain "
            f"both SLOs. The nearest: {_at(best, best.nearest)}, with {_percent(best.nearest)}."
        )
    variants = {(each.cell.max_batch, each.cell.pack) for each in results}
    variant = f" ({variant_text(best.held.cell)})" if len(variants) > 1 else ""
    text = (
        f"{_name(best.pair)} on {best.layout}{variant} holds the highest rate: "
        f"{best.held.cell.rate:g} requests/s, at which {_percent(best.held)} of the requests "
        f"attain both SLOs ({HELD:g} % are required)."
    )
    if best.held.cell.rate == best.swept:
        text += " No higher rate was swept, so it may hold more."
    also = [
        f"{_name(each.pair)} on {each.layout} ({_percent(each.held)})"
        for each in found
        if each is not best and each.held and each.held.cell.rate == best.held.cell.rate
    ]
    if also:
        more = f" and {len(also) - _NAMED} more" if len(also) > _NAMED else ""
        text += f" The same rate is held by {', '.join(also[:_NAMED])}{more}."
    baseline = max(
        (each for each in found if each.pair == found[0].pair), key=lambda each: each.rank
    )
    if baseline.pair == best.pair or (baseline.held and baseline.rank[0] == best.rank[0]):
        return text
    return f"{text} {_baseline_text(baseline)}"


def _baseline_text(baseline: Held) -> str:
    name = f"The baseline, {_name(baseline.pair)},"
    if baseline.held:
        at = f"{baseline.held.cell.rate:g} requests/s, on {baseline.layout}"
        return f"{name} holds at most {at}."
    nearest = baseline.nearest
    return (
        f"{name} holds no rate that was swept; it is nearest at {nearest.cell.rate:g} requests/s "
        f"on {baseline.layout}, with {_percent(nearest)}."
    )


def _of(best: Mapping[Load, Result], layout: Layout) -> list[Result]:
    return [result for (where, _), result in best.items() if where == layout]


def _at(held: Held, result: Result) -> str:
    return f"{_name(held.pair)} on {held.layout} at {result.cell.rate:g} requests/s"


def _name(pair: Pair) -> str:
    return " + ".join(pair)


def _percent(result: Result) -> str:
    return f"{result.summary['e2e_attainment']:.1f} %"
