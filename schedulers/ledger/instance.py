"""The ledger of one instance, and the decisions that change it.

The live workers and the simulator drive these same objects. Times are seconds on one monotonic
clock that the caller reads; nothing here reads a clock.
"""

import enum
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from schedulers.ledger.outputs import Outputs
from schedulers.ledger.pool import Pool
from schedulers.ledger.request import Request, Seq
from schedulers.ledger.rows import Column, Rows

# Least weight of a new value in the running average below. With a fifth a step, prediction noise
# of 20 % let too many sequences in whenever the average dipped: 50 % attained instead of 72.
_NEWEST = 0.02
# Steps that the profile counts for before any was measured.
_PRIOR_STEPS = 10
# A single stalled step (a compilation, a page fault storm) must not turn every prediction.
_PACE_RANGE = (0.25, 8.0)


class Role(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one instance can hold. max_batch: sequences a step; max_chunk: prompt tokens a step;
    max_context: tokens of a sequence; pages of `page_size` tokens. parked_tokens: tokens whose KV
    may wait, copied out of the pool, for the decode side.
    """

    max_batch: int
    max_chunk: int
    max_context: int
    page_size: int
    num_pages: int
    parked_tokens: float = math.inf

    def __post_init__(self):
        for name in ("max_batch", "max_chunk", "max_context", "page_size", "num_pages"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"limits.{name} must be at least 1, got {value}")
        if self.num_pages < self.pages_for(self.max_context):
            raise ValueError(
                f"limits.num_pages must hold max_context = {self.max_context} tokens: at least "
                f"{self.pages_for(self.max_context)}, got {self.num_pages}"
            )
        if self.parked_tokens < self.max_context:
            raise ValueError(
                f"limits.parked_tokens must be at least max_context = {self.max_context}, "
                f"got {self.parked_tokens}"
            )

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV all pages hold."""
        return self.num_pages * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)


_NO_WORK: Mapping[str, int] = {}


class Batch(NamedTuple):
    """A decision. work: tokens to compute, by request id (more than one: prefill or a chunk of it).
    fetch: requests to bring the KV of here, into pages that are reserved now. evict: running
    requests whose KV is copied out, and whose pages are taken back, before anything else; they wait
    to be fetched again. predicted_s: the cost model's own figure for `work`, before the instance's
    pace; `Instance.end` holds it against the clock.
    """

    work: Mapping[str, int] = _NO_WORK
    fetch: tuple[str, ...] = ()
    evict: tuple[str, ...] = ()
    predicted_s: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.work or self.fetch or self.evict)


