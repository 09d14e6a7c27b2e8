"""Offers of KV: which claimant may take each, and until when. Used on one event loop."""

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kairos_jax.engine.engine import KV
from kairos_jax.kv.transport import Ticket


@dataclass(frozen=True, slots=True)
class Claimant:
    """identity: of a process. nonce: of one fetch of it; with the same, a claim is a retry."""

    identity: int
    nonce: int


class State(Enum):
    OFFERED = "offered"
    CLAIMED = "claimed"
    RELEASED = "released"


@dataclass(slots=True, eq=False)
class Lease:
    """One offer. deadline: when it runs out, in seconds of the owner's clock; while it still grows,
    it does not run out: the side that computes its blocks ends it.

    complete: no more blocks come. num_claims: how often it was claimed, retries included.
    num_calls: claims whose calls are open: while there is one, the lease does not run out.
    registered: arrays that a transfer server holds on to until they are deleted. changed: set
    whenever blocks have come, or it was claimed again or released.
    """

    ticket: Ticket
    deadline: float = math.inf
    kv: list[Any] = field(default_factory=list)
    complete: bool = False
    state: State = State.OFFERED
    claimant: Claimant | None = None
    num_claims: int = 0
    num_calls: int = 0
    registered: list[Any] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Leases:
    """All offers of one process.

    lease_s: how long an offer is kept that nobody claims. claim_s: how long one that is claimed,
    from the claim or its last new blocks.
    """

    def __init__(self, lease_s: float, claim_s: float):
        self.lease_s, self.claim_s = lease_s, claim_s
        self._leases: dict[int, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(list(self._leases.values()))

    def open(self, ticket: Ticket) -> None:
        """Offers what has no blocks yet."""
        self._leases[ticket.uuid] = Lease(ticket)

    def extend(self, ticket: Ticket, kv: KV, last: bool, now: float) -> None:
        """Adds blocks. An offer that has ended is passed over."""
        lease = self._leases.get(ticket.uuid)
        if lease is not None:
            lease.kv.extend(kv)
            lease.complete = last
            self._prolong(lease, now)

    def claim(self, uuid: int, request_id: str, claimant: Claimant, now: float) -> Lease:
        """Takes an offer for one claimant.

        Raises:
            LookupError: nothing is offered under this uuid, or it has ended.
            PermissionError: it is someone else's, or was claimed for another fetch.
        """
        lease = self._leases.get(uuid)
        if lease is None or lease.ticket.request_id != request_id:
            raise LookupError(f"no KV is offered for request {request_id!r} under its ticket")
        if lease.claimant not in (None, claimant):
            raise PermissionError(f"the KV of request {request_id!r} was claimed already")
        lease.state, lease.claimant = State.CLAIMED, claimant
        lease.num_claims += 1
        self._prolong(lease, now)
        return lease

    @contextlib.contextmanager
    def in_call(self, lease: Lease, clock: Callable[[], float]) -> Iterator[None]:
        """While the block lasts, the claimant takes what is offered, however slowly; its time
        begins anew at the end.
        """
        lease.num_calls += 1
        try:
            yield
        finally:
            lease.num_calls -= 1
            self._prolong(lease, clock())

    def delivered(self, uuid: int, claimant: Claimant) -> None:
        """Releases an offer if it is this claimant's."""
        lease = self._leases.get(uuid)
        if lease is not None and lease.claimant == claimant:
            self.release(uuid)

    def release(self, uuid: int) -> None:
        """Frees what an offer holds. Unknown ones are passed over."""
        lease = self._leases.pop(uuid, None)
        if lease is None:
            return
        lease.state = State.RELEASED
        lease.kv.clear()
        # A transfer server keeps what is not pulled for ever, unless its arrays are deleted.
        for array in lease.registered:
            array.delete()
        lease.registered.clear()
        lease.changed.set()

    def expire(self, now: float) -> list[Lease]:
        """Frees all that have run out, and returns them."""
        late = [lease for lease in self if lease.deadline <= now and not lease.num_calls]
        for lease in late:
            self.release(lease.ticket.uuid)
        return late

    def _prolong(self, lease: Lease, now: float) -> None:
        if lease.complete:
            lease.deadline = now + (self.lease_s if lease.claimant is None else self.claim_s)
        lease.changed.set()
