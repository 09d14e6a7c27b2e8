"""Runs policies on ledgers against a virtual clock: the live server without its hardware.

The ledgers, policies and routing are those of the live workers; in the place of an engine stands a
cost model, and in the place of waiting a heap of things that are going to happen.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from schedulers.cost import CostModel
from schedulers.ledger.instance import Batch, Instance, Policy, Role, during_step, fetchable
from schedulers.ledger.request import Request, Seq
from schedulers.policies.flowing import Placement
from schedulers.simulation.attainment import Outcome


@dataclass(frozen=True, slots=True)
class Fleet:
    """The instances of a server, each with its policy: those that begin with prefill, and those
    that begin with decode. If some do both, and there are any of the latter, roles flow.
    """

    prefill: Sequence[tuple[Instance, Policy]]
    decode: Sequence[tuple[Instance, Policy]]


def stays(
    seq: Seq, instances: Sequence[Instance], home: int, now: float, unplaced: Collection[str]
) -> Placement:
    """Where a sequence goes on, wherever roles do not flow."""
    return Placement(home, "")


def nothing(instances: Sequence[Instance], to: int, now: float) -> tuple[int, Sequence[str]]:
    """What an instance takes over from another, where each prompt is computed where it was sent."""
    return to, ()


class Simulation:
    """One run of a workload.

    requests: by arrival, with `serial` 0, 1, 2, ...; outputs: tokens that each will generate [R].
    cost: what steps and transfers really take. route_prefill, route_decode: (request or sequence,
    instances, now) -> index of the instance. place: where roles flow, (sequence with its first
    token, instances, index of its own, now, ids of it and of others there that are still to be
    placed) -> where it goes on. recall: (instances that prefill, index of one where no prompt
    waits, now) -> which of the others gives it prompts, and their ids. noise: the logarithm's
    standard deviation of each step's time, whose mean stays.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        outputs: Sequence[int],
        fleet: Fleet,
        cost: CostModel,
        route_prefill: Callable[[Request, Sequence[Instance], float], int],
        route_decode: Callable[[Seq, Sequence[Instance], float], int],
        place: Callable[[Seq, Sequence[Instance], int, float, Collection[str]], Placement] = stays,
        recall: Callable[[Sequence[Instance], int, float], tuple[int, Sequence[str]]] = nothing,
        noise: float = 0.0,
        seed: int = 0,
    ):
        self.requests, self.outputs, self.fleet, self.cost = requests, outputs, fleet, cost
        self.route_prefill, self.route_decode, self.place = route_prefill, route_decode, place
        self.recall, self.noise = recall, noise
        self.outcomes: list[Outcome | None] = [None] * len(requests)
        self.now = 0.0
        self._targets = np.asarray(outputs, dtype=float)
        self._random = np.random.default_rng(seed)
        self._order = itertools.count()
        self._events: list[tuple] = []
        self._nodes = [_Node(*pair) for pair in (*fleet.prefill, *fleet.decode)]
        self._prefill = [node for node in self._nodes if node.instance.role is not Role.DECODE]
        # Where sequences may go on when they have their first tokens: without any, all stay.
        decodes = [node for node in self._nodes if node.instance.role is not Role.PREFILL]
        self._decode = decodes if fleet.decode else []
        self._home: dict[str, _Node] = {}
        self._copied_at: dict[str, float] = {}

    def run(self) -> list[Outcome]:
        """Runs until every request has ended. Outcomes in the order of the requests."""
        events, index, count = self._events, 0, len(self.requests)
        arrivals = [request.arrival for request in self.requests] + [math.inf]
        woken: dict[_Node, None] = {}
        while events or index < count:
            now = arrivals[index]
            if events and events[0][0] < now:
                now = events[0][0]
            self.now = now
            while arrivals[index] <= now:
                woken[self._arrive(self.requests[index], now)] = None
                index += 1
            while events and events[0][0] <= now:
                _, _, what, node, of = heapq.heappop(events)
                for each in what(now, node, of):
                    woken[each] = None
            if len(self._prefill) > 1:
                self._recall(woken, now)
            for node in woken:
                self._decide(node, now)
            woken.clear()
        lost = [r.id for r, o in zip(self.requests, self.outcomes, strict=True) if o is None]
        if lost:
            raise RuntimeError(f"{len(lost)} requests never ended, {lost[0]!r} the first")
        return self.outcomes  # type: ignore[return-value]

    def _push(self, at: float, what: Callable, node: "_Node", of: Batch | str) -> None:
        heapq.heappush(self._events, (at, next(self._order), what, node, of))

    def _arrive(self, request: Request, now: float) -> "_Node":
        which = 0
        if len(self._prefill) > 1:
            which = self.route_prefill(request, [node.instance for node in self._prefill], now)
        node = self._prefill[which]
        node.instance.add(request)
        return node

    def _recall(self, woken: dict["_Node", None], now: float) -> None:
        """Late prompts of one instance may go on at another that has time for them: that adds it to
        `woken`.
        """
        instances = [node.instance for node in self._prefill]
        for index, node in enumerate(self._prefill):
            waiting = node.instance.waiting
            if (node.busy and node not in woken) or (waiting and not waiting.count.all()):
                continue
            if not any(each.waiting for each in instances):
                return
            source, ids = self.recall(instances, index, now)
            for id in ids:
                seq = instances[source].give_back(id, f"{node.instance.id} has time for it")
                node.instance.add(seq.request)
                woken[node] = None

    def _decide(self, node: "_Node", now: float) -> None:
        instance = node.instance
        if node.busy and not (instance.waiting.seqs and fetchable(instance)):
            return
        batch = node.policy(instance, now)
        if node.busy:
            batch = during_step(batch)
        if not batch:
            return
        for id in batch.evict:
            out_s = self.cost.transfer_s(instance.running[id].computed)
            node.out_free = self._copied_at[id] = max(now, node.out_free) + out_s
        if node.sure > 0 and instance.waiting.seqs:
            # Newcomers may end before those that were known.
            for id in instance.waiting.ids & batch.work.keys():
                seq = instance.waiting[id]
                left = self.outputs[seq.request.serial] - seq.num_tokens
                node.sure = min(node.sure, left - 1)
        instance.begin(batch, now)
        for id in batch.evict:
            instance.copied(id)
        for id in batch.fetch:
            begun = max(now, node.link_free, self._copied_at.pop(id, now))
            seq = instance.waiting[id]
            node.link_free = begun + self.cost.transfer_s(seq.computed - seq.cached)
            self._push(node.link_free, self._fetched, node, id)
        if not batch.work:
            if batch.evict:
                self._decide(node, now)
            return
        node.busy = True
        step_s = self._step_s(instance, batch)
        if sd := self.noise:
            step_s *= math.exp(self._random.normal(-0.5 * sd * sd, sd))
        self._push(now + step_s, self._step_done, node, batch)

    def _step_s(self, instance: Instance, batch: Batch) -> float:
        rows = instance.running
        if instance.role is Role.DECODE:
            if len(batch.work) == len(rows.seqs):
                return self.cost.decode_all(rows)
            return self.cost.decode_of(rows.length[rows.where(batch.work)])
        where = rows.where(batch.work)
        counts = np.fromiter(batch.work.values(), dtype=float, count=len(batch.work))
        decodes = (counts == 1) & (rows.count[where] > 0)
        prompts = zip(counts[~decodes], rows.computed[where[~decodes]], strict=True)
        chunks = [(int(count), int(computed)) for count, computed in prompts]
        contexts = rows.length[where[decodes]]
        decode_s = self.cost.decode_of(contexts) if contexts.size else 0.0
        return self.cost.together_s(self.cost.prefill_step_s(chunks), decode_s)

    def _step_done(self, now: float, node: "_Node", batch: Batch) -> list["_Node"]:
        node.busy = False
        instance = node.instance
        stopped, stay = self._stopped(node, batch), self._first_tokens(node, batch)
        woken = [node]
        for seq in instance.end(batch, now, stopped):
            if seq.finish_reason:
                self._finished(seq, now)
                continue
            which = 0
            if len(self._decode) > 1:
                which = self.route_decode(seq, [n.instance for n in self._decode], now)
            woken.append(self._hand_over(seq, node, which, now))
        home = self._decode.index(node) if stay else 0
        unplaced = {seq.request.id: seq for seq in stay if not seq.finish_reason}
        for seq in list(unplaced.values()):
            placed = self.place(seq, [n.instance for n in self._decode], home, now, unplaced)
            del unplaced[seq.request.id]
            if placed.index == home:
                instance.stay(seq.request.id, placed.why)
            else:
                instance.hand_over(seq.request.id, placed.why)
                woken.append(self._hand_over(seq, node, placed.index, now))
        return woken

    def _first_tokens(self, node: "_Node", batch: Batch) -> list[Seq]:
        """Who gets its first token by this step and could stay, where roles flow."""
        if node.instance.role is not Role.BOTH or not self._decode:
            return []
        work = batch.work
        return [seq for seq in node.instance.unbegun() if work.get(seq.request.id) == seq.remaining]

    def _hand_over(self, seq: Seq, node: "_Node", which: int, now: float) -> "_Node":
        to = self._decode[which]
        node.instance.copied(seq.request.id)
        to.instance.add(seq.request, 1, now)
        self._home[seq.request.id] = node
        return to

    def _stopped(self, node: "_Node", batch: Batch) -> list[str]:
        """Whose outputs end with this step."""
        rows, work = node.instance.running, batch.work
        if node.instance.role is Role.PREFILL:
            return [
                id
                for id, n in work.items()
                if self.outputs[rows[id].request.serial] == 1 and rows[id].remaining == n
            ]
        node.sure -= 1
        if node.sure >= 0:
            return []
        left = self._targets[rows.serial.astype(np.intp)] - rows.count
        last = left <= 1
        # After this step, none ends for two steps less than the nearest to its end lacks now.
        later = left[~last]
        node.sure = int(np.minimum.reduce(later)) - 2 if later.size else 0
        # One of these that takes no part, or is still at its prompt, ends in another step.
        stopped = [id for id in rows.ids_at(last.nonzero()[0]) if id in work]
        if node.instance.role is Role.BOTH:
            stopped = [id for id in stopped if rows[id].remaining == work[id]]
        if len(stopped) < np.count_nonzero(last):
            node.sure = 0
        return stopped

    def _fetched(self, now: float, node: "_Node", id: str) -> list["_Node"]:
        node.instance.fetched(id)
        # In the midst of a step nothing new can be fetched by it.
        woken = [] if node.busy else [node]
        home = self._home.pop(id, None)
        if home is not None:
            home.instance.release(id)
            woken.append(home)
        return woken

    def _finished(self, seq: Seq, now: float) -> None:
        request = seq.request
        self.outcomes[request.serial] = Outcome(
            request.slo,
            request.arrival,
            seq.first_token_at,
            now,
            seq.num_tokens,
            late_s=-seq.worst_slack,
        )


@dataclass(eq=False, slots=True)
class _Node:
    """An instance in the run. sure: steps before which no sequence on it can end. link_free,
    out_free: when its links into it and out of it will have carried all that was begun.
    """

    instance: Instance
    policy: Policy
    busy: bool = False
    sure: int = 0
    link_free: float = 0.0
    out_free: float = 0.0
