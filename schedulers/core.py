"""The ledger of one instance, and the types that requests and decisions have on it.

The live workers and the simulator drive these same objects. Times are seconds on one monotonic
clock that the caller reads; nothing here reads a clock.
"""

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from schedulers.pages import PageTable

# Least weight of a new value in the running averages below. With a fifth a step, prediction noise
# of 20 % let too many sequences in whenever the average dipped: 50 % attained instead of 72.
_NEWEST = 0.02
# Steps that the profile counts for before any was measured.
_PRIOR_STEPS = 10
# A single stalled step (a compilation, a page fault storm) must not turn every prediction.
_PACE_RANGE = (0.25, 8.0)


@dataclass(frozen=True, slots=True)
class Slo:
    """Service level objectives of one request, in seconds.

    ttft: time to first token, from arrival. tpot: mean time per output token after the first.
    """

    ttft: float
    tpot: float

    def __post_init__(self):
        for name in ("ttft", "tpot"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"slo.{name} must be a positive number of seconds, got {value}")


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for. Made once, at the edge, and never changed.

    prompt: token ids (the simulator passes a `range`: only the length is looked at here).
    stop: token ids that end the output. sampling: opaque to schedulers.
    """

    id: str
    arrival: float
    prompt: Sequence[int]
    max_tokens: int
    slo: Slo
    stop: frozenset[int] = frozenset()
    sampling: Any = None

    @property
    def deadline(self) -> float:
        """When the first token is due."""
        return self.arrival + self.slo.ttft

    @property
    def max_length(self) -> int:
        """Tokens of prompt and output together, at most."""
        return len(self.prompt) + self.max_tokens


@dataclass(slots=True)
class Seq:
    """A request's progress on one instance.

    computed: how many of its tokens have their KV in `pages`. ready: that KV is on this instance
    (False from hand-over until the transfer has been written). tokens: generated so far.
    """

    request: Request
    computed: int = 0
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    ready: bool = True
    begun_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    finish_reason: str | None = None

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to be computed before the next output token."""
        return self.length - self.computed

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Ids of prompt and output, from position `start` up to `stop`."""
        num_prompt = len(self.request.prompt)
        ids = list(self.request.prompt[start:stop])
        ids += self.tokens[max(start - num_prompt, 0) : max(stop - num_prompt, 0)]
        return ids


class Role(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one instance can hold. max_batch: sequences a step; max_chunk: prompt tokens a
    prefill step; max_context: tokens of a sequence; pages of `page_size` tokens.
    """

    max_batch: int
    max_chunk: int
    max_context: int
    page_size: int
    num_pages: int

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

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)


@dataclass(frozen=True, slots=True)
class Batch:
    """A decision. work: tokens to compute, by request id (more than one: prefill or a chunk of it).
    fetch: requests to reserve room for, and whose KV to bring here. predicted_s: the cost model's
    own figure for `work`, before the instance's pace; `Instance.end` holds it against the clock.
    """

    work: Mapping[str, int] = field(default_factory=dict)
    fetch: tuple[str, ...] = ()
    predicted_s: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.work or self.fetch)


