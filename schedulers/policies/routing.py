"""Which instance a request goes to, by what each would make of its SLO; and whether to any.

A router may be far from the ledgers, so it decides on summaries of them. What it has sent since the
last summary came, it adds itself (`with_prompt`, `with_context`).
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from schedulers.cost import CostModel, Number
from schedulers.ledger.instance import Instance, Role
from schedulers.ledger.request import Request, Slo
from schedulers.ledger.rows import Column, Rows
from schedulers.policies.view import View

# A sequence whose next tokens would have to come faster than this share of its TPOT is lost.
_KEEPS = 0.9
# Late prompts that an instance which has time for them is given at a time.
_RECALLED = 4


@dataclass(frozen=True, slots=True)
class Summary:
    """What a router knows of one instance.

    free_at: when the step under way is over; past where there is none. deadline, ahead_s: of the
    prompts that count [Q], by deadline: when each is due, and the seconds that it and those due
    before it need. pace: see `Instance`. load: the share of its time that its sequences need to
    keep their TPOT. flows: it is one of several whose roles flow; then only sequences with a first
    token count in its load, each at the pace at which it keeps its SLO, since prompts may go on
    elsewhere. room: tokens whose KV it could still take in. end_s: seconds until, as expected, the
    first of its sequences has ended. parked_room: tokens of prompts that it should still be sent:
    without a bound, unless it has to wait until parked KV is fetched; then as many wait as may be
    parked. receives: see `Instance`. num_late: prompts that have missed their TTFT and not begun,
    where such ones stand behind all others; late: ids of the oldest of them, a few. spare: tokens
    of a late prompt that it could begin at once; 0 where a prompt waits, or sequences need its
    time.

    Times are on the clock of the one who reads it: what it says stays true while time passes, so
    that nobody has to copy it to ask again.
    """

    id: str
    role: Role
    free_at: float
    deadline: list[float]
    ahead_s: list[float]
    pace: float
    load: float
    room: float
    end_s: float = math.inf
    parked_room: float = math.inf
    flows: bool = False
    receives: bool = False
    num_late: int = 0
    late: tuple[str, ...] = ()
    spare: float = 0.0

    def work_s(self, now: float) -> float:
        """Seconds that all its prompts need."""
        left_s = self.free_at - now if self.free_at > now else 0.0
        return left_s + self.ahead_s[-1] if self.ahead_s else left_s

    def finish_s(self, deadline: float, seconds: float, now: float) -> float:
        """Seconds until a prompt of so many seconds, due then, would have its first token."""
        left_s = self.free_at - now if self.free_at > now else 0.0
        before = bisect_right(self.deadline, deadline)
        return left_s + self.ahead_s[before - 1] + seconds if before else left_s + seconds

    def with_prompt(self, deadline: float, seconds: float, now: float = -math.inf) -> "Summary":
        """The summary with a further prompt. A prompt that is late even if it is computed at once
        delays no other prompt: it counts as the last one.
        """
        if now + seconds > deadline:
            deadline = math.inf
        at = bisect_right(self.deadline, deadline)
        before = self.ahead_s[at - 1] if at else 0.0
        return replace(
            self,
            deadline=[*self.deadline[:at], deadline, *self.deadline[at:]],
            ahead_s=[
                *self.ahead_s[:at],
                before + seconds,
                *(ahead + seconds for ahead in self.ahead_s[at:]),
            ],
        )

    def is_too_slow(self, slo: Slo, cost: CostModel) -> bool:
        """Whether the base of a decode step alone takes longer here than a TPOT."""
        return slo.tpot < self.pace * cost.decode_base_s

    def added_load(self, length: int, slo: Slo, cost: CostModel, late: bool = False) -> float:
        """What a further sequence adds to the load beside others, a whole instance at most. A
        hopeless one adds nothing: see `_load`. late: it has missed its TTFT.
        """
        if late or self.is_too_slow(slo, cost):
            return 0.0
        return min(self.pace * share(length, slo.tpot, cost), 1.0)

    def with_context(self, length: int, slo: Slo, cost: CostModel, late: bool = False) -> "Summary":
        """The summary with a further sequence to decode; late: as of `added_load`."""
        added = self.added_load(length, slo, cost, late)
        if added and not self.load:  # the first one pays the base of its steps
            added = min(added + self.pace * cost.decode.base_s / slo.tpot, 1.0)
        return replace(self, load=self.load + added, room=self.room - length)


def outline(
    instance: Instance,
    cost: CostModel,
    now: float,
    demotes: bool = True,
    demotes_late: bool = True,
    flows: bool = False,
    without: Collection[str] = (),
) -> Summary:
    """Sums up a ledger.

    demotes: its prefill policy puts hopeless prompts behind all others, which they do not delay.
    demotes_late: its decode policy does so with sequences that have missed their TTFT. flows: see
    `Summary`. without: sequences that do not count in the load where roles flow.
    """
    due: list[float] = []
    ahead_s: list[float] = []
    if instance.role is not Role.DECODE and (instance.running or instance.waiting):
        deadline, seconds = _prompts(instance, cost)
        if deadline.size:
            if demotes:
                live = now + seconds <= deadline
                seconds, deadline = seconds[live], deadline[live]
            order = deadline.argsort(kind="stable")
            due, ahead_s = deadline[order].tolist(), seconds[order].cumsum().tolist()
    load = room = 0.0
    end_s = parked_room = math.inf
    num_late, late = _late(instance, now) if demotes else (0, ())
    if instance.role is not Role.DECODE:
        parked_room = _parked_room(instance)
    if instance.role is not Role.PREFILL:
        load = (
            _load_of_begun(instance, cost, now, without)
            if flows
            else _load(instance, cost, now, demotes_late)
        )
        room, end_s = _room(instance), _end_s(instance, cost)
    return Summary(
        instance.id,
        instance.role,
        instance.busy_until,
        due,
        ahead_s,
        instance.pace,
        load,
        room,
        end_s,
        parked_room,
        flows,
        instance.receives,
        num_late,
        late,
        0.0 if load else _spare(instance),
    )


def recall(summaries: Sequence[Summary], to: int) -> tuple[int, tuple[str, ...]] | None:
    """The instance that is to give late prompts back for one that has time for them, and their ids:
    the one where most wait. None: nobody is to. A few at a time, so that they need not go on again
    when it has no time any more.
    """
    if not summaries[to].spare:
        return None
    some = [index for index, summary in enumerate(summaries) if summary.late]
    if not some:
        return None
    source = max(some, key=lambda i: summaries[i].num_late)
    late = summaries[source].late
    return source, late[: (summaries[source].num_late + 1) // 2]


def fitting(requests: Iterable[Request], tokens: float) -> list[Request]:
    """Those whose prompts have at most so many tokens together; longer ones are passed over."""
    some = []
    for request in requests:
        if len(request.prompt) <= tokens:
            some.append(request)
            tokens -= len(request.prompt)
    return some


def route_prefill(
    request: Request,
    summaries: Sequence[Summary],
    cost: CostModel,
    now: float,
    cached: Sequence[int] = (),
) -> int:
    """The instance on which the first token comes soonest; if it comes too late on each, the one
    that has the least to do then. One that may park no more comes behind all others.

    cached: tokens of the prompt that each has in its prefix cache; left out, none.
    """
    keys = prefill_keys(request, summaries, cost, now, cached)
    return keys.index(min(keys))


def prefill_keys(
    request: Request,
    summaries: Sequence[Summary],
    cost: CostModel,
    now: float,
    cached: Sequence[int] = (),
) -> list[tuple[bool, bool, float, float]]:
    """What `route_prefill` orders instances by: whether one may park no more, whether the first
    token would be late, the seconds until it (where it is late, until all prompts are computed),
    and the load. cached: as of `route_prefill`.
    """
    length, deadline, found = len(request.prompt), request.deadline, cached or [0] * len(summaries)
    alone_s = {count: cost.prefill_s(length - count, count) for count in set(found)}
    keys = []
    for summary, count in zip(summaries, found, strict=True):
        own_s, stretch = summary.pace * alone_s[count], _stretch(summary)
        seconds = stretch * summary.finish_s(deadline, own_s, now)
        late = now + seconds > deadline
        if late:
            seconds = stretch * (summary.work_s(now) + own_s)
        keys.append((summary.parked_room < math.inf, late, seconds, summary.load))
    return keys


def route_decode(
    length: int, slo: Slo, summaries: Sequence[Summary], cost: CostModel, now: float
) -> int:
    """The instance with room for its KV, then one that can keep its TPOT, then the one whose
    sequences need the least of its time. Of equals, the one with the most room: instances that hold
    only hopeless sequences all have a load of 0.
    """
    keys = [decode_key(length, slo, summary, cost) for summary in summaries]
    return keys.index(min(keys))


def decode_key(
    length: int, slo: Slo, summary: Summary, cost: CostModel
) -> tuple[bool, bool, float, float]:
    """What `route_decode` orders instances by."""
    load = summary.load + summary.added_load(length, slo, cost)
    return summary.room < length, summary.is_too_slow(slo, cost), load, -summary.room


def always(request: Request, summaries: Sequence[Summary], cost: CostModel, now: float) -> float:
    """Takes every request."""
    return 0.0


def late_s(request: Request, summaries: Sequence[Summary], cost: CostModel, now: float) -> float:
    """By how many seconds its first token would be late on the instance where it comes soonest."""
    soonest_s = min(first_token_s(request, summary, cost, now) for summary in summaries)
    return max(now + soonest_s - request.deadline, 0.0)


Admission = Callable[[Request, Sequence[Summary], CostModel, float], float]
"""(request, instances that prefill, cost, now): seconds after which it might be taken; 0: now."""

ADMISSION: dict[str, Admission] = {
    "none": always,
    "predicted": late_s,
}


def is_full(num_tokens: int, summaries: Sequence[Summary]) -> bool:
    """Whether no instance that prefills may park the KV of so many tokens more."""
    return all(summary.parked_room < num_tokens for summary in summaries)


def relief_s(prefill: Sequence[Summary], decode: Sequence[Summary], now: float) -> float:
    """Seconds until, as predicted, something of what is in progress has ended: all prompts of one
    instance, and the output of one sequence.
    """
    prompts_s = min((summary.work_s(now) for summary in prefill), default=0.0)
    output_s = min((summary.end_s for summary in (*prefill, *decode)), default=math.inf)
    return max(prompts_s, output_s if output_s < math.inf else 0.0)


def prompt_s(request: Request, summary: Summary, cost: CostModel, cached: int = 0) -> float:
    """Seconds that the prompt takes on an instance which has so many tokens of it cached."""
    return summary.pace * cost.prefill_s(len(request.prompt) - cached, cached)


def first_token_s(request: Request, summary: Summary, cost: CostModel, now: float) -> float:
    """Seconds until a prompt that comes now would have its first token there."""
    own_s = prompt_s(request, summary, cost)
    return _stretch(summary) * summary.finish_s(request.deadline, own_s, now)


def share(length: Number, tpot: Number, cost: CostModel) -> Number:
    """Share of an instance's time that a sequence needs beside others, at a step a TPOT."""
    decode = cost.decode
    return (decode.decoded_s + decode.decoded_context_s * length) / tpot


