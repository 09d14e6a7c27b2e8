"""Which layout of a number of devices holds the highest rate: all colocated, or so many for prefill
and so many for decode. Each is simulated at rates that close in on where attainment falls under the
target.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kairos_jax.lab.pool import pool
from schedulers.cost import CostModel
from schedulers.simulation.scenario import Scenario, simulate
from schedulers.simulation.workload import Arrival, rescale

TARGET = 90.0
"""Percent of all requests that must attain both objectives."""
# A layout's rate is known to this share of it. Closer would be finer than a short trace can tell.
RESOLUTION = 0.02
# Between rates while the target was held at all of them, or at none. The guess is not far off.
_STRIDE = 1.25
# Simulations for each layout, at most: two or three strides and five halvings of one are common.
_ROUNDS = 12

# Seconds of load that tell a rate: at a rate too high, queues take a while to grow. On the Azure
# conversation trace 12 s find a rate that is a third too high, 45 s one that is 6 % too high.
_LOAD_S = 60.0

Map = Callable[..., Iterator[float]]


def layouts(scenario: Scenario, devices: int) -> list[Scenario]:
    """The scenario on each layout of so many devices, one an instance."""
    split = [
        replace(scenario, colocated=0, num_prefill=count, num_decode=devices - count)
        for count in range(1, devices)
    ]
    return [replace(scenario, colocated=devices, num_prefill=0, num_decode=0), *split]


def advise(
    scenario: Scenario,
    arrivals: Sequence[Arrival],
    devices: int,
    progress: Callable[[int, int], object] = lambda done, total: None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Searches each layout for its highest rate at TARGET.

    Args:
        scenario: all but the layout.
        arrivals: in which order and bursts requests come; their rate is changed.
        devices: one an instance.
        progress: called with the simulations done, and to do.
        workers: processes; None: one for each core.

    Returns:
        "answer" in a sentence; "ranking", the best first: of each layout its "rate" (requests a
        second, 0 if it holds none) and "curve", pairs of rate and e2e attainment.
    """
    searches = [_Search(each, guess(each, arrivals)) for each in layouts(scenario, devices)]
    total = _ROUNDS * len(searches)
    progress(0, total)
    with _mapping(workers) as map_each:
        for done in range(0, total, len(searches)):
            open_ = [search for search in searches if not search.settled]
            rates = [search.next_rate for search in open_]
            attained = map_each(
                functools.partial(_attainment, arrivals), [s.scenario for s in open_], rates
            )
            for count, (search, percent) in enumerate(zip(open_, attained, strict=True), 1):
                search.tell(percent)
                progress(done + count, total)
    progress(total, total)
    ranking = sorted(searches, key=lambda search: -search.low)
    return {
        "answer": _answer(ranking, devices),
        "ranking": [search.result() for search in ranking],
    }


def enough(scenario: Scenario, arrivals: Sequence[Arrival], devices: int) -> int:
    """How many of the requests to simulate, where the whole trace would take long."""
    rates = [guess(each, arrivals) for each in layouts(scenario, devices)]
    return math.ceil(_LOAD_S * max(rates))


def guess(scenario: Scenario, arrivals: Sequence[Arrival]) -> float:
    """About how many requests a second the layout finishes, from their mean lengths alone."""
    cost, count = scenario.cost, len(arrivals)
    prompt = sum(arrival.num_prompt for arrival in arrivals) / count
    output = sum(arrival.num_output for arrival in arrivals) / count
    context = prompt + output / 2
    tpot = max(each.slo.tpot for each in scenario.classes)
    batch = _batch_within(cost, tpot, context, scenario.max_batch)
    prefill_s = cost.prompt_s(round(prompt), 0, scenario.chunk)
    decode_s = output * cost.decode_step_s(batch, batch * context, context) / batch
    if scenario.colocated:
        return scenario.colocated / (prefill_s + decode_s)
    return min(scenario.num_prefill / prefill_s, scenario.num_decode / decode_s)


def _batch_within(cost: CostModel, tpot: float, context: float, max_batch: int) -> int:
    """The most sequences whose step keeps `tpot` and whose KV has room; at least 1."""
    most = min(max_batch, int(cost.kv_capacity_tokens / context))
    batches = range(1, most + 1)
    within = [b for b in batches if cost.decode_step_s(b, b * context, context) <= tpot]
    return max(within, default=1)


@dataclass(slots=True)
class _Search:
    """Bisection: `low` is the highest rate that held the target, below `high`, the lowest that did
    not.
    """

    scenario: Scenario
    next_rate: float
    low: float = 0.0
    high: float | None = None
    curve: list[tuple[float, float]] = field(default_factory=list)

    @property
    def settled(self) -> bool:
        return self.high is not None and self.high - self.low <= RESOLUTION * self.high

    def tell(self, attainment: float) -> None:
        rate = self.next_rate
        self.curve.append((rate, attainment))
        if attainment >= TARGET:
            self.low = rate
        else:
            self.high = rate
        if self.high is None:
            self.next_rate = _STRIDE * self.low
        else:
            self.next_rate = (self.low + self.high) / 2 if self.low else self.high / _STRIDE

    def result(self) -> dict[str, Any]:
        return {
            "layout": self.scenario.layout,
            "colocated": self.scenario.colocated,
            "num_prefill": self.scenario.num_prefill,
            "num_decode": self.scenario.num_decode,
            "rate": self.low,
            "curve": sorted(self.curve),
        }


def _answer(ranking: Sequence[_Search], devices: int) -> str:
    best = ranking[0]
    colocated = bool(best.scenario.colocated)
    if not best.low:
        return f"No layout of {devices} devices holds {TARGET:g} % attainment at any rate tried."
    text = (
        f"{best.scenario.layout} holds the highest rate at {TARGET:g} % attainment: "
        f"{best.low:.3g} requests/s"
    )
    rival = next(s for s in ranking if bool(s.scenario.colocated) != colocated)
    text += f", against {rival.low:.3g} of {rival.scenario.layout}"
    if best.low - rival.low <= RESOLUTION * best.low:
        text += ", which is no difference at this resolution"
    return text + "."


def _attainment(arrivals: Sequence[Arrival], scenario: Scenario, rate: float) -> float:
    return simulate(scenario, rescale(arrivals, rate))["e2e_attainment"]


@contextlib.contextmanager
def _mapping(workers: int | None) -> Iterator[Map]:
    """What maps like `map`, in processes if there is to be more than one."""
    if workers == 1:
        yield map
        return
    with pool(workers) as executor:
        yield executor.map
