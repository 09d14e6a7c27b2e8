"""KV out of one instance's pool and into it: what it offers to others, and what it fetches of them.

All copies are asked of the engine in the order of its steps, so a copy sees what the step before it
has computed, whether or not that step's result is there.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kairos_jax.engine.engine import KV, Engine
from kairos_jax.engine.functions import BLOCK_PAGES
from kairos_jax.kv.transport import KVTransport, Ticket
from kairos_jax.worker.messages import Moved, Offered
from schedulers.ledger.instance import Instance
from schedulers.ledger.request import Seq


@dataclass(frozen=True, slots=True)
class Fetched:
    """The KV of a request has arrived, or the error that kept it away."""

    ticket: Ticket
    kv: KV | Exception
    asked_at: float


class Moves:
    """The tickets of one instance, and what is done by them. The worker's thread calls it.

    arrived: called with what a fetch has brought, on a thread of the transport's.
    """

    def __init__(
        self,
        instance: Instance,
        engine: Engine,
        transport: KVTransport,
        clock: Callable[[], float],
        arrived: Callable[[Fetched], None],
    ):
        self.instance, self.engine, self.transport = instance, engine, transport
        self._clock, self._arrived = clock, arrived
        self._tickets: dict[str, Ticket] = {}  # of KV that is to be fetched
        self._ahead: dict[str, Ticket] = {}  # of KV that was asked for ahead of its request
        self._offers: dict[str, Ticket] = {}  # of KV that was copied out of this pool
        self._num_offered: dict[str, int] = {}  # pages, of prompts that are still computed

    @property
    def holds_tickets(self) -> bool:
        """Whether any ticket is held, for KV here or elsewhere."""
        return bool(self._tickets or self._ahead or self._offers)

    # Out of the pool.

    def offer(self, seq: Seq) -> Ticket:
        """Offers all its KV, or what was not offered of it yet."""
        id = seq.request.id
        first = self._num_offered.pop(id, 0)
        kv = self.engine.read_pages(self._written(seq)[first:])
        if first:
            self.transport.extend(self._offers[id], kv, last=True)
        else:
            self._offers[id] = self.transport.offer(id, seq.computed, kv)
        return self._offers[id]

    def offer_part(self, seq: Seq) -> Offered | None:
        """Offers what KV there is of a prompt whose rest is still to be computed: whole blocks, and
        never the last, which may grow. Returns what is to be said of it.
        """
        id = seq.request.id
        first = self._num_offered.get(id, 0)
        past = seq.computed // self.instance.limits.page_size // BLOCK_PAGES * BLOCK_PAGES
        if past == first:
            return None
        if not first:
            self._offers[id] = self.transport.open(id, seq.length)
        self.transport.extend(self._offers[id], self.engine.read_pages(seq.pages[first:past]))
        self._num_offered[id] = past
        return None if first else Offered(id, self._offers[id])

    def evict(self, seq: Seq) -> None:
        """Offers its KV, which is to be fetched again from here."""
        self._tickets[seq.request.id] = self.offer(seq)

    def drop_offer(self, id: str) -> None:
        """Releases what is on offer of a request, if anything is."""
        self._num_offered.pop(id, None)
        ticket = self._offers.pop(id, None)
        if ticket is not None:
            self.transport.release(ticket)

    # Into the pool.

    def expect(self, ticket: Ticket) -> None:
        """A request has come whose KV is to be fetched."""
        self._tickets[ticket.request_id] = ticket

    def prefetch(self, ticket: Ticket, held: int) -> None:
        """Brings over KV ahead of its request. held: tokens of it that are here."""
        self._ahead[ticket.request_id] = ticket
        first = self._first_block(held, ticket.num_tokens)
        self.transport.prefetch(ticket, self.engine.wire_sharding, first)

    def fetch(self, seq: Seq) -> None:
        """Fetches the KV of a waiting sequence, which has its pages."""
        ticket, first = self._tickets[seq.request.id], self._first_block(seq.cached, seq.computed)
        asked_at = self._clock()
        self.transport.fetch(
            ticket,
            self.engine.wire_sharding,
            lambda kv: self._arrived(Fetched(ticket, kv, asked_at)),
            first,
        )

    def is_awaited(self, fetched: Fetched) -> bool:
        """Whether that was not cancelled while it was fetched."""
        return self._tickets.get(fetched.ticket.request_id) is fetched.ticket

    def write(self, fetched: Fetched) -> Moved | None:
        """Writes what has come, save for what was here: others read that. Returns what is to be
        said of it: nothing, if it had been evicted from here.
        """
        assert not isinstance(fetched.kv, Exception)
        id = fetched.ticket.request_id
        del self._tickets[id]
        self._ahead.pop(id, None)
        seq, limits = self.instance.waiting[id], self.instance.limits
        first, held = self._first_block(seq.cached, seq.computed), seq.cached // limits.page_size
        pages = [limits.num_pages] * held + self._written(seq)[held:]
        self.engine.write_pages(pages[first * BLOCK_PAGES :], fetched.kv)
        if id in self._offers:
            self.drop_offer(id)
            return None
        return Moved(id, self._clock(), fetched.asked_at)

    # Either.

    def take_ticket(self, id: str) -> Ticket | None:
        """The ticket of a request that goes elsewhere before its KV was asked for. None: there is
        none, or what came ahead was claimed for here, and is of no use to others.
        """
        return None if id in self._ahead else self._tickets.pop(id, None)

    def without_request(self) -> list[str]:
        """Ids of requests whose KV came ahead of them, and which have not come."""
        return [id for id in self._ahead if id not in self._tickets]

    def forget(self, id: str) -> None:
        """Releases all that there is of a request."""
        ahead = self._ahead.pop(id, None)
        if ticket := self._tickets.pop(id, ahead):
            self.transport.release(ticket)
        self.drop_offer(id)

    def release_all(self) -> None:
        """What was offered must not be fetched from a pool that nobody owns any more."""
        for tickets in (self._tickets, self._ahead, self._offers):
            for ticket in tickets.values():
                self.transport.release(ticket)

    def _first_block(self, held: int, num_tokens: int) -> int:
        """The first block that has to come of so many tokens, of which `held` are here."""
        # The last comes in any case.
        return min(held, num_tokens - 1) // (self.instance.limits.page_size * BLOCK_PAGES)

    def _written(self, seq: Seq) -> list[int]:
        """Its pages that hold KV: not one that was given to it for its next token."""
        return seq.pages[: self.instance.limits.pages_for(seq.computed)]