def _stretch(summary: Summary) -> float:
    """By how much prompts take longer for the sequences that an instance also decodes."""
    if not summary.load or summary.role is not Role.BOTH:
        return 1.0
    return 1 / max(1.0 - summary.load, 0.05)


def _prompts(instance: Instance, cost: CostModel) -> tuple[np.ndarray, np.ndarray]:
    """Of all prompts, when each is due, and the seconds it needs after the step under way."""
    chunk = instance.limits.max_chunk
    waiting, under_way = instance.waiting, instance.under_way
    deadline, seconds = [], []
    for seq in instance.running.seqs if instance.role is Role.PREFILL else instance.unbegun():
        done = under_way.work.get(seq.request.id, 0) if under_way else 0
        if seq.remaining > done:
            rest_s = cost.prompt_s(seq.remaining - done, seq.computed + done, chunk)
            deadline.append(seq.request.deadline)
            seconds.append(instance.pace * rest_s)
    if not waiting:
        return np.array(deadline), np.array(seconds)
    prompts = waiting.count == 0
    computed = waiting.computed[prompts]
    rest_s = cost.prompt_s(waiting.length[prompts] - computed, computed, chunk)
    return (
        np.concatenate([deadline, waiting.deadline[prompts]]),
        np.concatenate([seconds, instance.pace * rest_s]),
    )


