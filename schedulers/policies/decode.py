"""Decode policies: who steps, whose KV is fetched, and who gives its pages back.

A waiting request is in one of three states: its KV is elsewhere (no pages), under way (pages, not
ready) or here (ready). Only the last may step. A request is given pages for the tokens that it has,
and one more page whenever it needs it; where none is left, a running one is evicted: its KV is
copied out, and it waits to be fetched again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from schedulers.cost import CostModel
from schedulers.ledger.instance import Batch, Instance
from schedulers.ledger.rows import Column
from schedulers.policies.room import Room, prefix
from schedulers.policies.view import View

_NONE = np.empty(0, np.intp)
_FIRST = np.zeros(1, np.intp)


@dataclass(frozen=True, slots=True)
class Continuous:
    """Continuous batching: first come, first served, up to `cap` sequences (None: max_batch). The
    last come is evicted first.
    """

    cost: CostModel
    cap: int | None = None

    def __call__(self, instance: Instance, now: float) -> Batch:
        cap = min(self.cap or instance.limits.max_batch, instance.limits.max_batch)
        running, waiting = instance.running, instance.waiting
        room = Room(instance)
        if not waiting.seqs and room.free >= 0 and len(running.seqs) <= cap:
            return _everybody(self.cost, instance)
        stay = room.make(lambda: -running.arrival)
        if stay.size > cap:
            stay = stay[running.arrival[stay].argsort()[:cap]]
        here = fetch = _NONE
        if waiting:
            here, fetch = _in_turn(instance, room)
            here = here[: cap - stay.size]
        return _batch(self.cost, instance, stay, here, fetch, room)

    def limit_s(self, instance: Instance, batch: Batch, now: float) -> float:
        """Seconds that a step which also prefills may take: as many as it likes."""
        return math.inf


@dataclass(frozen=True, slots=True)
class Kairos:
    """Shortest context first, while the predicted step stays within `target` of the least TPOT.

    All that are admitted step. A request whose KV is under way holds its place in the prediction.
    Under lasting overload the long wait for as long as shorter ones come. The longest is evicted
    first.
    """

    cost: CostModel
    target: float = 0.95

    def __call__(self, instance: Instance, now: float) -> Batch:
        running, waiting = instance.running, instance.waiting
        room = Room(instance)
        if room.free >= 0:
            if not waiting.seqs:
                return _everybody(self.cost, instance)
            if batch := _all(self.cost, instance, self.target, room):
                return batch
        stay = room.make(lambda: -running.length)
        if not waiting.seqs:
            return _batch(self.cost, instance, stay, _NONE, _NONE, room)
        order = _shortest(waiting.length, instance.limits.max_batch)
        if order.size:
            length, tpot = running.length[stay], running.tpot[stay]
            count = stay.size + np.arange(1, order.size + 1)
            step_s = instance.pace * self.cost.decode_step_s(
                count,
                length.sum() + waiting.length[order].cumsum(),
                np.maximum(np.maximum.accumulate(waiting.length[order]), length.max(initial=0.0)),
            )
            least = np.minimum(
                np.minimum.accumulate(waiting.tpot[order]), tpot.min(initial=math.inf)
            )
            within = (step_s <= self.target * least) & (count <= instance.limits.max_batch)
            within[0] |= not stay.size  # an empty instance takes the shortest in any case
            order = order[: prefix(within)]
        # One that is under way holds up no other: it has its room already.
        fetch = room.fetch(order)
        here = order[waiting.ready[order]]
        if not stay.size and not here.size:
            # Nothing steps, yet the pages of a longer one may be what the shortest waits for.
            ready = waiting.ready.nonzero()[0]
            here = ready[waiting.length[ready].argsort(kind="stable")][:1]
        return _batch(self.cost, instance, stay, here, fetch, room)

    def limit_s(self, instance: Instance, batch: Batch, now: float) -> float:
        """Seconds that a step which also prefills may take: `target` of the least TPOT."""
        rows = [place.tpot for place in (instance.running, instance.waiting) if place]
        return self.target * float(np.concatenate(rows).min())


@dataclass(frozen=True, slots=True)
class KairosPlus:
    """Serves the feasible requests that cost least, while their load fits; steps by urgency; the
    hopeless fill what is left.

    A request must step once in its period, or it misses its TPOT: the TPOT, changed by its slack
    spread over the tokens still expected. One that missed its TTFT, or whose period is below
    `least` of its TPOT, is hopeless. Of the others, running or not, those are served whose
    remaining work is least (expected tokens times seconds a token), while the load is at most
    `target`; so under overload the fewest are given up. A step takes the served by period, shortest
    first, then whoever else, as long as it takes no longer than the shortest period, nor than
    `target` of a TPOT: newcomers, behind by the transfer of their KV, catch up in short steps.

    hopeless_share, period_s: in the first part of every period the hopeless step first, the oldest
    foremost, so that each comes to its end. A share of the time and not of the batch: beside a
    large base cost even a few sequences more in every step break the balance of the load.
    hopeless_pages: share of all pages that the hopeless may be fetched into while feasible ones are
    here; those that hold pages are evicted when a served one needs them.
    """

    cost: CostModel
    target: float = 0.96
    least: float = 0.9
    hopeless_share: float = 0.01
    period_s: float = 2.0
    hopeless_pages: float = 0.05

    def __call__(self, instance: Instance, now: float) -> Batch:
        running, waiting = instance.running, instance.waiting
        if not (running.seqs or waiting.seqs):
            return Batch()
        room = Room(instance)
        newcomers = self._newcomers
        if room.free >= 0 and (batch := _all(self.cost, instance, newcomers * self.least, room)):
            return batch
        view = View(self.cost, instance, now, self.least)
        served, passed = view.serve(self.target, newcomers)
        (hopeless,) = (~view.feasible).nonzero()
        if room.free < 0:
            room.make(lambda: np.where(view.feasible, 0.0, -1e9)[: len(running)] - running.length)
        fetch = self._fetch(instance, view, served, hopeless, room) if waiting else _NONE
        if waiting or room.evict:
            may = view.cells[Column.READY] > 0
            if room.evict:
                may[room.evict] = False
            served, passed, hopeless = (
                rows[may[rows]] if rows.size else rows for rows in (served, passed, hopeless)
            )
        urgent = served[view.period[served].argsort(kind="stable")]
        hopeless = view.by(Column.ARRIVAL, hopeless)
        turn = now % self.period_s < self.hopeless_share * self.period_s
        order = [urgent, view.by(Column.DUE, passed)]
        order = np.concatenate([hopeless, *order] if turn else [*order, hopeless])
        order = order[: instance.limits.max_batch]
        step_s = None
        if order.size:
            steps_s = view.steps_s(order)
            count = max(prefix(steps_s <= self._limit_s(view, urgent, order)), 1)
            order, step_s = order[:count], float(steps_s[count - 1]) / view.pace
        stay, admit = order, _NONE
        if waiting:
            among = order < len(running)
            stay, admit = order[among], order[~among] - len(running)
        return _batch(self.cost, instance, stay, admit, fetch, room, step_s)

    def limit_s(self, instance: Instance, batch: Batch, now: float) -> float:
        """Seconds that a step which also prefills may take: as long as each feasible one keeps its
        line by the slack that it has, or at the pace that it needs.
        """
        view = View(self.cost, instance, now, self.least)
        feasible = view.feasible
        if not feasible.any():
            return math.inf
        slack = view.cells[Column.DUE] - now
        return self.target * float(np.maximum(slack, view.period)[feasible].min())

    def feasible(self, instance: Instance, now: float) -> np.ndarray:
        """Which of all sequences [S], running ones first, can keep their SLO."""
        if not (instance.running.seqs or instance.waiting.seqs):
            return np.empty(0, bool)
        return View(self.cost, instance, now, self.least).feasible

    def verdict(self, instance: Instance, now: float, id: str) -> str:
        """What the policy thinks of one sequence, in words."""
        ids = [*instance.running, *instance.waiting]
        if id not in ids:
            return ""
        view, row = View(self.cost, instance, now, self.least), ids.index(id)
        cells, period = view.cells[:, row], float(view.period[row])
        if cells[Column.FIRST_AT] > cells[Column.DEADLINE]:
            return "hopeless: it missed its TTFT"
        need = f"it needs a token every {1000 * period:.1f} ms"
        if not view.feasible[row]:
            return f"hopeless: {need} to keep its TPOT of {1000 * cells[Column.TPOT]:.1f} ms"
        served, _ = view.serve(self.target, self._newcomers)
        slack = f"slack {cells[Column.DUE] - now:.3f} s, {view.left[row]:.0f} tokens expected"
        if row in served:
            return f"served: {slack}"
        return f"held off, for the load of {served.size} cheaper ones: {slack}"

    @property
    def _newcomers(self) -> float:
        """The load that newcomers may bring about. They must leave as much spare again, or the next
        and cheaper one would drive them out when they have hardly begun.
        """
        return 2 * self.target - 1

    def _limit_s(self, view: View, urgent: np.ndarray, order: np.ndarray) -> float:
        """How long the step may take."""
        tpot = view.cells[Column.TPOT]
        if not urgent.size:
            # Of the hopeless none may hold up the others by the TPOT that it has missed.
            return self.target * float(np.maximum.reduce(tpot[order]))
        least = float(np.minimum.reduce(tpot[urgent]))
        return min(float(view.period[urgent[0]]), self.target * least)

    def _fetch(
        self,
        instance: Instance,
        view: View,
        served: np.ndarray,
        hopeless: np.ndarray,
        room: Room,
    ) -> np.ndarray:
        """Whose KV to bring over: the served, and hopeless ones, the oldest first, into pages that
        nobody needs.
        """
        waiting, num_running = instance.waiting, len(instance.running)
        far = served[served >= num_running] - num_running
        if far.size:
            far = far[waiting.capacity[far] == 0]
        if far.size:
            fetched = room.fetch(far)
            if fetched.size < far.size:
                rest = far[fetched.size :]
                late = view.by(Column.ARRIVAL, hopeless[hopeless < num_running])
                room.evict_for(waiting.length[rest], late)
                return np.concatenate([fetched, room.fetch(rest)])
        share = self.hopeless_pages if served.size else 1.0
        held = np.add.reduce(view.cells[Column.CAPACITY][hopeless]) / instance.limits.page_size
        limit = share * instance.limits.num_pages
        if held and held >= limit:
            return far
        late = view.by(Column.ARRIVAL, hopeless[hopeless >= num_running]) - num_running
        if not late.size:
            return far
        more = room.fetch(late, held, limit)
        return np.concatenate([far, more]) if far.size else more


def _everybody(cost: CostModel, instance: Instance) -> Batch:
    """A step of all that run; nothing waits."""
    running = instance.running
    return Batch(running.ones, predicted_s=cost.decode_all(running)) if running.seqs else Batch()


def _all(cost: CostModel, instance: Instance, share: float, room: Room) -> Batch | None:
    """Everybody steps, or is fetched, if a step of all takes at most `share` of the least TPOT:
    under light load nothing is to be weighed.
    """
    running, waiting = instance.running, instance.waiting
    if len(running.seqs) + len(waiting.seqs) > instance.limits.max_batch:
        return None
    tpot = min(running.least_tpot, waiting.least_tpot)
    step_s = cost.decode_all(running, waiting)
    if instance.pace * step_s > share * tpot:
        return None
    if not waiting.seqs:
        return Batch(running.ones, predicted_s=step_s)
    here, far = _in_turn(instance, room)
    whole = here.size == len(waiting.seqs)
    return _batch(cost, instance, room.all, here, far, room, step_s if whole else None)


def _in_turn(instance: Instance, room: Room) -> tuple[np.ndarray, np.ndarray]:
    """Of the waiting, by arrival: those that are here, and those that can be fetched now."""
    waiting = instance.waiting
    if len(waiting.seqs) > 1:
        order = waiting.arrival.argsort(kind="stable")
        here = order[waiting.ready[order]]
        return here, room.fetch(order) if here.size < order.size else _NONE
    (seq,) = waiting.seqs
    if seq.ready:
        return _FIRST, _NONE
    if seq.pages or not room.take(instance.pages_needed(seq)):
        return _NONE, _NONE
    return _NONE, _FIRST


def _batch(
    cost: CostModel,
    instance: Instance,
    step: np.ndarray,
    admit: np.ndarray,
    fetch: np.ndarray,
    room: Room,
    step_s: float | None = None,
) -> Batch:
    """step_s: what the step takes, if it is known."""
    running, waiting = instance.running, instance.waiting
    fetched = tuple(waiting.ids_at(fetch)) if fetch.size else ()
    evicted = tuple(running.id_at(row) for row in room.evict)
    if not step.size + admit.size:
        return Batch({}, fetched, evicted)
    whole = step.size == len(running)
    work = running.ones if whole else running.ones_at(step)
    if admit.size:
        work = work | waiting.ones_at(admit)
    if step_s is None and whole and not admit.size:
        step_s = cost.decode_all(running)
    elif step_s is None:
        step_s = cost.decode_of(np.concatenate([running.length[step], waiting.length[admit]]))
    return Batch(work, fetched, evicted, step_s)


def _shortest(length: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` shortest are, shortest first."""
    if length.size > 4 * count:
        some = np.argpartition(length, count)[:count]
        return some[length[some].argsort(kind="stable")]
    return length.argsort(kind="stable")[:count]


POLICIES: dict[str, Callable[[CostModel], Continuous | Kairos | KairosPlus]] = {
    "continuous": Continuous,
    "kairos": Kairos,
    "kairos_plus": KairosPlus,
}
