"""One instance that does both jobs: a prefill and a decode policy share its steps.

Decode goes first; what it may be slowed down by, its slack, sets how large a chunk of prompts fits
between two of its steps. So under overload prompts wait, rather than that all answers grow slow.
Each of the two policies sees the ledger as if its own sequences were all there is. One rule joins
them: late prefills yield to on-time decodes, and the reverse.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from schedulers.cost import CostModel
from schedulers.ledger.instance import Batch, Instance, Policy, Role
from schedulers.ledger.journal import Record
from schedulers.ledger.rows import Rows
from schedulers.policies import decode, prefill

# Of a half that has none, to look at.
_NONE: Rows = Rows()


@dataclass(frozen=True, slots=True)
class Free:
    """Pages that a half may use, as if none were shared. See `PageTable`."""

    num_free: int
    num_shared: int = 0


class Colocated:
    """A prefill and a decode policy, by name, on one instance.

    A prompt gets all its pages when it begins, and begins only while fewer than max_batch
    sequences are here.

    Where both policies know which requests are late: late prompts yield while a sequence decodes
    that can keep its TPOT, and late sequences while a prompt waits that can keep its TTFT. Either
    would take time from a request that can still be on time. A prompt that is overdue
    (`prefill.overdue`) yields no longer: it gets the time that sequences leave to prompts. In the
    first `late_share` of every `period_s` none yields, so that late ones end even in a lasting
    overload.

    On an instance that receives, sequences are behind by the transfer of their KV, and no slack
    gathers: any chunk is worth its step there.

    worth: a chunk takes at least so many times the base cost of its step, unless it is all that a
    prompt lacks; once, where the decode policy does not let slack gather until then.
    """

    def __init__(
        self,
        cost: CostModel,
        prefill_policy: str,
        decode_policy: str,
        pack: float = 0.0,
        worth: float = 6.0,
        late_share: float = 0.01,
        period_s: float = 2.0,
    ):
        self.cost = cost
        self.prefill: Policy = prefill.POLICIES[prefill_policy](cost, pack)
        self._beside = self.prefill
        if isinstance(self.prefill, prefill.KairosPlus):
            self._beside = replace(self.prefill, fill=True)
        self.decode = decode.POLICIES[decode_policy](cost)
        self.late_share, self.period_s = late_share, period_s
        knows = isinstance(self.decode, decode.KairosPlus)
        self.worth = worth if knows else 1.0
        self._demotes = knows and prefill_policy in prefill.DEMOTING

    def __call__(self, instance: Instance, now: float) -> Batch:
        now = instance.begins_at(now)
        decoding, prompts = _half(instance, Role.DECODE), _half(instance, Role.PREFILL)
        places = instance.limits.max_batch - len(instance.running) - len(decoding.waiting)
        if places <= 0:
            prompts.waiting = _NONE
        if not (prompts.waiting or prompts.running):
            return self.decode(decoding, now)
        turn = now % self.period_s < self.late_share * self.period_s
        if self._demotes and not turn:
            halves = self._in_time(decoding, prompts, now)
            batch = self._decide(instance, *halves, places, now)
            if batch.work and not batch.evict:
                return batch
        return self._decide(instance, decoding, prompts, places, now)

    def verdict(self, instance: Instance, now: float, id: str) -> str:
        """What the policy of its job thinks of a request, in words, if that one says anything."""
        seq = instance.get(id)
        if seq is None:
            return ""
        role = Role.DECODE if seq.num_tokens else Role.PREFILL
        policy = self.decode if seq.num_tokens else self.prefill
        verdict = getattr(policy, "verdict", None)
        return verdict(_half(instance, role), now, id) if verdict else ""

    def _in_time(
        self, decoding: Instance, prompts: Instance, now: float
    ) -> tuple[Instance, Instance]:
        """Each half without those of it that yield, if the other has some that are in time."""
        assert isinstance(self.decode, decode.KairosPlus)
        feasible = self.decode.feasible(decoding, now)
        live = prefill.live(self.cost, prompts, now)
        may = live | prefill.overdue(self.cost, prompts, now) if feasible.any() else None
        return (
            _only(decoding, feasible) if live.any() else decoding,
            prompts if may is None else _only(prompts, may),
        )

    def _decide(
        self, instance: Instance, decoding: Instance, prompts: Instance, places: int, now: float
    ) -> Batch:
        batch = self.decode(decoding, now)
        if batch.evict or not (prompts.waiting or prompts.running):
            return batch
        limit_s = math.inf
        if batch.work:
            limit_s = self.decode.limit_s(decoding, batch, now) / instance.pace
        shared_s = self.cost.shared_s if batch.work else 0.0
        chunk = self._chunk(prompts, limit_s - batch.predicted_s + shared_s)
        beside = instance.limits.max_batch - len(batch.work)
        if places > 0:
            beside = min(beside, places)
        if not chunk or beside <= 0:
            return batch
        taken = sum(instance.pages_needed(instance.waiting[id]) for id in batch.fetch)
        # Each running sequence may need one more page, those that stand back too.
        free = instance.pages.num_free - taken - int(np.count_nonzero(instance.running.count))
        prompts = copy.copy(prompts)
        prompts.pages = Free(max(free, 0))  # type: ignore[assignment]
        prompts.limits = replace(instance.limits, max_chunk=chunk, max_batch=beside)
        if limit_s < math.inf:
            # A prompt has only the time that decode leaves it.
            prompts.pace = instance.pace / max(1 - batch.predicted_s / limit_s, 0.1)
        more = (self._beside if batch.work else self.prefill)(prompts, now)
        predicted_s = self.cost.together_s(more.predicted_s, batch.predicted_s)
        return Batch({**batch.work, **more.work}, batch.fetch, (), predicted_s)

    def _chunk(self, prompts: Instance, spare_s: float) -> int:
        """Prompt tokens that fit into `spare_s`; none, if they are not worth the step's base."""
        limit, cost = prompts.limits.max_chunk, self.cost.prefill
        # The most that n tokens after `computed` others cost: a + b n + c n^2.
        computed = float(prompts.running.computed.max(initial=0.0))
        spare_s -= cost.base_s + cost.chunk_s(0, computed)
        if math.isinf(spare_s) or spare_s <= 0:
            return limit if spare_s > 0 else 0
        linear = cost.per_token_s + cost.per_pair_s * computed + cost.per_context_token_s
        root = math.sqrt(linear * linear + 2 * cost.per_pair_s * spare_s)
        fits = 2 * spare_s / (linear + root) if linear + root else math.inf
        count = int(min(fits, limit))
        places = [place for place in (prompts.running, prompts.waiting) if place]
        least = min(float((place.length - place.computed).min()) for place in places)
        worth = prompts.receives or count == limit or spare_s >= self.worth * cost.base_s
        return count if worth or count >= least else 0


