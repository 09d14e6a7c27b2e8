"""Holds a sweep against the paper's four claims (Kairos, arXiv 2605.02329)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kairos_jax.lab.cells import Cell, Layout, Result

HELD = 90.0
"""Percent of all requests that must attain both objectives where a load counts as held."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A gain over FCFS and continuous batching that the paper reports, "up to" so much.

    key: of the summary, and what the baseline is tuned for where it is held against this claim.
    """

    name: str
    key: str
    paper: float
    unit: str

    def gain(self, ours: Result, baseline: Result) -> float | None:
        """In points, or in percent of the baseline's."""
        value, base = ours.summary[self.key], baseline.summary[self.key]
        if self.unit == "points":
            return value - base
        return 100 * (value / base - 1) if base else None

    def text(self, gain: float, unit: bool = False) -> str:
        """unit: says that points are points, too."""
        # Plus 0 makes of a minus 0 none.
        return f"{round(gain, 1) + 0:+.1f}" + (f" {self.unit}" if unit or self.unit == "%" else "")


CLAIMS = (
    Claim("TTFT attainment", "ttft_attainment", 23.9, "points"),
    Claim("TPOT attainment", "tpot_attainment", 27.1, "points"),
    Claim("end-to-end attainment", "e2e_attainment", 33.8, "points"),
    Claim("decode throughput", "decode_tokens_per_s", 19.3, "%"),
)


