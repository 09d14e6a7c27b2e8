"""What is said to a worker, and what it says. `codec.py` is the table of those that leave the
process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kairos_jax.engine.calls import Token
from kairos_jax.kv.transport import Ticket
from kairos_jax.worker.status import Status
from schedulers.ledger.instance import Limits, Role
from schedulers.ledger.request import Request
from schedulers.policies.routing import Summary


@dataclass(frozen=True, slots=True)
class Submit:
    """A request to prefill here. trace: W3C headers of the trace that it is a part of, if any."""

    request: Request
    trace: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Handover:
    """A request whose prefill was done elsewhere; `ticket` is for its KV. trace: as of Submit."""

    request: Request
    tokens: tuple[int, ...]
    first_token_at: float
    ticket: Ticket
    trace: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prefetch:
    """A request whose KV is being offered elsewhere, and which will come here by a Handover: what
    there is of it may be fetched already. prompt: its token ids, as of the Handover.
    """

    ticket: Ticket
    prompt: Sequence[int]


@dataclass(frozen=True, slots=True)
class Release:
    """The decode side has the KV of this request."""

    id: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for this request any more."""

    id: str


@dataclass(frozen=True, slots=True)
class Stay:
    """This request, which could go on elsewhere, goes on here. why: in words."""

    id: str
    why: str


@dataclass(frozen=True, slots=True)
class GoOn:
    """This request, which has its first token, is to go on elsewhere, if it still runs here: its KV
    is offered. why: in words.
    """

    id: str
    why: str


@dataclass(frozen=True, slots=True)
class Recall:
    """This request may begin sooner elsewhere: it is given back, or `Kept` if it has begun here.
    why: in words.
    """

    id: str
    why: str


@dataclass(frozen=True, slots=True)
class HandBack:
    """Give back what waits and has not begun, and with `running` all there is; from now on, take
    nothing new.
    """

    running: bool


Message = Submit | Handover | Prefetch | Release | Cancel | Stay | GoOn | Recall | HandBack
"""All that is said to a worker."""


@dataclass(slots=True)
class Output:
    """One new token of one request. Not frozen, which takes four times as long to make, and a step
    makes hundreds. ticket: set where it goes on elsewhere, good for its KV.

    begun_at, at: when its first step here began, and when this token was there, in seconds.
    cached: tokens of its prompt that were not computed for it, but were in the prefix cache.
    """

    id: str
    token: Token
    begun_at: float
    at: float
    finish_reason: str | None = None
    ticket: Ticket | None = None
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Stepped:
    """All tokens of one step."""

    outputs: tuple[Output, ...]


@dataclass(frozen=True, slots=True)
class Offered:
    """The first KV of this request is on offer, while the rest of its prompt is still computed."""

    id: str
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Parked:
    """This request has stopped here, as it was told by `GoOn`: its KV is there to be fetched."""

    id: str
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Moved:
    """The KV of this request has come over, at `at`; where it came from may drop it. asked_at: when
    it was asked for, which other processes are not told.
    """

    id: str
    at: float
    asked_at: float | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """This one request failed here, and is forgotten here."""

    id: str
    error: Exception


@dataclass(frozen=True, slots=True)
class Failed:
    """This one request cannot be served, here or elsewhere, and is forgotten here. cause: a word,
    of which there are few. error: what its client is told.
    """

    id: str
    cause: str
    error: str


@dataclass(frozen=True, slots=True)
class Returned:
    """This request is to go on elsewhere; it is forgotten here. ticket: of its KV, if that was
    handed over and not asked for yet, so that another may.
    """

    id: str
    ticket: Ticket | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """This request was recalled and has begun here, so that it stays."""

    id: str


@dataclass(frozen=True, slots=True)
class Draining:
    """This instance takes no new requests; it gives them back."""

    instance: str


@dataclass(frozen=True, slots=True)
class Died:
    """The step loop has ended by an error; nothing on this instance will go on. aboard: the
    requests of the step that raised it, none if no step did; None where the instance was lost
    before it could say. stood_still: it was lost since this router itself did, for so long that
    workers gave it up.
    """

    instance: str
    error: BaseException
    aboard: tuple[str, ...] | None = None
    stood_still: bool = False


@dataclass(frozen=True, slots=True)
class Outlined:
    """What a router is to know of this instance, the first `num_received` requests sent here
    included.
    """

    instance: str
    summary: Summary
    num_received: int


Event = (
    Stepped
    | Offered
    | Parked
    | Moved
    | Lost
    | Failed
    | Returned
    | Kept
    | Draining
    | Died
    | Outlined
)
"""All that a worker says."""


# Between the two ends of a router's call to a worker.


@dataclass(frozen=True, slots=True)
class Hello:
    """A router's first message. router: random, new at each start. version: of its protocol;
    oldest: the oldest with which it works.
    """

    router: str
    version: int
    oldest: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answers a Hello: the name and role of a worker, and what it has.

    incarnation: random, new at each start. profile: its step times (see `schedulers.cost`).
    kv_address: "host:port" of its KV service. version: of its protocol; 0 for one that does not
    tell. fluid: its role is where it begins; it does both.
    """

    instance: str
    incarnation: str
    role: Role
    model: str
    fingerprint: str
    dtype: str
    limits: Limits
    profile: Mapping[str, Any]
    mesh_size: int = 1
    device_kind: str = ""
    kv_address: str = ""
    prefix_cache: bool = False
    version: int = 0
    fluid: bool = False

    @property
    def does(self) -> Role:
        """The jobs that it does, wherever it begins."""
        return Role.BOTH if self.fluid else self.role


@dataclass(frozen=True, slots=True)
class Ping:
    """A sign of life of a router's, which asks for one of the worker's."""


@dataclass(frozen=True, slots=True)
class Pong:
    """Answers a Ping. status: None of a worker that does not tell."""

    status: Status | None = None
