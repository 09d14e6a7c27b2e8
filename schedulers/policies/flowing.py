"""Roles that flow: every instance prefills and decodes, as the load needs.

The layout says where each instance begins. One that begins with decode receives: others hand over
the sequences whose prompts they have computed to it, as long as it has time and room for them; else
a sequence goes where others decode already, so that the base of a step is paid for, or stays where
its KV is. Prompts go where nothing decodes, as long as their first tokens come early there; else
also to those that decode, and to a receiving instance if its sequences leave it time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from schedulers.cost import CostModel
from schedulers.ledger.request import Request, Slo
from schedulers.policies.routing import Summary, decode_key, prefill_keys, share


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far instances are filled. receives, stays: shares of the time of an instance that
    sequences may need where others hand theirs over, and where they do not. early: the share of
    its TTFT within which a prompt has its first token where nothing decodes, or others are asked
    too. busy: the share of its time, beside the bases of a step a TPOT, that sequences take on an
    instance that gets no prompts: with them it could take in few more sequences, which would then
    pay for bases elsewhere.
    """

    receives: float = 0.88
    stays: float = 0.92
    early: float = 0.8
    busy: float = 0.25


BOUNDS = Bounds()


@dataclass(frozen=True, slots=True)
class Placement:
    """index: of the instance where a sequence goes on. why: in words."""

    index: int
    why: str


def flows(summaries: Sequence[Summary]) -> bool:
    """Whether roles flow between these instances."""
    return any(summary.receives for summary in summaries)


def route_prompt(
    request: Request,
    summaries: Sequence[Summary],
    cost: CostModel,
    now: float,
    cached: Sequence[int] = (),
    bounds: Bounds = BOUNDS,
) -> int:
    """The instance that computes a prompt, of a fleet whose roles flow. cached: as of
    `route_prefill`.
    """
    base = (1 - bounds.busy) * cost.decode.base_s / request.slo.tpot
    free = [i for i, each in enumerate(summaries) if each.load < bounds.busy + each.pace * base]
    free = free or list(range(len(summaries)))
    idle = [i for i in free if not summaries[i].load]
    busy = [i for i in free if summaries[i].load]
    within_s = request.arrival + bounds.early * request.slo.ttft - now
    keys: dict[int, tuple[bool, bool, float, float]] = {}
    for some in (idle, busy):
        found = [cached[i] for i in some] if cached else ()
        of_some = prefill_keys(request, [summaries[i] for i in some], cost, now, found)
        keys |= zip(some, of_some, strict=True)
        early = [i for i in some if not keys[i][1] and keys[i][2] <= within_s]
        if early:
            return min(early, key=lambda i: keys[i][2])
    return min(keys, key=keys.__getitem__)


def place(
    length: int,
    slo: Slo,
    late: bool,
    summaries: Sequence[Summary],
    home: int,
    cost: CostModel,
    now: float,
    bounds: Bounds = BOUNDS,
) -> Placement:
    """Where a sequence of so many tokens goes on, of a fleet whose roles flow. late: it has missed
    its TTFT. home: the index of the instance that has its KV, and whose load does not count it.
    """
    own, base = share(length, slo.tpot, cost), cost.decode.base_s / slo.tpot

    def load_with(index: int) -> float:
        each = summaries[index]
        return each.load + each.pace * (own if each.load else base + own)

    receiving = [i for i, each in enumerate(summaries) if each.receives]
    fit = [i for i in receiving if summaries[i].room >= length and load_with(i) <= bounds.receives]
    if fit and not late:
        first = max(fit, key=lambda i: summaries[i].load)
        return Placement(first, _told(summaries[first], length))
    first = min(receiving, key=lambda i: decode_key(length, slo, summaries[i], cost))
    if late:
        return Placement(first, "its first token was late")
    told = _told(summaries[first], length)
    others = [i for i, each in enumerate(summaries) if not each.receives]
    for index in sorted(others, key=lambda i: (not summaries[i].load, i != home)):
        fits = index == home or summaries[index].room >= length
        if fits and load_with(index) <= bounds.stays:
            return Placement(index, told)
    return Placement(first, f"{told}, and no other instance has more")


def _told(summary: Summary, length: int) -> str:
    """How an instance stands that receives, in words."""
    told = f"{summary.id} decodes {summary.load:.0%} of its time"
    if summary.room < length:
        told += f" and has room for {max(summary.room, 0):.0f} tokens"
    return told
