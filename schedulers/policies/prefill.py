"""Prefill policies: whose prompt runs next.

A step is one chunk of one prompt, the first in the policy's order. Others join it, in order, while
all of their tokens end in that step and together cost at most `pack` times the step's base cost: 0
never packs, math.inf fills max_chunk, up to max_batch prompts. First tokens come at the step's end,
so packing delays the first prompt; but near capacity the base costs that it saves weigh more.
`KairosPlus` packs a prompt only if no prompt of the step is made late by it.

A begun prompt holds all its pages, so it can always go on; others whose pages do not fit are
passed over.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from schedulers.cost import CostModel
from schedulers.ledger.instance import Batch, Instance, Policy
from schedulers.ledger.request import Seq
from schedulers.ledger.rows import Rows

# Live prompts that Moore-Hodgson looks at, those due first: with more, which of them all to drop
# changes nothing about the next step, and a decision would take over a millisecond.
_HORIZON = 1024


# A late prompt that has waited for so many of its TTFTs is overdue, if a share of the time clears
# all late prompts of its instance within the second number of TTFTs. In a longer overload it would
# take that share from prompts that can be in time, and others would wait as long. One that takes
# longer than a part of its TTFT would make several others late.
_OVERDUE, _CLEARED, _CLEARING, _SHORT = 20.0, 80.0, 0.1, 0.25
# One that has waited for so many gives way no longer to prompts that would take the pages which it
# waits for.
_STARVED = 60.0


@dataclass(frozen=True, slots=True)
class Ordered:
    """Begun prompts first, so a prompt is never preempted; then by `key`, least first."""

    cost: CostModel
    key: Callable[[Rows[Seq]], np.ndarray]
    pack: float = math.inf

    def __call__(self, instance: Instance, now: float) -> Batch:
        waiting, begun, rows = instance.waiting, _begun(instance), []
        if waiting and (self.pack or not begun):
            keys = np.where(_fits(instance, waiting, now), self.key(waiting), math.inf)
            rows = _first(keys, instance.limits.max_batch if self.pack else 1)
        order = itertools.chain(begun, map(waiting.at, rows))
        return _step(self.cost, instance, order, self.pack, now)


def fcfs(cost: CostModel, pack: float = math.inf) -> Policy:
    """First come, first served."""
    return Ordered(cost, lambda rows: rows.arrival, pack)


def sjf(cost: CostModel, pack: float = math.inf) -> Policy:
    """Shortest prompt first, by what is not cached of it; the older of two that are as long."""
    return Ordered(cost, lambda rows: rows.length - rows.computed + 1e-9 * rows.arrival, pack)


def edf(cost: CostModel, pack: float = math.inf) -> Policy:
    """Earliest deadline first."""
    return Ordered(cost, lambda rows: rows.deadline, pack)


@dataclass(frozen=True, slots=True)
class Kairos:
    """The live prompt of least laxity; if none is live, the oldest hopeless. Not preemptive.

    Laxity is what is left until the deadline after the predicted prefill; below 0 is hopeless.
    """

    cost: CostModel
    pack: float = math.inf

    def __call__(self, instance: Instance, now: float) -> Batch:
        now = instance.begins_at(now)
        waiting, begun, rows = instance.waiting, _begun(instance), []
        if waiting and (self.pack or not begun):
            laxity = waiting.deadline - now - predicted_s(self.cost, instance, waiting)
            # Behind all of the live, by arrival.
            keys = np.where(laxity >= 0, laxity, 1e9 + waiting.arrival)
            keys = np.where(_fits(instance, waiting, now), keys, math.inf)
            rows = _first(keys, instance.limits.max_batch if self.pack else 1)
        order = itertools.chain(begun, map(waiting.at, rows))
        return _step(self.cost, instance, order, self.pack, now)

    def verdict(self, instance: Instance, now: float, id: str) -> str:
        """What the policy thinks of one prompt, in words."""
        return laxity_of(self.cost, instance, now, id)


@dataclass(frozen=True, slots=True)
class KairosPlus:
    """The largest set of prompts that can all meet their deadlines (Moore-Hodgson, on the work
    that remains), earliest deadline first, decided anew at every chunk: long prompts are preempted.

    Hopeless prompts run when nothing else can, and first in `hopeless_share` of the time, oldest
    first, so that they end however long an overload lasts. Overdue ones (see `overdue`) come first
    in a tenth of the time, so that a short overload makes none wait much longer than it lasts. The
    clock deals these shares out, the first part of every `period_s`: a policy keeps no count of
    what it gave before.

    fill: the last prompt of a step may join with a part of its tokens. Sequences that decode beside
    prompts bound the step and pay for its base: what is left of it is best used. A step of prompts
    alone would only end later.
    """

    cost: CostModel
    pack: float = math.inf
    fill: bool = False
    hopeless_share: float = 0.001
    period_s: float = 2.0

    def __call__(self, instance: Instance, now: float) -> Batch:
        now = instance.begins_at(now)
        places = _places(instance)
        if sum(len(place.seqs) for place in places) <= 1:
            return _step(self.cost, instance, [place.at(0) for place in places], self.pack, now)
        predicted = _join([predicted_s(self.cost, instance, place) for place in places])
        deadline = _join([place.deadline for place in places])
        fits = _join([_fits(instance, place, now) for place in places])
        live = (now + predicted <= deadline) & fits
        count = instance.limits.max_batch if self.pack else 1
        (alive,) = live.nonzero()
        order = feasible_first(alive, deadline[alive], predicted[alive], now)[:count]
        first, then = np.zeros_like(fits), fits & ~live
        part = now % self.period_s / self.period_s
        if part < self.hopeless_share:
            first, then = then, first
        elif part < _CLEARING:
            first = then & overdue(self.cost, instance, now)
            then &= ~first
        if len(order) < count or first.any():
            arrival = _join([place.arrival for place in places])
            before, after = (_first(np.where(s, arrival, math.inf), count) for s in (first, then))
            order = (before + order + after)[:count]
        seqs = (_at(places, row) for row in order)
        return _step(self.cost, instance, seqs, self.pack, now, True, self.fill)

    def verdict(self, instance: Instance, now: float, id: str) -> str:
        """What the policy thinks of one prompt, in words."""
        return laxity_of(self.cost, instance, now, id)


def feasible_first(
    jobs: np.ndarray, deadline: np.ndarray, seconds: np.ndarray, now: float
) -> list[int]:
    """Moore-Hodgson, for one server that is free at `now`.

    Args:
        jobs: what to return [J]; deadline, seconds: of each [J].

    Returns:
        The jobs of a largest feasible set by deadline, then the others, shortest first. Those due
        last are left out where there are very many.
    """
    if len(jobs) > _HORIZON:
        due_first = np.argpartition(deadline, _HORIZON)[:_HORIZON]
        jobs, deadline, seconds = jobs[due_first], deadline[due_first], seconds[due_first]
    order = deadline.argsort(kind="stable")
    deadline, seconds = deadline[order], seconds[order]
    if np.logical_and.reduce(now + np.add.accumulate(seconds) <= deadline):
        return jobs[order].tolist()
    kept: list[tuple[float, int]] = []  # a heap of (-seconds, index): the longest on top
    dropped: list[tuple[float, int]] = []
    end = now
    for index, (due, duration) in enumerate(zip(deadline.tolist(), seconds.tolist(), strict=True)):
        heapq.heappush(kept, (-duration, index))
        end += duration
        if end > due:
            longest = heapq.heappop(kept)
            end += longest[0]
            dropped.append((-longest[0], longest[1]))
    indices = [*sorted(index for _, index in kept), *(index for _, index in sorted(dropped))]
    return jobs[order[indices]].tolist()


def predicted_s(cost: CostModel, instance: Instance, rows: Rows[Seq]) -> np.ndarray:
    """Seconds [S] that each still needs until its prompt is computed, at the present pace."""
    computed = rows.computed
    chunk = instance.limits.max_chunk
    return instance.pace * cost.prompt_s(rows.length - computed, computed, chunk)


def live(cost: CostModel, instance: Instance, now: float) -> np.ndarray:
    """Which of all prompts [S], running ones first, may run and can still be in time."""
    places = _places(instance)
    masks = [
        (now + predicted_s(cost, instance, place) <= place.deadline) & _fits(instance, place, now)
        for place in places
    ]
    return _join(masks) if masks else np.empty(0, bool)


def overdue(cost: CostModel, instance: Instance, now: float) -> np.ndarray:
    """Which of all prompts [S], running ones first, have waited for 20 of their TTFTs, and take at
    most a quarter of one. None, where a tenth of the time would not clear all late prompts within
    80 TTFTs.
    """
    places = _places(instance)
    if not places:
        return np.empty(0, bool)
    arrival = _join([place.arrival for place in places])
    deadline = _join([place.deadline for place in places])
    ttft = deadline - arrival
    waited = arrival + _OVERDUE * ttft <= now
    if waited.any():
        predicted = _join([predicted_s(cost, instance, place) for place in places])
        waited &= predicted <= _SHORT * ttft
        waited &= float(predicted[deadline < now].sum()) <= _CLEARING * _CLEARED * ttft
    return waited


def laxity_of(cost: CostModel, instance: Instance, now: float, id: str) -> str:
    """The laxity of one prompt, and what follows from it."""
    seq = instance.get(id)
    if seq is None or seq.num_tokens:
        return ""
    chunk = instance.limits.max_chunk
    need_s = instance.pace * cost.prompt_s(seq.remaining, seq.computed, chunk)
    laxity = seq.request.deadline - now - need_s
    if laxity < 0:
        return f"hopeless: it needs {need_s:.3f} s, and would be {-laxity:.3f} s late"
    return f"live: laxity {laxity:.3f} s"


def _fits(instance: Instance, rows: Rows[Seq], now: float) -> np.ndarray:
    """Which of them [S] may run: begun, or with room for all their pages, here and parked."""
    free, parked_room = _free(instance, now)
    fits = rows.length - rows.capacity <= free * instance.limits.page_size
    if rows is not instance.running and parked_room < math.inf:
        fits &= rows.length <= parked_room
    return fits


def _free(instance: Instance, now: float) -> tuple[int, float]:
    """Pages that prompts may take, and tokens that may be parked. What the oldest needs of those
    that have waited for very long is set aside, or shorter ones would take all that is given back,
    and it would never run.
    """
    limits, free, parked_room = instance.limits, instance.pages.num_free, instance.parked_room
    if min(free * limits.page_size, parked_room) >= limits.max_context or not instance.waiting:
        return free, parked_room
    waiting = instance.waiting
    needed = np.ceil(waiting.length / limits.page_size)
    lacks = (needed > free) | (waiting.length > parked_room)
    waited = waiting.arrival + _STARVED * (waiting.deadline - waiting.arrival) <= now
    (stuck,) = (lacks & waited).nonzero()
    if stuck.size:
        oldest = stuck[waiting.arrival[stuck].argmin()]
        free = max(free - int(needed[oldest]), 0)
        parked_room = max(parked_room - float(waiting.length[oldest]), 0.0)
    return free, parked_room


def _begun(instance: Instance) -> list[Seq]:
    if not instance.running:
        return []
    return sorted(instance.running.values(), key=lambda seq: seq.begun_at or 0.0)


def _places(instance: Instance) -> list[Rows[Seq]]:
    """Where there are prompts, running ones first."""
    return [place for place in (instance.running, instance.waiting) if place.seqs]


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _at(places: list[Rows[Seq]], row: int) -> Seq:
    first = places[0]
    return first.at(row) if row < len(first) else places[1].at(row - len(first))


def _first(keys: np.ndarray, count: int) -> list[int]:
    """Where the `count` least finite keys are, least first."""
    if count == 1 and keys.size:
        best = int(keys.argmin())
        return [best] if keys[best] < math.inf else []
    if keys.size > 4 * count:
        some = np.argpartition(keys, count)[:count]
        rows = some[keys[some].argsort(kind="stable")]
    else:
        rows = keys.argsort(kind="stable")[:count]
    return rows[keys[rows] < math.inf].tolist()


def _step(
    cost: CostModel,
    instance: Instance,
    order: Iterable[Seq],
    pack: float,
    now: float,
    in_time: bool = False,
    fill: bool = False,
) -> Batch:
    """A chunk of the first in `order`, which fits, and those after it that may join. in_time: none
    joins that would itself be late, or would make another prompt late, where a prompt ends in time
    in this step without it. fill: see `KairosPlus`.
    """
    work: dict[str, int] = {}
    free, parked_room = _free(instance, now)
    room = instance.limits.max_chunk
    spare_s = math.inf
    predicted = cost.prefill.base_s
    due = math.inf  # of the prompts that this step ends in time, the first
    for seq in order:
        length, computed = seq.length, seq.computed
        needed = instance.limits.pages_for(length) - len(seq.pages)
        begun = bool(instance.running) and seq.request.id in instance.running
        if needed > free or (not begun and length > parked_room):
            continue
        remaining = length - computed
        count = min(remaining, room)
        chunk_s = cost.chunk_s(count, computed)
        ends = now + instance.pace * (predicted + chunk_s)
        if work and ((count < remaining and not fill) or chunk_s > spare_s):
            break
        if in_time and due < math.inf and ends > min(due, seq.request.deadline):
            break
        if count == remaining and ends <= seq.request.deadline:
            due = min(due, seq.request.deadline)
        spare_s = spare_s - chunk_s if work else pack * cost.prefill.base_s
        work[seq.request.id] = count
        predicted += chunk_s
        free -= needed
        parked_room -= 0 if begun else length
        room -= count
        if room <= 0 or not pack or len(work) == instance.limits.max_batch:
            break
    return Batch(work, predicted_s=predicted) if work else Batch()


POLICIES: dict[str, Callable[..., Policy]] = {
    "fcfs": fcfs,
    "sjf": sjf,
    "edf": edf,
    "kairos": Kairos,
    "kairos_plus": KairosPlus,
}

DEMOTING = frozenset({"kairos", "kairos_plus"})
"""Those that put hopeless prompts behind all others."""