def _half(instance: Instance, role: Role) -> Instance:
    """The ledger as the policy of one of the two jobs sees it."""
    half = copy.copy(instance)
    half.role = role
    half.waiting = _of(instance.waiting, role)
    half.running = _of(instance.running, role)
    return half


def _only(half: Instance, which: np.ndarray) -> Instance:
    """Of a half's sequences, running ones first, those that `which` [S] says."""
    some, count = copy.copy(half), len(half.running)
    some.running = _where(half.running, which[:count])
    some.waiting = _where(half.waiting, which[count:])
    # The others may need a page more each, although they do not step.
    others = count - len(some.running)
    some.pages = Free(max(half.pages.num_free - others, 0))  # type: ignore[assignment]
    return some


def _of(rows: Rows, role: Role) -> Rows:
    begun = rows.count > 0
    which = begun if role is Role.DECODE else ~begun
    return _where(rows, which)


def _where(rows: Rows, which: np.ndarray) -> Rows:
    if which.all():
        return rows
    return rows.select(which.nonzero()[0]) if which.any() else _NONE


def policy_for(
    role: Role, cost: CostModel, prefill_policy: str, decode_policy: str, pack: float = 0.0
) -> Policy:
    """The policy of an instance of this role, given the names of both."""
    if role is Role.BOTH:
        return Colocated(cost, prefill_policy, decode_policy, pack)
    if role is Role.PREFILL:
        return prefill.POLICIES[prefill_policy](cost, pack)
    return decode.POLICIES[decode_policy](cost)


def policies_of(
    records: Iterable[Record], cost: CostModel, prefill_policy: str, decode_policy: str, pack: float
) -> dict[str, Policy]:
    """The policies of all instances of a journal, by id, given the names of both."""
    return {
        record[0]: policy_for(Role(record[3]), cost, prefill_policy, decode_policy, pack)
        for record in records
        if record[1] == "instance"
    }