class Instance:
    """The ledger of one instance: what waits, runs and is parked, and who holds which pages.

    waiting: no step yet (on a decode instance: not yet in a batch). running: begun. parked:
    prefilled, KV held here until the decode side has it. Only the verbs below change it.

    pace: recent measured / predicted step time, so that a prediction is anchored on what steps
    cost at present. mean_output: tokens of recently finished requests, None before the first.
    """

    def __init__(self, id: str, role: Role, limits: Limits):
        self.id = id
        self.role = role
        self.limits = limits
        self.pages = PageTable(limits.num_pages)
        self.waiting: dict[str, Seq] = {}
        self.running: dict[str, Seq] = {}
        self.parked: dict[str, Seq] = {}
        self.pace = 1.0
        self.mean_output: float | None = None
        self._num_paced = _PRIOR_STEPS
        self._num_finished = 0
        self._step_begun: float | None = None

    # What the policies ask.

    def get(self, id: str) -> Seq | None:
        return self.waiting.get(id) or self.running.get(id) or self.parked.get(id)

    def pages_needed(self, seq: Seq) -> int:
        """Pages that `seq` must still be given before it may begin.

        All at once, so that no two half-served requests can each wait for the other's pages: the
        whole prompt on a prefill instance, prompt and longest output elsewhere.
        """
        prefill = self.role is Role.PREFILL
        tokens = len(seq.request.prompt) if prefill else seq.request.max_length
        return self.limits.pages_for(tokens) - len(seq.pages)

    def fits(self, seq: Seq) -> bool:
        return self.pages_needed(seq) <= self.pages.num_free

    # The verbs.

    def add(
        self,
        request: Request,
        tokens: Sequence[int] = (),
        first_token_at: float | None = None,
    ) -> Seq:
        """Takes in a request; with `tokens`, one whose prefill was done elsewhere."""
        if self.get(request.id):
            raise ValueError(f"request id {request.id!r} is in use on instance {self.id!r}")
        seq = Seq(request, tokens=list(tokens), first_token_at=first_token_at)
        if tokens:
            seq.computed, seq.ready, seq.last_token_at = seq.length - 1, False, first_token_at
        self.waiting[request.id] = seq
        return seq

    def begin(self, batch: Batch, now: float) -> None:
        """Reserves the pages that the decision needs and moves its work to running."""
        for id in batch.fetch:
            seq = self.waiting[id]
            seq.pages += self.pages.alloc(self.pages_needed(seq))
        for id in batch.work:
            seq = self.running.get(id) or self.waiting[id]
            assert seq.ready, f"request {id!r} was scheduled before its KV arrived"
            seq.pages += self.pages.alloc(self.pages_needed(seq))
            if seq.begun_at is None:
                seq.begun_at = now
            if id in self.waiting:
                self.running[id] = self.waiting.pop(id)
        if batch.work:
            self._step_begun = now

    def fetched(self, id: str) -> Seq:
        """The KV of `id`, which waits, is here: from now on it may step."""
        seq = self.waiting[id]
        seq.ready = True
        return seq

    def end(self, batch: Batch, tokens: Mapping[str, int], now: float) -> list[Seq]:
        """Books a step that ran: `tokens` holds the id sampled for each sequence that is now
        computed to its end. Returns those sequences. Ids cancelled meanwhile are passed over.
        """
        self._anchor(batch, now)
        produced = []
        for id, count in batch.work.items():
            seq = self.running.get(id)
            if seq is None:
                continue
            seq.computed += count
            if seq.remaining:
                continue
            seq.tokens.append(tokens[id])
            seq.last_token_at = now
            if seq.first_token_at is None:
                seq.first_token_at = now
            produced.append(seq)
            self._settle(seq)
        return produced

    def release(self, id: str) -> None:
        """The decode side has the KV of `id`: frees its pages. Unknown ids are passed over, since
        a cancel may have come first.
        """
        self._drop(self.parked, id)

    def cancel(self, id: str) -> bool:
        """Forgets `id` wherever it is and frees its pages. False if it is not here."""
        return any(self._drop(place, id) for place in (self.waiting, self.running, self.parked))

    def check(self) -> None:
        """Raises AssertionError if a page is leaked or shared, or an id stands twice."""
        places = (self.waiting, self.running, self.parked)
        seqs = [seq for place in places for seq in place.values()]
        ids = [seq.request.id for seq in seqs]
        assert len(ids) == len(set(ids)), "a request stands in two places"
        self.pages.check([page for seq in seqs for page in seq.pages])

    def _anchor(self, batch: Batch, now: float) -> None:
        begun, self._step_begun = self._step_begun, None
        if begun is None or batch.predicted_s <= 0:
            return
        low, high = _PACE_RANGE
        ratio = min(max((now - begun) / batch.predicted_s, low), high)
        self._num_paced += 1
        self.pace = _average(self.pace, ratio, self._num_paced)

    def _settle(self, seq: Seq) -> None:
        request = seq.request
        if seq.tokens[-1] in request.stop:
            seq.finish_reason = "stop"
        elif len(seq.tokens) >= request.max_tokens:
            seq.finish_reason = "length"
        if seq.finish_reason:
            self._num_finished += 1
            mean = self.mean_output or 0.0
            self.mean_output = _average(mean, len(seq.tokens), self._num_finished)
            self._drop(self.running, request.id)
        elif self.role is Role.PREFILL:
            self.parked[request.id] = self.running.pop(request.id)

    def _drop(self, place: dict[str, Seq], id: str) -> bool:
        seq = place.pop(id, None)
        if seq is None:
            return False
        self.pages.free(seq.pages)
        seq.pages = []
        return True


def _average(mean: float, value: float, count: int) -> float:
    """The mean of `count` values of which `value` is the last; of the recent ones once many."""
    return mean + max(_NEWEST, 1 / count) * (value - mean)


Policy = Callable[[Instance, float], Batch]
"""(instance, now) -> Batch. Pure: leaves the ledger as it is and answers the same twice.

A ledger that holds work gets a batch, unless it waits for `parked` pages to be released, for a
fetch under way, or for a running sequence to give back its pages.
"""
