"""Decode policies: which sequences step, are fetched, or give their pages back.

A waiting request is in one of three states: its KV is elsewhere (no pages), under way (pages, not
ready) or here (ready). Only a request that is ready may step. A request gets pages for the tokens
that it has, and one more page whenever it needs it. When too few pages are left, a running request
is evicted: it waits, its pages are free when its KV has been copied out, and then it is to be
fetched again. Until then, a request that lacks a page does not step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from schedulers.cost import CostModel
from schedulers.ledger.instance import Batch, Instance
from schedulers.ledger.rows import Rows
from schedulers.policies.batches import NONE, all_running, batch_of, in_turn, under_light_load
from schedulers.policies.kairos_plus import KairosPlus
from schedulers.policies.room import Room, prefix


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
            return all_running(self.cost, instance)
        stay = room.make(lambda: -running.arrival)
        if stay.size > cap:
            stay = stay[running.arrival[stay].argsort()[:cap]]
        here = fetch = NONE
        if waiting:
            here, fetch = in_turn(instance, room)
            here = here[: cap - stay.size]
        return batch_of(self.cost, instance, stay, here, fetch, room)

    def limit_s(self, instance: Instance, batch: Batch, now: float) -> float:
        """Seconds that a step which also prefills may take: as many as it likes."""
        return math.inf


@dataclass(frozen=True, slots=True)
class Kairos:
    """Shortest context first, while the predicted step stays within `target` of the least TPOT.

    All admitted sequences step. A request whose KV is under way holds its place in the prediction.
    Under lasting overload a long sequence waits for as long as shorter ones come. The longest is
    evicted first. A TPOT that no step can keep does not count.
    """

    cost: CostModel
    target: float = 0.95

    def __call__(self, instance: Instance, now: float) -> Batch:
        running, waiting = instance.running, instance.waiting
        room = Room(instance)
        if room.free >= 0:
            if not waiting.seqs:
                return all_running(self.cost, instance)
            if batch := under_light_load(self.cost, instance, self.target, room):
                return batch
        stay = room.make(lambda: -running.length)
        if not waiting.seqs:
            return batch_of(self.cost, instance, stay, NONE, NONE, room)
        order = _shortest(waiting.length, instance.limits.max_batch)
        if order.size:
            length, tpot = running.length[stay], self._tpot(instance, running)[stay]
            count = stay.size + np.arange(1, order.size + 1)
            step_s = instance.pace * self.cost.decode_step_s(
                count,
                length.sum() + waiting.length[order].cumsum(),
                np.maximum(np.maximum.accumulate(waiting.length[order]), length.max(initial=0.0)),
            )
            least = np.minimum(
                np.minimum.accumulate(self._tpot(instance, waiting)[order]),
                tpot.min(initial=math.inf),
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
        return batch_of(self.cost, instance, stay, here, fetch, room)

    def limit_s(self, instance: Instance, batch: Batch, now: float) -> float:
        """Seconds that a step which also prefills may take: `target` of the least TPOT."""
        places = [place for place in (instance.running, instance.waiting) if place]
        return self.target * min(float(self._tpot(instance, place).min()) for place in places)

    def _tpot(self, instance: Instance, rows: Rows) -> np.ndarray:
        """The TPOTs; infinity where no step is as short, so that it delays no other sequence."""
        shortest_s = instance.pace * self.cost.decode_base_s
        return np.where(rows.tpot < shortest_s, math.inf, rows.tpot)


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

# Policies that put sequences which have missed their TTFT behind all others.
DEMOTING = frozenset({"kairos_plus"})