def _load(instance: Instance, cost: CostModel, now: float, demotes_late: bool) -> float:
    """See `Summary`; the prompts of a colocated instance count too. A hopeless sequence does not
    count: one that has missed its TTFT, if the policy demotes it, or whose TPOT is shorter than the
    base of a step. No other sequence counts for more than a whole instance; the one with the
    shortest TPOT pays the base.
    """
    pace, base_s = instance.pace, cost.decode.base_s
    total, shortest, its_own = 0.0, math.inf, 0.0
    for rows in (instance.running, instance.waiting):
        if not rows:
            continue
        counts = rows.tpot >= pace * cost.decode_base_s
        if demotes_late:
            counts &= _first_at(instance, rows, now) <= rows.deadline
        with np.errstate(over="ignore"):  # a TPOT may be as short as a client likes
            own = np.minimum(pace * share(rows.length, rows.tpot, cost), 1.0)
        total += float(own @ counts)
        tpot = rows.tpot if counts.all() else np.where(counts, rows.tpot, math.inf)
        row = tpot.argmin()
        if tpot[row] < shortest:
            shortest, its_own = float(tpot[row]), float(own[row])
    return total + min(pace * base_s / shortest, 1.0 - its_own)


def _load_of_begun(
    instance: Instance, cost: CostModel, now: float, without: Collection[str]
) -> float:
    """Where roles flow: see `Summary`. A sequence that cannot keep its SLO does not count."""
    if not (instance.running or instance.waiting):
        return 0.0
    view = View(cost, instance, now, _KEEPS)
    counts = view.feasible & (view.cells[Column.COUNT] > 0)
    if without:
        counts[instance.running.where(dict.fromkeys(without))] = False
    if not counts.any():
        return 0.0
    with np.errstate(over="ignore"):  # a TPOT may be as short as a client likes
        own = np.minimum(view.own[counts] / view.period[counts], 1.0)
        base = min(view.base_s / float(view.cells[Column.TPOT][counts].min()), 1.0)
    return base + float(own.sum())


