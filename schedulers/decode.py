"""Decode policies: who steps, who is admitted, and whose KV is fetched, on a decode instance.

A waiting request is in one of three states: its KV is elsewhere (no pages), under way (pages, not
ready) or here (ready). Only the last may step; the first may be fetched, which reserves all the
pages it can ever need, so no admitted request waits for another's pages.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from schedulers.core import Batch, Instance, Policy, Seq
from schedulers.cost import CostModel


@dataclass(slots=True)
class Plan:
    """A batch in the making: what it takes so far of time and pages."""

    cost: CostModel
    instance: Instance
    work: dict[str, int] = field(default_factory=dict)
    fetch: dict[str, None] = field(default_factory=dict)
    sum_context: int = 0
    max_context: int = 0
    free: int = 0

    def __post_init__(self):
        self.free = self.instance.pages.num_free

    def step(self, seq: Seq) -> None:
        self.work[seq.request.id] = 1
        self.sum_context += seq.length
        self.max_context = max(self.max_context, seq.length)

    def try_fetch(self, seq: Seq) -> bool:
        """Whether `seq` is here, is under way, or has room and is now fetched."""
        if seq.ready or seq.pages or seq.request.id in self.fetch:
            return True
        needed = self.instance.pages_needed(seq)
        if needed > self.free:
            return False
        self.free -= needed
        self.fetch[seq.request.id] = None
        return True

    def batch(self) -> Batch:
        step_s = self.cost.decode_step_s(len(self.work), self.sum_context, self.max_context)
        return Batch(self.work, tuple(self.fetch), step_s if self.work else 0.0)


@dataclass(frozen=True, slots=True)
class Continuous:
    """Continuous batching: first come, first served, up to `cap` sequences (None: max_batch)."""

    cost: CostModel
    cap: int | None = None

    def __call__(self, instance: Instance, now: float) -> Batch:
        cap = min(self.cap or instance.limits.max_batch, instance.limits.max_batch)
        plan = Plan(self.cost, instance)
        for seq in instance.running.values():
            if len(plan.work) < cap:
                plan.step(seq)
        blocked = False  # no fetch overtakes another; those that are here need no pages any more
        for seq in sorted(instance.waiting.values(), key=_arrival):
            if not seq.ready:
                blocked = blocked or not plan.try_fetch(seq)
            elif len(plan.work) < cap:
                plan.step(seq)
        return plan.batch()


@dataclass(frozen=True, slots=True)
class Kairos:
    """Shortest context first, while the predicted step stays within `target` of the least TPOT.

    All that are admitted step. A request whose KV is under way holds its place in the prediction.
    Under lasting overload the long wait for as long as shorter ones come.
    """

    cost: CostModel
    target: float = 0.95

    def __call__(self, instance: Instance, now: float) -> Batch:
        plan = Plan(self.cost, instance)
        tpot = math.inf
        for seq in instance.running.values():
            plan.step(seq)
            tpot = min(tpot, seq.request.slo.tpot)
        count, total, longest = len(plan.work), plan.sum_context, plan.max_context
        waiting = sorted(instance.waiting.values(), key=_length)
        for seq in waiting:
            tpot = min(tpot, seq.request.slo.tpot)
            count, total, longest = count + 1, total + seq.length, max(longest, seq.length)
            step_s = instance.pace * self.cost.decode_step_s(count, total, longest)
            within = step_s <= self.target * tpot and count <= instance.limits.max_batch
            if not (within or count == 1) or not plan.try_fetch(seq):
                break
            if seq.ready:
                plan.step(seq)
        if not plan.work:
            # Nothing steps, yet the pages of a longer one may be what the shortest waits for.
            for seq in waiting:
                if seq.ready:
                    plan.step(seq)
                    break
        return plan.batch()


@dataclass(slots=True)
class Load:
    """The share of time that a set of sequences needs if each steps once a period: the step's base
    once in the least TPOT, and each sequence's own cost once in its period.
    """

    cost: CostModel
    pace: float
    tpot: float = math.inf
    rate: float = 0.0
    context_rate: float = 0.0
    max_context: int = 0

    def add(self, seq: Seq, period: float) -> None:
        context = seq.length
        self.tpot = min(self.tpot, seq.request.slo.tpot)
        self.rate += 1 / period
        self.context_rate += context / period
        self.max_context = max(self.max_context, context)

    def with_one(self, seq: Seq, period: float) -> float:
        """The load if `seq` were added."""
        cost, context = self.cost.decode, seq.length
        rate = self.rate + 1 / period
        if cost.form == "ragged":
            context_rate = self.context_rate + context / period
        else:
            context_rate = rate * max(self.max_context, context)
        own = cost.per_seq_s * rate + cost.per_context_token_s * context_rate
        return self.pace * (cost.base_s / min(self.tpot, seq.request.slo.tpot) + own)


@dataclass(slots=True)
class Outlook:
    """One set of sequences, judged. feasible: (slack, period, seq), seconds each."""

    feasible: list[tuple[float, float, Seq]] = field(default_factory=list)
    hopeless: list[Seq] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class KairosPlus:
    """Admission by load, steps by slack; hopeless requests fill what is left.

    Slack is how far a sequence is ahead of its TPOT line. A feasible one must step once in its
    period: its TPOT, stretched by the slack that it has banked. Feasible requests are fetched and
    admitted shortest first while the load stays within `target`. Each step takes the feasible of
    least slack, the longest prefix within `target` of their least TPOT. A request is hopeless if
    it missed its TTFT or can no longer make its TPOT; it counts in no minimum.

    hopeless_share, period_s: in the first part of every period the hopeless step first, the oldest
    foremost, so that each comes to its end. A share of the time and not of the batch: beside a
    large base cost even a few sequences more in every step break the balance of the load.
    hopeless_pages: share of all pages they are given, beyond one's, while feasible ones are here.
    patience_s: a request this late whose pages do not fit holds back all other fetches.
    """

    cost: CostModel
    target: float = 0.95
    hopeless_share: float = 0.01
    period_s: float = 2.0
    hopeless_pages: float = 0.25
    patience_s: float = 60.0

    def __call__(self, instance: Instance, now: float) -> Batch:
        running = instance.running.values()
        step_s = instance.pace * self.cost.decode_s([seq.length for seq in running])
        residents = self._judge(running, now, step_s, instance.mean_output)
        waiting = self._judge(instance.waiting.values(), now, step_s, instance.mean_output)
        plan = Plan(self.cost, instance)
        blocked = not self._overdue_fits(plan, now)
        admitted, crowded = self._admit(residents, waiting, plan, blocked)
        hopeless = sorted(residents.hopeless + waiting.hopeless, key=_arrival)
        if not blocked:
            share = self.hopeless_pages if residents.feasible or waiting.feasible else 1.0
            _fetch_oldest(hopeless, share, plan)
        ready = [seq for seq in hopeless if seq.ready]
        urgent = [seq for _, _, seq in sorted(residents.feasible + admitted, key=_slack)]
        if now % self.period_s < self.hopeless_share * self.period_s:
            order = ready + urgent
        else:
            if crowded and urgent:
                ready = [seq for seq in ready if seq.request.id in instance.running]
            order = urgent + sorted(ready, key=_length)
        limit_s = self.target * min((s.request.slo.tpot for s in urgent or order), default=0.0)
        _step_prefix(order, limit_s, plan)
        return plan.batch()

    def _judge(
        self, seqs: Iterable[Seq], now: float, step_s: float, mean_output: float | None
    ) -> Outlook:
        outlook = Outlook()
        for seq in seqs:
            request, first_at, count = seq.request, seq.first_token_at, len(seq.tokens)
            if first_at is None or first_at > request.deadline:
                outlook.hopeless.append(seq)
                continue
            tpot, expected = request.slo.tpot, request.max_tokens - count
            if mean_output is not None:
                # Outputs are long-tailed: one that outlived the mean is not about to end.
                expected = min(expected, max(mean_output - count, 0.5 * mean_output))
            slack = first_at + count * tpot - now
            period = tpot + (slack - tpot) / max(expected, 1)
            if period < min(step_s, self.target * tpot):
                outlook.hopeless.append(seq)
            else:
                # Not far below the TPOT: one about to end late would otherwise look like a crowd.
                outlook.feasible.append((slack, max(period, 0.3 * tpot), seq))
        return outlook

    def _overdue_fits(self, plan: Plan, now: float) -> bool:
        """False while the oldest waiting request is overdue and its pages do not fit."""
        oldest = min(plan.instance.waiting.values(), key=_arrival, default=None)
        if oldest is None or now - oldest.request.deadline <= self.patience_s:
            return True
        return plan.try_fetch(oldest)

    def _admit(
        self, residents: Outlook, waiting: Outlook, plan: Plan, blocked: bool
    ) -> tuple[list[tuple[float, float, Seq]], bool]:
        """The ready ones to admit, and whether any feasible one is left out. Fetches the others
        that the load allows, so they hold their place in it while their KV is under way.
        """
        load = Load(self.cost, plan.instance.pace)
        for _, period, seq in residents.feasible:
            load.add(seq, period)
        admitted, crowded = [], blocked
        for view in sorted(waiting.feasible, key=lambda view: view[2].length):
            _, period, seq = view
            if load.rate and load.with_one(seq, period) > self.target:
                crowded = True
            elif seq.ready or (not blocked and plan.try_fetch(seq)):
                load.add(seq, period)
                if seq.ready:
                    admitted.append(view)
            else:
                crowded = True
        return admitted, crowded


def _fetch_oldest(hopeless: list[Seq], share: float, plan: Plan) -> None:
    """Fetches in order, at least one, while they all hold at most `share` of the pages."""
    held = sum(len(seq.pages) for seq in hopeless)
    for seq in hopeless:
        if seq.ready or seq.pages:
            continue
        after = held + plan.instance.pages_needed(seq)
        if (held and after > share * plan.instance.limits.num_pages) or not plan.try_fetch(seq):
            break
        held = after


def _step_prefix(order: list[Seq], limit_s: float, plan: Plan) -> None:
    """Steps the longest prefix within `limit_s`, and the first in any case."""
    pace = plan.instance.pace
    for seq in order[: plan.instance.limits.max_batch]:
        count, total = len(plan.work) + 1, plan.sum_context + seq.length
        longest = max(plan.max_context, seq.length)
        step_s = pace * plan.cost.decode_step_s(count, total, longest)
        if plan.work and step_s > limit_s:
            break
        plan.step(seq)


def _slack(view: tuple[float, float, Seq]) -> float:
    return view[0]


def _arrival(seq: Seq) -> float:
    return seq.request.arrival


def _length(seq: Seq) -> int:
    return seq.length


POLICIES: dict[str, Callable[[CostModel], Policy]] = {
    "continuous": Continuous,
    "kairos": Kairos,
    "kairos_plus": KairosPlus,
}
