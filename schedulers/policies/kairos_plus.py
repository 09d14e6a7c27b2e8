"""The decode policy that serves the feasible requests of least remaining work."""

import math
from dataclasses import dataclass

import numpy as np

from schedulers.cost import CostModel
from schedulers.ledger.instance import Batch, Instance
from schedulers.ledger.rows import Column
from schedulers.policies.batches import NONE, batch_of, under_light_load
from schedulers.policies.room import Room, prefix
from schedulers.policies.view import View

# Where sequences are handed over, one that is behind makes up for it by this token, in equal parts,
# while prompts share its steps: some outputs have six tokens.
_CATCH_UP = 6.0
# In steps without prompts, one that is behind makes up for it in so many tokens, as far as the load
# leaves time for the base of shorter steps. Its period spreads this over the tokens that are
# expected, but of outputs that are expected to be long, some have ten tokens.
_SOON = 8.0
# A step beside prompts keeps clear of the pace that a sequence needs by so many times the spread of
# as many steps as it has tokens left.
_MARGIN = 3.0


@dataclass(frozen=True, slots=True)
class KairosPlus:
    """Serves the feasible requests that cost least, while their load fits; steps by urgency; the
    hopeless fill what is left.

    A request must step once in its period, or it misses its TPOT: the TPOT, changed by its slack
    spread over the tokens still expected. A request is hopeless if it missed its TTFT, if its
    period is below `least` of its TPOT, or if its TPOT is shorter than the base of a step. Of the
    other requests, running or waiting, the policy serves those with the least remaining work
    (expected tokens times seconds a token), while the load is at most `target`. So under overload
    it gives up as few requests as possible. A step takes the served requests by period, shortest
    first, then other requests, while it takes no longer than the shortest period and than `target`
    of a TPOT. Newcomers are behind by the transfer of their KV: short steps let them catch up.

    hopeless_share, period_s: in the first part of every period the hopeless requests step first,
    oldest first, so that each of them ends. This is a share of the time and not of the batch:
    beside a large base cost even a few more sequences in every step upset the load.
    hopeless_pages: share of all pages that hopeless requests may be fetched into while feasible
    requests are here. Hopeless requests are evicted when a served request needs their pages.
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
        now = instance.begins_at(now)
        room = Room(instance)
        newcomers = self._newcomers
        if room.free >= 0 and (
            batch := under_light_load(self.cost, instance, newcomers * self.least, room)
        ):
            return batch
        view = View(self.cost, instance, now, self.least)
        served, passed = view.serve(self.target, newcomers)
        (hopeless,) = (~view.feasible).nonzero()
        stay = room.make(
            lambda: np.where(view.feasible, 0.0, -1e9)[: len(running)] - running.length
        )
        fetch = self._fetch(instance, view, served, hopeless, room) if waiting else NONE
        if waiting or stay.size < len(running) or room.evict:
            may = view.cells[Column.READY] > 0
            may[: len(running)] = False
            may[stay] = True
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
            count = max(prefix(steps_s <= self._limit_s(view, urgent)), 1)
            order, step_s = order[:count], float(steps_s[count - 1]) / view.pace
        stay, admit = order, NONE
        if waiting:
            among = order < len(running)
            stay, admit = order[among], order[~among] - len(running)
        return batch_of(self.cost, instance, stay, admit, fetch, room, step_s)

    def limit_s(self, instance: Instance, batch: Batch, now: float) -> float:
        """Seconds that a step which also prefills may take: as long as each feasible one keeps its
        line by the slack that it has, or at the pace that it needs, even if the step takes longer
        than predicted by as much as steps do (`Instance.spread`). That pace relies on the length of
        the output, as it is expected. On an instance that receives, sequences are behind when they
        come: there each makes up for that in its first tokens.
        """
        view = View(self.cost, instance, now, self.least)
        feasible = view.feasible
        if not feasible.any():
            return math.inf
        # As many steps as there are tokens left spread less than one.
        margin = 1 + _MARGIN * instance.spread / np.sqrt(np.maximum(view.left, 1.0))
        slack, pace = view.slack / (1 + instance.spread), view.period / margin
        if instance.receives:
            tpot = view.cells[Column.TPOT]
            tokens = np.maximum(_CATCH_UP - view.cells[Column.COUNT], 1.0)
            pace = tpot + (view.slack - tpot) / tokens
        return self.target * float(np.maximum(slack, pace)[feasible].min())

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
        if cells[Column.TPOT] < view.base_s:
            asked, least = 1000 * cells[Column.TPOT], 1000 * view.base_s
            return (
                f"hopeless: its TPOT is {asked:.4g} ms, and no step is shorter than {least:.1f} ms"
            )
        need = f"it needs a token every {1000 * period:.1f} ms"
        if not view.feasible[row]:
            return f"hopeless: {need} to keep its TPOT of {1000 * cells[Column.TPOT]:.1f} ms"
        served, _ = view.serve(self.target, self._newcomers)
        slack = f"slack {view.slack[row]:.3f} s, {view.left[row]:.0f} tokens expected"
        if row in served:
            return f"served: {slack}"
        return f"held off, for the load of {served.size} cheaper ones: {slack}"

    @property
    def _newcomers(self) -> float:
        """The load that newcomers may bring about. They must leave as much spare again, or the next
        and cheaper one would drive them out when they have hardly begun.
        """
        return 2 * self.target - 1

    def _limit_s(self, view: View, urgent: np.ndarray) -> float:
        """How long the step may take."""
        tpot = view.cells[Column.TPOT]
        if not urgent.size:
            # No served sequence steps: a longer step pays its base for more of the others.
            return math.inf
        tpot, period = tpot[urgent], view.period[urgent]
        limit_s = min(float(period[0]), self.target * float(tpot.min()))
        soon_s = float((tpot + (view.slack[urgent] - tpot) / _SOON).min())
        if soon_s >= limit_s:
            return limit_s
        spare = self.target - float((view.own[urgent] / period).sum())
        # The shortest step whose base the load leaves time for.
        least_s = view.base_s / spare if spare > 0 else math.inf
        return min(max(soon_s, least_s), limit_s)

    def _fetch(
        self,
        instance: Instance,
        view: View,
        served: np.ndarray,
        hopeless: np.ndarray,
        room: Room,
    ) -> np.ndarray:
        """The waiting rows to fetch: served ones first, then hopeless ones, oldest first, into
        pages that no served one needs.
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
                return fetched
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