@dataclass(frozen=True, slots=True)
class Gain:
    """What one pair of policies gained over the baseline at one load."""

    claim: Claim
    ours: Result
    baseline: Result
    gain: float

    @property
    def reached(self) -> bool:
        return self.gain >= self.claim.paper

    @property
    def levels(self) -> str:
        """From what to what."""
        base, ours = (each.summary[self.claim.key] for each in (self.baseline, self.ours))
        digits = 1 if self.claim.unit == "points" else 0
        return f"{base:.{digits}f} to {ours:.{digits}f}"

    def as_json(self) -> dict[str, Any]:
        key = self.claim.key
        return {
            "claim": self.claim.name,
            "unit": self.claim.unit,
            "paper": self.claim.paper,
            "policies": " + ".join(self.ours.cell.policies),
            "gain": self.gain,
            "reached": self.reached,
            "ours": self.ours.summary[key],
            "baseline": self.baseline.summary[key],
            "rate": self.ours.cell.rate,
            "layout": str(self.ours.cell.layout),
            "baseline_max_batch": self.baseline.cell.max_batch,
            "baseline_pack": str(self.baseline.cell.pack),
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """All claims against one choice of baselines. title: which. gains: by claim, then by pair of
    policies; None where no load has both.
    """

    title: str
    pairs: Sequence[tuple[str, str]]
    gains: Sequence[tuple[Claim, Sequence[Gain | None]]]

    def as_json(self) -> dict[str, Any]:
        gains = [gain for _, row in self.gains for gain in row if gain]
        return {"title": self.title, "gains": [gain.as_json() for gain in gains]}


Load = tuple[Layout, float]


def pairs_of(results: Sequence[Result]) -> list[tuple[str, str]]:
    """The pairs of policies in their order; the first is the baseline."""
    return list(dict.fromkeys(each.cell.policies for each in results))


def tuned(results: Sequence[Result], key: str = "e2e_attainment") -> dict[Load, Result]:
    """The best of each load by `key`, among the results of one pair of policies; of equal ones the
    best end to end. So no pair is shown worse for a cap or a packing that does not suit it.
    """

    def rank(result: Result) -> tuple[float, float]:
        return result.summary[key], result.summary["e2e_attainment"]

    best: dict[Load, Result] = {}
    for each in results:
        load = each.cell.layout, each.cell.rate
        if load not in best or rank(each) > rank(best[load]):
            best[load] = each
    return best


def compare(results: Sequence[Result]) -> list[Comparison]:
    """What each pair gains over the first, for each claim.

    A layout whose roles flow and that the baseline was not run on is held against the baseline on
    the fixed one as which it begins.

    The largest gain of all loads: against the baseline at the cap and packing that are best for
    the claim at each load; and if several caps were swept, against its best at the cap of 256, or
    at the largest. Such gains may come from an overload that nobody would run; so also that at the
    highest load which the pair itself holds.
    """
    baseline, *pairs = pairs_of(results)
    all_bases = _of(results, baseline)
    caps = sorted({each.cell.max_batch for each in all_bases})
    cap = 256 if 256 in caps else caps[-1]
    ours = {pair: tuned(_of(results, pair)) for pair in pairs}
    best = (
        "the baseline at its best for each claim and load"
        if len(caps) > 1
        else f"the baseline, cap {cap}"
    )
    found = [_compare(f"Largest gain against {best}", ours, all_bases)]
    if len(caps) > 1:
        bases = [each for each in all_bases if each.cell.max_batch == cap]
        found.append(_compare(f"Largest gain against the baseline at a cap of {cap}", ours, bases))
    held = {pair: highest_held(loads) for pair, loads in ours.items()}
    title = f"Gain against {best}, where the pair still holds {HELD:g} % end to end"
    return [*found, _compare(title, held, all_bases)]


def _compare(
    title: str, ours: Mapping[tuple[str, str], Mapping[Load, Result]], bases: Sequence[Result]
) -> Comparison:
    gains = []
    for claim in CLAIMS:
        base = tuned(bases, claim.key)
        gains.append((claim, [_largest(claim, loads, base) for loads in ours.values()]))
    return Comparison(title, list(ours), gains)


def highest_held(loads: Mapping[Load, Result]) -> dict[Load, Result]:
    """Of each layout, the highest rate at which HELD is attained."""
    held: dict[Layout, Result] = {}
    for (layout, rate), result in loads.items():
        if result.summary["e2e_attainment"] >= HELD and (
            layout not in held or rate > held[layout].cell.rate
        ):
            held[layout] = result
    return {(layout, result.cell.rate): result for layout, result in held.items()}


def _largest(
    claim: Claim, ours: Mapping[Load, Result], baseline: Mapping[Load, Result]
) -> Gain | None:
    gains = [
        Gain(claim, result, base, gain)
        for (layout, rate), result in ours.items()
        if (base := baseline.get((layout, rate)) or baseline.get((layout.fixed, rate)))
        and (gain := claim.gain(result, base)) is not None
    ]
    return max(gains, key=lambda each: each.gain, default=None)


def _of(results: Sequence[Result], pair: tuple[str, str]) -> list[Result]:
    return [each for each in results if each.cell.policies == pair]


def shown_rate(results: Sequence[Result]) -> float:
    """The highest rate at which the best policy holds; without one, that of the best attainment."""
    held = [r.cell.rate for r in results if r.summary["e2e_attainment"] >= HELD]
    if held:
        return max(held)
    return max(results, key=lambda r: r.summary["e2e_attainment"]).cell.rate


def load_text(cell: Cell, several_layouts: bool) -> str:
    return f"{cell.rate:g}/s" + (f" on {cell.layout}" if several_layouts else "")


def variant_text(cell: Cell) -> str:
    """The cap, and whether prompts share steps."""
    return f"cap {cell.max_batch}, {'packed' if cell.pack else 'not packed'}"


def markdown(comparisons: Sequence[Comparison], several_layouts: bool = False) -> str:
    """The comparisons as tables; a gain that reaches the paper's is bold."""
    lines = []
    for each in comparisons:
        names = " | ".join(f"{' + '.join(pair)} | at | baseline" for pair in each.pairs)
        lines += [f"{each.title}:", "", f"| claim | paper, up to | {names} |"]
        lines += ["|---|---|" + "---|---|---|" * len(each.pairs)]
        for claim, gains in each.gains:
            cells = [cell for gain in gains for cell in _markdown_cells(gain, several_layouts)]
            paper = claim.text(claim.paper, unit=True)
            lines.append(f"| {claim.name} | {paper} | {' | '.join(cells)} |")
        lines += ["", verdict(each), ""]
    return "\n".join(lines)


def verdict(comparison: Comparison) -> str:
    """Which claims do not hold for which pair, in a sentence."""
    missed = []
    for claim, gains in comparison.gains:
        pairs = zip(comparison.pairs, gains, strict=True)
        names = [" + ".join(pair) for pair, gain in pairs if not (gain and gain.reached)]
        if names:
            missed.append(f"{claim.name} ({', '.join(names)})")
    if not missed:
        return "Every gain reaches the paper's figure."
    return f"Below the paper's figure: {', '.join(missed)}."


def _markdown_cells(gain: Gain | None, several_layouts: bool) -> list[str]:
    if gain is None:
        return ["-", "-", "-"]
    text = gain.claim.text(gain.gain)
    text = f"**{text}**" if gain.reached else text
    load = load_text(gain.ours.cell, several_layouts)
    return [f"{text} ({gain.levels})", load, variant_text(gain.baseline.cell)]
