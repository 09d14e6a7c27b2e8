"""The ledger of one instance, and the decisions that change it.

The live workers and the simulator drive these same objects. Times are seconds on one monotonic
clock that the caller reads; nothing here reads a clock.
"""

import enum
import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
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

    @property
    def jobs(self) -> tuple[str, ...]:
        """Of "prefill" and "decode", as profiles name them."""
        return ("prefill", "decode") if self is Role.BOTH else (self.value,)


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
    requests whose KV is to be copied out. They wait, and keep their pages until it is: nothing else
    of the decision may count on these. Then they wait to be fetched again. predicted_s: the cost
    model's own figure for `work`, before the instance's pace; `Instance.end` holds it against the
    clock.
    """

    work: Mapping[str, int] = _NO_WORK
    fetch: tuple[str, ...] = ()
    evict: tuple[str, ...] = ()
    predicted_s: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.work or self.fetch or self.evict)


@dataclass(slots=True)
class _Step:
    """A step that has begun and not ended.

    begun_at: when it began; behind another step, when that one is expected to end. num_removed: of
    the running ones, when it began. joined: sequences whose first step it is. booked: its work is
    in the ledger. Then prompts: sequences that were at their prompts; full: why outputs end with
    it, whatever its tokens are, by id.
    """

    batch: Batch
    begun_at: float
    num_removed: int
    joined: list[Seq] = field(default_factory=list)
    booked: bool = False
    prompts: list[Seq] = field(default_factory=list)
    full: dict[str, str] = field(default_factory=dict)


class Instance:
    """The ledger of one instance: what waits, runs and is parked, and which pages each sequence
    holds.

    waiting: no step yet, evicted, or (on a decode instance) not yet in a batch. running: begun.
    parked: prefilled, KV held for the decode side. ending: what an expected step ends or parks,
    until its result is there. evicting: waiting ones whose KV is being copied out. Only the verbs
    below change it. A `journal`, if there is one, is told
    of each verb: `schedulers.ledger.journal` replays them.

    A step may begin behind another whose result is still to come: `begin`, `expect`, `begin` of the
    next, `end` of the first. What is decided in between is decided on a ledger in which the first
    step has done all that it is certain to do.

    pace: recent measured / predicted step time, so that a prediction is anchored on what steps
    cost at present. spread: by how much of its predicted time a step was longer or shorter of late,
    on average. outputs: how long recently finished outputs were. receives: where roles flow,
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
        self.ending: Rows[Seq] = Rows()
        self.evicting: dict[str, Seq] = {}
        self.parked_tokens = 0
        self.pace, self.spread = 1.0, 0.0
        self.outputs = Outputs(learn_outputs)
        self.busy_until = -math.inf
        self.journal: Callable[..., None] | None = None
        self._num_paced = _PRIOR_STEPS
        self._steps: deque[_Step] = deque()  # two at most: the first one runs

    # What the policies ask.

    @property
    def under_way(self) -> Batch | None:
        """The batch of the step under way, if its work is still to be booked."""
        last = self._steps[-1] if self._steps else None
        return last.batch if last and not last.booked else None

    @property
    def next_to_end(self) -> Batch | None:
        """The batch of the step that ends next."""
        return self._steps[0].batch if self._steps else None

    @property
    def awaits_result(self) -> bool:
        """Whether the result of the expected step bears on which prompt is next: if its ending
        sequences hold the pages that a prompt lacks, or it computes a page that a prompt shares.
        """
        prompts = self.waiting.count == 0
        if self.role is Role.DECODE or not prompts.any():
            return False
        if self.ending.seqs:
            lacks = (self.waiting.length - self.waiting.capacity)[prompts]
            free = self.pages.num_free * self.limits.page_size
            held = float(self.ending.capacity.sum())
            if ((lacks > free) & (lacks <= free + held)).any():
                return True
        step = self._steps[0]
        work = step.batch.work
        return any(self.pool.is_awaited(seq, work[seq.request.id]) for seq in step.prompts)

    def begins_at(self, now: float) -> float:
        """When a step that is decided at `now` begins: behind one that is expected, when that is
        predicted to end. Deadlines and slack count from then on.
        """
        return now if self.under_way else max(now, self.busy_until)

    def get(self, id: str) -> Seq | None:
        here = self.waiting.get(id) or self.running.get(id)
        return here or self.parked.get(id) or self.ending.get(id)

    def pages_needed(self, seq: Seq) -> int:
        """Pages that `seq` must be given before it may begin: for all its tokens so far. Cached
        ones count, as if they were taken anew: so that is the most that it can take.
        """
        return self.pool.needed(seq)

    @property
    def num_leaving(self) -> int:
        """Pages that will be free once the KV of the evicted ones has been copied out."""
        return sum(self.pool.table.num_freed_by(seq.pages) for seq in self.evicting.values())

    def unbegun(self) -> list[Seq]:
        """The running sequences that have no output token yet."""
        (rows,) = (self.running.count == 0).nonzero()
        return [self.running.at(row) for row in rows.tolist()]

    @property
    def parked_room(self) -> float:
        """Tokens whose KV may still be parked, those of running prompts set aside."""
        if math.isinf(self.limits.parked_tokens):
            return math.inf
        parked_tokens, prompts = self.parked_tokens, self.running.num_tokens
        if self.role is Role.BOTH:  # of what decodes here, nothing is parked
            prompts = float(self.running.length[self.running.count == 0].sum())
        else:
            parked_tokens += float(self.ending.computed.sum())
        return self.limits.parked_tokens - parked_tokens - prompts

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
        """Reserves the pages that the decision says, and moves its work to running.

        `now` is when the policy was asked. Behind a step that is expected, this one begins with
        that one's end.
        """
        if self.journal:
            self.journal("begin", now, batch)
        for id in batch.evict:
            seq = self.running.move(id, self.waiting)
            assert seq.num_tokens, f"request {id!r} was evicted in the midst of its prefill"
            seq.cells[Column.READY] = 0.0
            self.evicting[id] = seq
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
        if self.under_way:
            raise ValueError(f"instance {self.id!r}: a step began behind one that is not expected")
        joined = [seq for id in joining if (seq := self.waiting[id]).begun_at is None]
        for id in joining:
            self._admit(id, now)
        if self.role is not Role.PREFILL:
            self.pool.grow(self.running, batch.work)
        begun_at = self.begins_at(now)
        self._steps.append(_Step(batch, begun_at, self.running.num_removed, joined))
        self.busy_until = begun_at + self.pace * batch.predicted_s

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

    def expect(self, now: float) -> list[Seq]:
        """Books what the step under way is certain to do, before its result is there: the next step
        can then be decided and begun. Until `end`, its tokens count as told when it is predicted to
        end, or `now` if it is late.

        Sequences that it ends or parks move to `ending`, where they keep their pages. They are
        returned. An output that its token stops goes on until `end` says so.
        """
        if self.journal:
            self.journal("expect", now)
        if not self.under_way or len(self._steps) > 1:
            raise ValueError(f"instance {self.id!r}: no step can be expected to end")
        (step,) = self._steps
        step.booked = True
        self._book(step, max(now, self.busy_until), -math.inf)
        left = [seq.request.id for seq in step.prompts if seq.num_tokens and self._ends(seq)]
        return [self.running.move(id, self.ending) for id in (*step.full, *left)]

    def end(self, batch: Batch, now: float, stopped: Collection[str] = ()) -> list[Seq]:
        """Books a step that ran: one more output token for each sequence that is now computed to
        its end. `stopped`: those of them whose output this token ends. Ids that were cancelled
        during the step are passed over.

        Returns the sequences that have left `running`: finished (with a finish_reason), or parked.
        """
        if self.journal:
            self.journal("end", now, batch, tuple(stopped))
        if not self._steps:
            raise ValueError(f"instance {self.id!r}: a step has ended that was not begun")
        step = self._steps.popleft()
        self._anchor(batch.predicted_s, now - step.begun_at)
        if step.booked:
            self._settle(step, now)
        else:
            self._book(step, now, now)
        self._follow(now)
        ended = step.full | dict.fromkeys(stopped, "stop")
        left = []
        for seq in step.prompts:
            id = seq.request.id
            if step.booked and self.get(id) is not seq:
                continue  # cancelled
            self.pool.cache(seq, batch.work[id])
            if not seq.num_tokens or id in ended:
                continue
            if seq.request.max_tokens == 1:
                ended[id] = "length"
            elif self.role is Role.PREFILL:
                left.append(self._park(id))
        for id, why in ended.items():
            if id in self.running or id in self.ending:
                left.append(self._finish(id, why))
        return left

    def stay(self, id: str, why: str) -> None:
        """`id`, which could go on elsewhere, goes on here. why: in words, for those who ask."""
        if self.journal:
            self.journal("stay", id, why)

    def hand_over(self, id: str, why: str) -> Seq:
        """`id`, which runs here and has its first token, is to go on elsewhere: parks it. Not while
        a step is under way. why: as of `stay`.
        """
        if self.journal:
            self.journal("hand_over", id, why)
        if self._steps or not self.running[id].num_tokens:
            raise ValueError(
                f"request {id!r} is to be handed over in the midst of a step or prompt"
            )
        return self._park(id)

    def give_back(self, id: str, why: str) -> Seq:
        """`id`, which waits and has not begun, is to begin elsewhere: forgets it. why: as of
        `stay`.
        """
        if self.journal:
            self.journal("give_back", id, why)
        seq = self.waiting[id]
        if not seq.unbegun:
            raise ValueError(f"request {id!r} is to be given back, and has begun")
        self._drop(self.waiting, id)
        return seq

    def copied(self, id: str) -> None:
        """The KV of `id`, parked or evicted, has been copied out of the pool: frees its pages."""
        if self.journal:
            self.journal("copied", id)
        self.pool.take_back(self.evicting.pop(id, None) or self.parked[id])

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
        for place in self._places:
            if id in place:
                self._drop(place, id)
                return True
        return False

    def check(self) -> None:
        """Raises AssertionError if a page is leaked or shared, or an id stands twice."""
        ids = [id for place in self._places for id in place]
        assert len(ids) == len(set(ids)), "a request stands in two places"
        for place in self._places:
            place.check()
        assert self.parked_tokens == sum(seq.computed for seq in self.parked.values())
        for id, seq in self.evicting.items():
            assert self.waiting.get(id) is seq, f"request {id!r} was evicted, and does not wait"
            assert not seq.ready, f"request {id!r} was evicted, and is ready"
        booked = self._steps[0] if self._steps and self._steps[0].booked else None
        assert booked or not self.ending, "nothing ends without a step that is expected to end"
        fresh = {seq: booked.batch.work[seq.request.id] for seq in booked.prompts} if booked else {}
        self.pool.check(*(place.seqs for place in self._places), fresh=fresh)

    # How they do it.

    @property
    def _places(self) -> tuple[Rows[Seq], ...]:
        return self.waiting, self.running, self.parked, self.ending

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
        weight = max(_NEWEST, 1 / self._num_paced)
        self.spread += weight * (abs(ratio / self.pace - 1) - self.spread)
        self.pace += weight * (ratio - self.pace)

    def _follow(self, now: float) -> None:
        """The step behind the one that ended at `now` has begun at that time."""
        self.busy_until = -math.inf
        for step in self._steps:
            step.begun_at = now
            self.busy_until = now + self.pace * step.batch.predicted_s
            for seq in step.joined:
                seq.begun_at = now

    def _book(self, step: _Step, at: float, told_at: float) -> None:
        """Books the work of a step that ends at `at`. Its tokens are there at `told_at`; minus
        infinity: their time is still to come, and costs no slack yet.
        """
        rows, work = self.running, step.batch.work
        step.prompts = [] if self.role is Role.DECODE else self._prompts(work)
        if self.role is not Role.PREFILL:
            same = len(work) == len(rows.seqs) and rows.num_removed == step.num_removed
            whole = same and not step.prompts
            where = rows.where(work) if not whole else None
            if where is not None and step.prompts:
                where = where[rows.count[where] > 0]
            step.full = self._count(where, told_at)
        for seq in step.prompts:
            if seq.advance(work[seq.request.id], at):
                rows.num_tokens += 1
                self._expect(seq)

    def _settle(self, step: _Step, now: float) -> None:
        """Books the time of a step whose work is booked: its tokens are there at `now`."""
        for rows in (self.running, self.ending):
            where = rows.where(step.batch.work) if rows.seqs else ()
            if not len(where):
                continue
            count, due = rows.count[where], rows.due[where]
            worst, tpot = rows.cells[Column.WORST_SLACK, where], rows.tpot[where]
            # The due time is that of the next token by now. It is nan before the first.
            slack = np.fmin(worst, due - tpot - now)
            rows.cells[Column.WORST_SLACK, where] = np.where(count > 1, slack, worst)
            first = np.asarray(where)[count == 1]
            rows.cells[Column.FIRST_AT, first] = now
            rows.cells[Column.DUE, first] = now + rows.tpot[first]

    def _ends(self, seq: Seq) -> bool:
        """Whether a prompt leaves `running` with its first token, whatever that is."""
        return self.role is Role.PREFILL or seq.request.max_tokens == 1

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
        place = self.running if id in self.running else self.ending
        seq = place[id]
        seq.finish_reason = reason
        self.outputs.add(len(seq.request.prompt), seq.num_tokens)
        self._drop(place, id)
        return seq

    def _park(self, id: str) -> Seq:
        place = self.running if id in self.running else self.ending
        seq = place.move(id, self.parked)
        self.parked_tokens += seq.computed
        return seq

    def _drop(self, place: Rows[Seq], id: str) -> None:
        seq = place.remove(id)
        self.evicting.pop(id, None)
        if place is self.waiting:
            self.pool.unwatch(seq)
        if place is self.parked:
            self.parked_tokens -= seq.computed
        self.pool.take_back(seq)


Policy = Callable[[Instance, float], Batch]
"""(instance, now) -> Batch. Pure: leaves the ledger as it is and answers the same twice.

A ledger that holds work gets a batch, unless it waits for `parked` KV to be released, for a fetch
under way, for evicted KV to be copied out, or for a running sequence to give back its pages.
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
