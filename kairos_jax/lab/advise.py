"""Which layout of a number of devices holds the highest rate: all colocated, or so many that begin
with prefill and so many with decode, in fixed roles or in such that flow. Each is simulated at
rates that close in on where attainment falls under the target.

The layouts are searched side by side, one simulation of each at a time, as many as there are
processes. Which rates a layout is simulated at does not depend on the others.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
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
# Between rates while the target was held at all of them, or at none: at first, and at most where
# attainments tell how far it is. The guess is not far off.
_STRIDE, _LEAP = 1.25, 1.5
# Attainments that are so near to the target, in points, lie on a line with it.
_NEAR = 20.0
# A rate beside one that is told from it: together they are within the resolution.
_BESIDE = 0.9 * RESOLUTION
# Simulations for each layout, at most: four or five are common.
_ROUNDS = 12

LOAD_S = 60.0
"""Seconds of load that tell a rate: at a rate too high, queues take a while to grow. On the Azure
conversation trace 12 s find a rate that is a third too high, 45 s one that is 6 % too high.
"""

Sizes = tuple[int, int]


def layouts(scenario: Scenario, devices: int, of_instance: Sizes = (1, 1)) -> list[Scenario]:
    """The scenario on each layout that takes all of so many devices.

    of_instance: devices of a prefill and of a decode instance. Instances that do both, and roles
    that flow, are there only where these are alike.
    """
    of_prefill, of_decode = of_instance
    split = [
        replace(scenario, colocated=0, fluid=False, num_prefill=count, num_decode=rest // of_decode)
        for count in range(1, devices // of_prefill + 1)
        if (rest := devices - count * of_prefill) > 0 and rest % of_decode == 0
    ]
    if of_prefill == of_decode and devices % of_prefill == 0:
        both = replace(
            scenario, colocated=devices // of_prefill, fluid=False, num_prefill=0, num_decode=0
        )
        # How many of them begin with decode matters little where roles flow: a third. The layouts
        # that take longest to simulate come first.
        begin = max(devices // of_prefill // 3, 1)
        fluid = [replace(each, fluid=True) for each in split if each.num_decode == begin]
        return [*fluid, both, *split]
    return split


def advise(
    scenario: Scenario,
    arrivals: Sequence[Arrival],
    devices: int,
    progress: Callable[[int, int], object] = lambda done, total: None,
    workers: int | None = None,
    load_s: float = math.inf,
    of_instance: Sizes = (1, 1),
) -> dict[str, Any]:
    """Searches each layout for its highest rate at TARGET.

    Args:
        scenario: all but the layout.
        arrivals: in which order and bursts requests come; their rate is changed.
        devices: of all instances; of_instance: see `layouts`.
        progress: called with the simulations done, and to do at most.
        workers: processes; None: one for each core.
        load_s: a layout is simulated with the first of the arrivals, as many as come in so many
            seconds at about the rate that it holds.

    Returns:
        "answer" in a sentence; "ranking", the best first: of each layout its "rate" (requests a
        second, 0 if it holds none), "num_requests" that it was simulated with, and "curve", pairs
        of rate and e2e attainment.
    """
    searches = []
    for each in layouts(scenario, devices, of_instance):
        rate = guess(each, arrivals)
        searches.append(_Search(each, math.ceil(min(load_s * rate, len(arrivals))), rate))
    arrivals = arrivals[: max(search.num_requests for search in searches)]
    progress(0, _ROUNDS * len(searches))
    with _executor(arrivals, workers) as executor:
        running: dict[Future[float], _Search] = {}

        def go_on(search: _Search) -> None:
            if not search.settled:
                asked = search.scenario, search.num_requests, search.next_rate
                running[executor.submit(_attainment, *asked)] = search

        for search in searches:
            go_on(search)
        while running:
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                search = running.pop(future)
                search.tell(future.result())
                go_on(search)
            done = sum(len(search.curve) for search in searches)
            progress(done, done + sum(each.most_left for each in searches))
    ranking = sorted(searches, key=lambda search: -search.rate)
    return {
        "answer": _answer(ranking, devices),
        "ranking": [search.result() for search in ranking],
    }


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
    if scenario.colocated or scenario.fluid:
        instances = scenario.colocated + scenario.num_prefill + scenario.num_decode
        return instances / (prefill_s + decode_s)
    return min(scenario.num_prefill / prefill_s, scenario.num_decode / decode_s)


def _batch_within(cost: CostModel, tpot: float, context: float, max_batch: int) -> int:
    """The most sequences whose step keeps `tpot` and whose KV has room; at least 1."""
    most = min(max_batch, int(cost.kv_capacity_tokens / context))
    batches = range(1, most + 1)
    within = [b for b in batches if cost.decode_step_s(b, b * context, context) <= tpot]
    return max(within, default=1)


@dataclass(slots=True)
class _Search:
    """`low` is the highest rate that held the target, below `high`, the lowest that did not. Each
    with its attainment less the target.
    """

    scenario: Scenario
    num_requests: int
    next_rate: float
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    curve: list[tuple[float, float]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The highest that held the target, 0 where none did."""
        return self.low[0] if self.low else 0.0

    @property
    def settled(self) -> bool:
        close = self.high is not None and self.high[0] - self.rate <= RESOLUTION * self.high[0]
        return close or len(self.curve) >= _ROUNDS

    @property
    def most_left(self) -> int:
        """Simulations to do, at most."""
        return 0 if self.settled else _ROUNDS - len(self.curve)

    def tell(self, attainment: float) -> None:
        """Takes what came of `next_rate`, and chooses the next."""
        rate, spare = self.next_rate, attainment - TARGET
        self.curve.append((rate, attainment))
        if spare >= 0:
            self.low = rate, spare
        else:
            self.high = rate, spare
        if self.low and self.high:
            self.next_rate = self._between(self.low, self.high)
        else:
            self.next_rate = self._beyond()

    def _between(self, low: tuple[float, float], high: tuple[float, float]) -> float:
        """Where a line through both meets the target, or the middle where that tells little. One of
        the two is left within the resolution of it, as soon as it was met.
        """
        (first, above), (last, below) = low, high
        middle = (first + last) / 2
        # Halves in the end, however the line may mislead.
        if above - below > _NEAR or len(self.curve) >= _ROUNDS // 2:
            return middle
        meets = first + (last - first) * above / (above - below)
        beside = _BESIDE * last
        if last - first <= 2 * beside:
            return middle
        return min(max(meets, first + beside), last - beside)

    def _beyond(self) -> float:
        """All rates held the target, or none did: the next, where the line through the last two
        meets it, or a stride away.
        """
        up, factor = self.high is None, _STRIDE
        rate, attainment = self.curve[-1]
        if len(self.curve) > 1:
            before, attained = self.curve[-2]
            slope = (attainment - attained) / (rate - before)
            factor = _LEAP
            if slope < 0 and (meets := rate + (TARGET - attainment) / slope) > 0:
                # A little beyond, so that both sides of it are known.
                beyond = (meets / rate if up else rate / meets) * (1 + RESOLUTION / 2)
                factor = min(max(beyond, 1 + _BESIDE), _LEAP)
        return rate * factor if up else rate / factor

    def result(self) -> dict[str, Any]:
        return {
            "layout": self.scenario.layout,
            "colocated": self.scenario.colocated,
            "num_prefill": self.scenario.num_prefill,
            "num_decode": self.scenario.num_decode,
            "fluid": self.scenario.fluid,
            "rate": self.rate,
            "num_requests": self.num_requests,
            "curve": sorted(self.curve),
        }