def _first_at(instance: Instance, rows: Rows, now: float) -> np.ndarray:
    """When the first tokens came, or come at the earliest."""
    if instance.role is Role.DECODE:
        return rows.first_at
    return np.where(rows.count > 0, rows.first_at, now)


def _room(instance: Instance) -> float:
    """Tokens (see `Summary`); the prompts of a colocated instance count too."""
    needed = sum(
        float((rows.length * (rows.capacity == 0)).sum())
        for rows in (instance.running, instance.waiting)
        if rows
    )
    return instance.pages.num_free * instance.limits.page_size - needed


def _late(instance: Instance, now: float) -> tuple[int, tuple[str, ...]]:
    """See `Summary`."""
    rows = instance.waiting
    if not rows or instance.role is Role.DECODE:
        return 0, ()
    late = (rows.count == 0) & (rows.capacity == 0) & (rows.deadline < now)
    (which,) = late.nonzero()
    if not which.size:
        return 0, ()
    arrival = rows.arrival[which]
    if which.size > _RECALLED:
        oldest = np.argpartition(arrival, _RECALLED)[:_RECALLED]
        oldest = oldest[arrival[oldest].argsort(kind="stable")]
    else:
        oldest = arrival.argsort(kind="stable")
    return int(which.size), tuple(rows.ids_at(which[oldest]))


def _spare(instance: Instance) -> float:
    """See `Summary`; the sequences of the instance do not need its time."""
    waiting, under_way = instance.waiting, instance.under_way
    if instance.role is Role.DECODE or (waiting and not waiting.count.all()):
        return 0.0
    done = under_way.work if under_way else {}
    goes_on = any(seq.remaining > done.get(seq.request.id, 0) for seq in instance.unbegun())
    if goes_on or len(instance.running) >= instance.limits.max_batch:
        return 0.0
    return max(min(_room(instance), instance.parked_room), 0.0)


def _end_s(instance: Instance, cost: CostModel) -> float:
    """Seconds until the first of the running sequences ends, if all of them step at once."""
    running = instance.running
    begun = running.count > 0 if running else None
    if begun is None or not begun.any():
        return math.inf
    steps = (running.expected - running.count)[begun].min()
    return float(instance.pace * steps * cost.decode_of(running.length[begun]))


def _parked_room(instance: Instance) -> float:
    """See `Summary`."""
    bound, waiting = instance.limits.parked_tokens, instance.waiting
    if math.isinf(bound):
        return math.inf
    next_one = float(waiting.length.min()) if waiting else instance.limits.page_size
    if instance.parked_room >= next_one:
        return math.inf
    return bound - (float(waiting.length.sum()) if waiting else 0.0)