class Instance:
    """The ledger of one instance: what waits, runs and is parked, and which pages each sequence
    holds.

    waiting: no step yet, evicted, or (on a decode instance) not yet in a batch. running: begun.
    parked: prefilled, KV held for the decode side. Only the verbs below change it. A `journal`, if
    there is one, is told of each verb: `schedulers.ledger.journal` replays them.

    pace: recent measured / predicted step time, so that a prediction is anchored on what steps
    cost at present. outputs: how long recently finished outputs were. receives: where roles flow,
    whether it begins with decode: others hand their sequences over to it first.
    """

    def __init__(
        self,
        id: str,
        role: Role,
        limits: Limits,
        learn_outputs: bool = True,
        receives: bool = False,
    ):
        self.id = id
        self.role, self.receives = role, receives
        self.limits = limits
        self.pool = Pool(limits.num_pages, limits.page_size)
        self.pages = self.pool.table
        self.waiting: Rows[Seq] = Rows()
        self.running: Rows[Seq] = Rows()
        self.parked: Rows[Seq] = Rows()
        self.parked_tokens = 0
        self.pace = 1.0
        self.outputs = Outputs(learn_outputs)
        self.busy_until = -math.inf
        self.journal: Callable[..., None] | None = None
        self._num_paced = _PRIOR_STEPS
        self._begun: tuple[float, int, Batch] | None = None

    # What the policies ask.

    @property
    def under_way(self) -> Batch | None:
        """The batch of the step under way."""
        return self._begun[2] if self._begun else None

    def get(self, id: str) -> Seq | None:
        return self.waiting.get(id) or self.running.get(id) or self.parked.get(id)

    def pages_needed(self, seq: Seq) -> int:
        """Pages that `seq` must be given before it may begin: for all its tokens so far. Cached
        ones count, as if they were taken anew: so that is the most that it can take.
        """
        return self.pool.needed(seq)

    def unbegun(self) -> list[Seq]:
        """The running sequences that have no output token yet."""
        (rows,) = (self.running.count == 0).nonzero()
        return [self.running.at(row) for row in rows.tolist()]

    @property
    def parked_room(self) -> float:
        """Tokens whose KV may still be parked, those of running prompts set aside."""
        if math.isinf(self.limits.parked_tokens):
            return math.inf
        prompts = self.running.num_tokens
        if self.role is Role.BOTH:
            prompts = float(self.running.length[self.running.count == 0].sum())
        return self.limits.parked_tokens - self.parked_tokens - prompts

    # The verbs.

    def add(
        self,
        request: Request,
        num_tokens: int = 0,
        first_token_at: float | None = None,
        tokens: Sequence[int] = (),
    ) -> Seq:
        """Takes in a request. With `num_tokens`, one whose first tokens were made elsewhere, and
        whose KV is there to be fetched; `tokens` are their ids, where they matter.
        """
        if self.get(request.id):
            raise ValueError(f"request id {request.id!r} is in use on instance {self.id!r}")
        computed = len(request.prompt) + num_tokens - 1 if num_tokens else 0
        seq = Seq(
            request,
            computed=computed,
            num_tokens=num_tokens,
            first_token_at=first_token_at,
            tokens=tokens,
        )
        if num_tokens:
            seq.cells[Column.READY] = 0.0
            self._expect(seq)
        self.waiting.add(request.id, seq)
        if not num_tokens:
            self.pool.watch(seq)
        if self.journal:
            self.journal("add", request, num_tokens, first_token_at)
        return seq

    def begin(self, batch: Batch, now: float) -> None:
        """Takes back and reserves the pages that the decision says, and moves its work to running.

        `now` is when the policy was asked.
        """
        if self.journal:
            self.journal("begin", now, batch)
        for id in batch.evict:
            seq = self.running.move(id, self.waiting)
            assert seq.num_tokens, f"request {id!r} was evicted in the midst of its prefill"
            self.pool.take_back(seq)
            seq.cells[Column.READY] = 0.0
        joining: Sequence[str] = ()
        if self.waiting.seqs and batch.work:
            some = self.waiting.ids & batch.work.keys()
            # In the order of the work, not of a set: rows are the same in every process.
            joining = [id for id in batch.work if id in some] if len(some) > 1 else list(some)
        # Before any page is given out, which could evict what is cached of them.
        for id in (*joining, *batch.fetch):
            self.pool.share(self.waiting[id])
        for id in batch.fetch:
            self.pool.give(self.waiting[id])
        if not batch.work:
            return
        for id in joining:
            self._admit(id, now)
        if self.role is not Role.PREFILL:
            self.pool.grow(self.running)
        self._begun = now, self.running.num_removed, batch
        self.busy_until = now + self.pace * batch.predicted_s

    def fetched(self, id: str) -> Seq:
        """The KV of `id`, which waits, has been written to its pages: from now on it may step, and
        others may share those that are full of its prompt.
        """
        seq = self.waiting[id]
        seq.cells[Column.READY] = 1.0
        self.pool.cache(seq, seq.computed - seq.cached)
        if self.journal:
            self.journal("fetched", id)
        return seq

    def end(self, batch: Batch, now: float, stopped: Collection[str] = ()) -> list[Seq]:
        """Books a step that ran: one more output token for each sequence that is now computed to
        its end. `stopped`: those of them whose output this token ends. Ids that were cancelled
        during the step are passed over.

        Returns the sequences that have left `running`: finished (with a finish_reason), or parked.
        """
        if self.journal:
            self.journal("end", now, batch, tuple(stopped))
        begun, self._begun = self._begun, None
        self.busy_until = -math.inf
        if begun is None:
            raise ValueError(f"instance {self.id!r}: a step has ended that was not begun")
        self._anchor(batch.predicted_s, now - begun[0])
        rows, work = self.running, batch.work
        ended = dict.fromkeys(stopped, "stop")
        begun_prompts = [] if self.role is Role.DECODE else self._prompts(work)
        if self.role is not Role.PREFILL:
            same = len(work) == len(rows.seqs) and rows.num_removed == begun[1]
            whole = same and not begun_prompts
            where = rows.where(work) if not whole else None
            if where is not None and begun_prompts:
                where = where[rows.count[where] > 0]
            ended = self._count(where, now) | ended
        left = []
        for seq in begun_prompts:
            count = work[seq.request.id]
            ended_prompt = seq.advance(count, now)
            self.pool.cache(seq, count)
            if not ended_prompt:
                continue
            rows.num_tokens += 1
            if seq.request.max_tokens == 1 and seq.request.id not in ended:
                ended[seq.request.id] = "length"
            elif self.role is Role.PREFILL and seq.request.id not in ended:
                left.append(self._park(seq.request.id))
            else:
                self._expect(seq)
        for id, why in ended.items():
            if id in rows:
                left.append(self._finish(id, why))
        return left

    def stay(self, id: str, why: str) -> None:
        """`id`, which could go on elsewhere, goes on here. why: in words, for those who ask."""
        if self.journal:
            self.journal("stay", id, why)

    def hand_over(self, id: str, why: str) -> Seq:
        """`id`, which runs here and has its first token, is to go on elsewhere: parks it. Not while
        a step of it is under way. why: as of `stay`.
        """
        if self.journal:
            self.journal("hand_over", id, why)
        if not self.running[id].num_tokens:
            raise ValueError(f"request {id!r} is to be handed over in the midst of its prompt")
        return self._park(id)

    def copied(self, id: str) -> None:
        """The KV of `id`, which is parked, has been copied out of the pool: frees its pages."""
        if self.journal:
            self.journal("copied", id)
        self.pool.take_back(self.parked[id])

    def release(self, id: str) -> None:
        """The decode side has the KV of `id`: forgets it. Unknown ids are passed over, since a
        cancel may have come first.
        """
        if self.journal:
            self.journal("release", id)
        if id in self.parked:
            self._drop(self.parked, id)

    def cancel(self, id: str) -> bool:
        """Forgets `id` wherever it is and frees its pages. False if it is not here."""
        if self.journal:
            self.journal("cancel", id)
        for place in (self.waiting, self.running, self.parked):
            if id in place:
                self._drop(place, id)
                return True
        return False

    def check(self) -> None:
        """Raises AssertionError if a page is leaked or shared, or an id stands twice."""
        places = (self.waiting, self.running, self.parked)
        ids = [id for place in places for id in place]
        assert len(ids) == len(set(ids)), "a request stands in two places"
        for place in places:
            place.check()
        assert self.parked_tokens == sum(seq.computed for seq in self.parked.values())
        self.pool.check(*(place.seqs for place in places))

    # How they do it.

    def _admit(self, id: str, now: float) -> None:
        seq = self.waiting[id]
        assert seq.ready, f"request {id!r} was scheduled before its KV arrived"
        self.pool.give(seq)
        if seq.begun_at is None:
            seq.begun_at = now
        self.waiting.move(id, self.running)

    def _anchor(self, predicted_s: float, took_s: float) -> None:
        if predicted_s <= 0:
            return
        low, high = _PACE_RANGE
        ratio = min(max(took_s / predicted_s, low), high)
        self._num_paced += 1
        self.pace += max(_NEWEST, 1 / self._num_paced) * (ratio - self.pace)

    def _prompts(self, work: Mapping[str, int]) -> list[Seq]:
        """Those of `work` that are still at their prompts, and here."""
        seqs = map(self.running.get, work) if self.role is Role.PREFILL else self.unbegun()
        return [seq for seq in seqs if seq and seq.request.id in work]

    def _count(self, where: np.ndarray | None, now: float) -> dict[str, str]:
        """A token more for each row of `where`, or all. Returns why some have ended so, by id."""
        running = self.running
        cells = running.cells if where is None else running.cells.take(where, axis=1)
        lengths = cells[Column.COMPUTED : Column.COUNT + 1]
        np.add(lengths, 1.0, out=lengths)
        running.num_tokens += cells.shape[1]
        due, worst = cells[Column.DUE], cells[Column.WORST_SLACK]
        np.minimum(worst, due - now, out=worst)
        np.add(due, cells[Column.TPOT], out=due)
        if where is not None:
            running.cells[:, where] = cells
        # Never above max_tokens, so it also finds those that have all that they may have.
        (outlived,) = (cells[Column.COUNT] >= cells[Column.EXPECTED]).nonzero()
        if not outlived.size:
            return {}
        full = {}
        for row in (outlived if where is None else where[outlived]).tolist():
            seq = running.at(row)
            if seq.num_tokens >= seq.request.max_tokens:
                full[seq.request.id] = "length"
            else:
                self._expect(seq)
        return full

    def _expect(self, seq: Seq) -> None:
        if self.role is Role.PREFILL:
            return
        request = seq.request
        expected = self.outputs.expect(len(request.prompt), seq.num_tokens)
        seq.cells[Column.EXPECTED] = min(expected, request.max_tokens)

    def _finish(self, id: str, reason: str) -> Seq:
        seq = self.running[id]
        seq.finish_reason = reason
        self.outputs.add(len(seq.request.prompt), seq.num_tokens)
        self._drop(self.running, id)
        return seq

    def _park(self, id: str) -> Seq:
        seq = self.running.move(id, self.parked)
        self.parked_tokens += seq.computed
        return seq

    def _drop(self, place: Rows[Seq], id: str) -> None:
        seq = place.remove(id)
        if place is self.waiting:
            self.pool.unwatch(seq)
        if place is self.parked:
            self.parked_tokens -= seq.computed
        self.pool.take_back(seq)


Policy = Callable[[Instance, float], Batch]
"""(instance, now) -> Batch. Pure: leaves the ledger as it is and answers the same twice.

A ledger that holds work gets a batch, unless it waits for `parked` KV to be released, for a fetch
under way, or for a running sequence to give back its pages.
"""


def during_step(batch: Batch) -> Batch:
    """What of a decision can begin while a step is under way: fetches into pages that are free."""
    return Batch() if batch.evict else Batch(fetch=batch.fetch)


def fetchable(instance: Instance) -> bool:
    """Whether some waiting request's KV is elsewhere and not under way."""
    if instance.role is Role.PREFILL:
        return False
    cells = instance.waiting.cells
    return not np.logical_and.reduce(cells[Column.CAPACITY] + cells[Column.READY])