def _answer(ranking: Sequence[_Search], devices: int) -> str:
    best = ranking[0]
    if not best.rate:
        return f"No layout of {devices} devices holds {TARGET:g} % attainment at any rate tried."
    text = (
        f"{best.scenario.layout} holds the highest rate at {TARGET:g} % attainment: "
        f"{best.rate:.3g} requests/s"
    )
    kind = _kind(best.scenario)
    others = [search for search in ranking if _kind(search.scenario) != kind] or ranking[1:]
    if not others:
        return text + "."
    rival = others[0]
    text += f", against {rival.rate:.3g} of {rival.scenario.layout}"
    if best.rate - rival.rate <= RESOLUTION * best.rate:
        text += ", which is no difference at this resolution"
    return text + "."


def _kind(scenario: Scenario) -> tuple[bool, bool]:
    return bool(scenario.colocated), scenario.fluid


# Of this process: what `_attainment` simulates. Sent to it once, not with each simulation.
_workload: Sequence[Arrival] = ()


def _take_workload(arrivals: Sequence[Arrival]) -> None:
    global _workload
    _workload = arrivals


def _attainment(scenario: Scenario, num_requests: int, rate: float) -> float:
    return simulate(scenario, rescale(_workload[:num_requests], rate))["e2e_attainment"]


class _Here(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor`."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextlib.contextmanager
def _executor(arrivals: Sequence[Arrival], workers: int | None) -> Iterator[Executor]:
    """Processes if there is to be more than one, which know the workload."""
    if workers == 1:
        _take_workload(arrivals)
        yield _Here()
        return
    with pool(workers, _take_workload, arrivals) as executor:
        yield executor
