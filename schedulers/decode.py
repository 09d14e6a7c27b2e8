"""Decode policies: who steps, who is admitted, and whose KV is fetched, on a decode instance.

A waiting request is in one of three states: its KV is elsewhere (no pages), under way (pages, not
ready) or here (ready). Only the last may step; the first may be fetched, which reserves all the
pages it can ever need, so no admitted request waits for another's pages.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from schedulers.core import Batch, Instance, Policy, Seq
from schedulers.cost import CostModel


@dataclass(slots=True)
class Plan:
    """A batch in the making: what it takes so far of time and pages."""

    cost: CostModel
    instance: Instance
    work: dict[str, int] = field(default_factory=dict)
    fetch: list[str] = field(default_factory=list)
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
        if seq.ready or seq.pages:
            return True
        needed = self.instance.pages_needed(seq)
        if needed > self.free:
            return False
        self.free -= needed
        self.fetch.append(seq.request.id)
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
        for seq in sorted(instance.waiting.values(), key=_arrival):
            if not plan.try_fetch(seq):
                break
            if seq.ready and len(plan.work) < cap:
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
        tpot = float("inf")
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
    tpot: float = float("inf")
    rate: float = 0.0
    context_rate: float = 0.0
    max_context: int = 0

    def add(self, context: int, period: float, tpot: float) -> None:
        self.tpot = min(self.tpot, tpot)
        self.rate += 1 / period
        self.context_rate += context / period
        self.max_context = max(self.max_context, context)

    def with_one(self, context: int, period: float, tpot: float) -> float:
        """The load if this one were added."""
        cost = self.cost.decode
        rate = self.rate + 1 / period
        if cost.form == "ragged":
            context_rate = self.context_rate + context / period
        else:
            context_rate = rate * max(self.max_context, context)
        own = cost.per_seq_s * rate + cost.per_context_token_s * context_rate
        return self.pace * (cost.base_s / min(self.tpot, tpot) + own)


@dataclass(frozen=True, slots=True)
class KairosPlus:
    """Admission by load, steps by slack; hopeless requests fill what is left.

    Slack is how far a sequence is ahead of its TPOT line. A feasible one must step once in its
    period: its TPOT, stretched by the slack that it has banked. Feasible requests are admitted,
    cheapest first, while the load stays within `target`, and fetched ahead up to `fetch_load`.
    Each step takes the feasible of least slack, the longest prefix within `target` of their least
    TPOT. A request is hopeless if it missed its TTFT or can no longer make its TPOT; it counts in
    no minimum. The `hopeless_slots` oldest of them step always, so that each comes to its end.

    hopeless_pages: share of all pages that hopeless requests are given while others come.
    patience_s: a request this late whose pages do not fit holds back all other fetches.
    """

    cost: CostModel
    target: float = 0.95
    fetch_load: float = 1.0
    hopeless_slots: int = 4
    hopeless_pages: float = 0.25
    patience_s: float = 60.0
    order: str = "ctx"
    floor: float = 0.5
    minp: float = 0.3

    def __call__(self, instance: Instance, now: float) -> Batch:
        plan = Plan(self.cost, instance)
        load = Load(self.cost, instance.pace)
        step_s = instance.pace * self.cost.decode_s([s.length for s in instance.running.values()])
        residents, waiting, hopeless = [], [], []
        for place, feasible in ((instance.running, residents), (instance.waiting, waiting)):
            for seq in place.values():
                view = self._judge(seq, now, step_s, instance.mean_output)
                if view is None:
                    hopeless.append(seq)
                else:
                    feasible.append(view)
        for slack, period, seq in residents:
            load.add(seq.length, period, seq.request.slo.tpot)
        if self._let_overdue_in(instance, now, plan):
            admitted, crowded = self._admit(waiting, load, plan)
            self._fetch_hopeless(hopeless, crowded, plan)
        else:
            admitted, crowded = [view for view in waiting if view[2].ready], True
        self._fill(residents + admitted, hopeless, crowded, plan)
        return plan.batch()

    def _judge(self, seq: Seq, now: float, step_s: float, mean_output: float | None):
        """(slack, period, seq), or None for a hopeless one. Slack is until its next token is due."""
        request = seq.request
        tpot = request.slo.tpot
        count = len(seq.tokens)
        first_at = seq.first_token_at
        if first_at > request.deadline:
            return None
        expected = request.max_tokens - count
        if mean_output is not None:
            # Outputs are long-tailed: one that outlived the mean is not about to end.
            expected = min(expected, max(mean_output - count, self.floor * mean_output))
        slack = first_at + count * tpot - now
        period = (slack + (expected - 1) * tpot) / expected
        if period < min(step_s, self.target * tpot):
            return None
        return slack, max(period, self.minp * tpot), seq

    def _let_overdue_in(self, instance: Instance, now: float, plan: Plan) -> bool:
        """False while the oldest request is overdue and its pages do not fit."""
        oldest = min(instance.waiting.values(), key=_arrival, default=None)
        overdue = oldest is not None and now - oldest.request.deadline > self.patience_s
        return not overdue or plan.try_fetch(oldest)

    def _admit(self, waiting, load: Load, plan: Plan):
        """The ready ones to admit, and whether any had to be left out. Fetches ahead."""
        admitted, crowded = [], False
        for view in sorted(waiting, key={'ctx':lambda view: view[2].length,'slack':lambda v:v[0],'fcfs':lambda v:0,'period':lambda v:-v[1]}[self.order]):
            _, period, seq = view
            tpot = seq.request.slo.tpot
            after = load.with_one(seq.length, period, tpot) if load.rate else 0.0
            if after > self.fetch_load or not plan.try_fetch(seq):
                crowded = True
                continue
            load.add(seq.length, period, tpot)
            if after > self.target:
                crowded = True
            elif seq.ready:
                admitted.append(view)
        return admitted, crowded

    def _fetch_hopeless(self, hopeless: list[Seq], crowded: bool, plan: Plan) -> None:
        hopeless.sort(key=_arrival)
        held = sum(len(seq.pages) for seq in hopeless)
        here = sum(bool(seq.pages) for seq in hopeless)
        instance = plan.instance
        most = self.hopeless_pages * instance.limits.num_pages
        for seq in hopeless:
            if seq.pages or seq.ready:
                continue
            needed = instance.pages_needed(seq)
            if here and (held + needed > most or (crowded and here >= self.hopeless_slots)):
                break
            if not plan.try_fetch(seq):
                break
            held, here = held + needed, here + 1

    def _fill(self, feasible, hopeless: list[Seq], crowded: bool, plan: Plan) -> None:
        """Steps the longest prefix of the oldest hopeless, the feasible, the other hopeless."""
        instance = plan.instance
        ready = [seq for seq in hopeless if seq.ready]
        oldest, others = ready[: self.hopeless_slots], ready[self.hopeless_slots :]
        if crowded:
            others = [seq for seq in others if seq.request.id in instance.running]
        others.sort(key=_length)
        feasible.sort(key=lambda view: view[0])
        order = [*oldest, *(view[2] for view in feasible), *others]
        counted = [view[2] for view in feasible] or order
        limit_s = self.target * min((seq.request.slo.tpot for seq in counted), default=0.0)
        for seq in order[: instance.limits.max_batch]:
            count, total = len(plan.work) + 1, plan.sum_context + seq.length
            longest = max(plan.max_context, seq.length)
            step_s = instance.pace * self.cost.decode_step_s(count, total, longest)
            if plan.work and step_s > limit_s:
                break
            plan.step(seq)


def _arrival(seq: Seq) -> float:
    return seq.request.arrival


def _length(seq: Seq) -> int:
    return seq.length


POLICIES: dict[str, Callable[[CostModel], Policy]] = {
    "continuous": Continuous,
    "kairos": Kairos,
    "kairos_plus": KairosPlus,
}
