"""Prefill policies: whose prompt runs next, on an instance that only prefills.

A step is one chunk of one prompt, the first in the policy's order. Others join it, in order, while
all of their tokens end in that step and together cost at most `pack` times the step's base cost: 0
never packs, math.inf fills max_chunk, up to max_batch prompts. All policies take the same default,
math.inf, since it is the one that does not cripple the baseline. First tokens come at the step's
end, so packing delays the first prompt; but near capacity the base costs that it saves weigh more
(one long-tailed workload, H100 roofline, base cost 5 ms, max_chunk 4096; TTFT attained without and
with packing: fcfs 58.8 and 68.5 %, kairos_plus 99.2 and 99.3; kairos is better off with 4: 94.7
without, 95.8 with 4, 93.2 with all).

A begun prompt holds all its pages, so it can always go on; others whose pages do not fit are
passed over.
"""

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from schedulers.core import Batch, Instance, Policy, Seq
from schedulers.cost import CostModel


@dataclass(frozen=True, slots=True)
class Ordered:
    """Begun prompts first, so a prompt is never preempted; then by `key`, least first."""

    cost: CostModel
    key: Callable[[Seq], float]
    pack: float = math.inf

    def __call__(self, instance: Instance, now: float) -> Batch:
        waiting = sorted(instance.waiting.values(), key=self.key)
        return _step(self.cost, instance, [*instance.running.values(), *waiting], self.pack)


def fcfs(cost: CostModel, pack: float = math.inf) -> Policy:
    """First come, first served."""
    return Ordered(cost, _arrival, pack)


def sjf(cost: CostModel, pack: float = math.inf) -> Policy:
    """Shortest prompt first."""
    return Ordered(cost, _remaining, pack)


def edf(cost: CostModel, pack: float = math.inf) -> Policy:
    """Earliest deadline first."""
    return Ordered(cost, _deadline, pack)


@dataclass(frozen=True, slots=True)
class Kairos:
    """The live prompt of least laxity; if none is live, the oldest hopeless. Not preemptive.

    Laxity is what is left until the deadline after the predicted prefill; below 0 is hopeless.
    """

    cost: CostModel
    pack: float = math.inf

    def __call__(self, instance: Instance, now: float) -> Batch:
        live: list[tuple[float, Seq]] = []
        hopeless: list[Seq] = []
        for seq in instance.waiting.values():
            laxity = seq.request.deadline - now - _predicted_s(self.cost, instance, seq)
            if laxity >= 0:
                live.append((laxity, seq))
            else:
                hopeless.append(seq)
        live.sort(key=lambda item: item[0])
        hopeless.sort(key=_arrival)
        order = [*instance.running.values(), *(seq for _, seq in live), *hopeless]
        return _step(self.cost, instance, order, self.pack)


@dataclass(frozen=True, slots=True)
class KairosPlus:
    """The largest set of prompts that can all meet their deadlines (Moore-Hodgson, on the work
    that remains), earliest deadline first, decided anew at every chunk: long prompts are preempted.

    Hopeless prompts run when nothing else can, and first in `hopeless_share` of the time, oldest
    first, so that they end however long an overload lasts. The clock deals that share out, the
    first part of every `period_s`: a policy keeps no count of what it gave before.
    """

    cost: CostModel
    pack: float = math.inf
    hopeless_share: float = 0.01
    period_s: float = 2.0

    def __call__(self, instance: Instance, now: float) -> Batch:
        live: list[tuple[float, float, Seq]] = []
        hopeless: list[Seq] = []
        for place in (instance.running, instance.waiting):
            for seq in place.values():
                predicted, deadline = _predicted_s(self.cost, instance, seq), seq.request.deadline
                if not instance.fits(seq):
                    continue
                if now + predicted <= deadline:
                    live.append((deadline, predicted, seq))
                else:
                    hopeless.append(seq)
        hopeless.sort(key=_arrival)
        order = feasible_first(live, now)
        if now % self.period_s < self.hopeless_share * self.period_s:
            order = hopeless + order
        else:
            order = order + hopeless
        return _step(self.cost, instance, order, self.pack)


def feasible_first(jobs: list[tuple[float, float, Seq]], now: float) -> list[Seq]:
    """Moore-Hodgson on (deadline, predicted seconds, seq), one server free at `now`.

    Returns the jobs of a largest feasible set by deadline, then the others, shortest first.
    """
    jobs = sorted(jobs, key=lambda job: job[0])
    kept: list[tuple[float, int]] = []  # a heap of (-predicted, index): the longest on top
    dropped: list[tuple[float, int]] = []
    end = now
    for index, (deadline, predicted, _) in enumerate(jobs):
        heapq.heappush(kept, (-predicted, index))
        end += predicted
        if end > deadline:
            longest, which = heapq.heappop(kept)
            end += longest
            dropped.append((-longest, which))
    indices = [*sorted(index for _, index in kept), *(index for _, index in sorted(dropped))]
    return [jobs[index][2] for index in indices]


def _step(cost: CostModel, instance: Instance, order: Iterable[Seq], pack: float) -> Batch:
    """A chunk of the first in `order` whose pages fit, and those after it that may join."""
    work: dict[str, int] = {}
    free = instance.pages.num_free
    room = instance.limits.max_chunk
    spare_s = math.inf
    predicted_s = cost.prefill.base_s
    for seq in order:
        needed = instance.pages_needed(seq)
        if needed > free:
            continue
        count = min(seq.remaining, room)
        chunk_s = cost.chunk_s(count, seq.computed)
        if work and (count < seq.remaining or chunk_s > spare_s):
            break
        spare_s = spare_s - chunk_s if work else pack * cost.prefill.base_s
        work[seq.request.id] = count
        predicted_s += chunk_s
        free -= needed
        room -= count
        if not room or len(work) == instance.limits.max_batch:
            break
    return Batch(work, predicted_s=predicted_s) if work else Batch()


def _predicted_s(cost: CostModel, instance: Instance, seq: Seq) -> float:
    chunk = instance.limits.max_chunk
    return instance.pace * cost.prompt_s(seq.remaining, seq.computed, chunk)


def _arrival(seq: Seq) -> float:
    return seq.request.arrival


def _remaining(seq: Seq) -> float:
    return seq.remaining


def _deadline(seq: Seq) -> float:
    return seq.request.deadline


POLICIES: dict[str, Callable[[CostModel], Policy]] = {
    "fcfs": fcfs,
    "sjf": sjf,
    "edf": edf,
    "kairos": Kairos,
    "kairos_plus": KairosPlus,
}
