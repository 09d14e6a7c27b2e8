"""KV out of one instance's pool and into it: what it offers to others, and what it fetches of them.

All copies are asked of the engine in the order of its steps, so a copy sees what the step before it
has computed, whether or not that step's result is there. They are made a part at a time, between
steps (`kairos_jax.worker.copies`): an offer grows with them, and a sequence may step when all of
its KV is in the pool.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kairos_jax.engine.engine import KV, Engine, num_blocks
from kairos_jax.engine.functions import BLOCK_PAGES
from kairos_jax.kv.transport import KVTransport, Ticket
from kairos_jax.worker.copies import Copies, Copy
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

    arrived: called with what a fetch has brought, on a thread of the transport's. moved: told what
    is to be said of KV that is in the pool now.
    """

    def __init__(
        self,
        instance: Instance,
        engine: Engine,
        transport: KVTransport,
        clock: Callable[[], float],
        arrived: Callable[[Fetched], None],
        moved: Callable[[Moved], None],
    ):
        self.instance, self.engine, self.transport = instance, engine, transport
        self._clock, self._arrived, self._moved = clock, arrived, moved
        self.copies = Copies(lambda: self.engine.copy_s, clock)
        self._tickets: dict[str, Ticket] = {}  # of KV that is to be fetched
        self._ahead: dict[str, Ticket] = {}  # of KV that was asked for ahead of its request
        self._offers: dict[str, Ticket] = {}  # of KV that was copied out of this pool

    @property
    def holds_tickets(self) -> bool:
        """Whether any ticket is held, for KV here or elsewhere."""
        return bool(self._tickets or self._ahead or self._offers)

    # Out of the pool.

    def offer(self, seq: Seq) -> Ticket:
        """Offers all its KV. It keeps its pages until they are copied: see `Instance.copied`."""
        copy = self.copies.get(seq.request.id) or self._open(seq, seq.computed)
        copy.past, copy.complete = num_blocks(len(self._written(seq))), True
        return self._offers[seq.request.id]

    def offer_part(self, seq: Seq) -> Offered | None:
        """Offers what KV there is of a prompt whose rest is still to be computed: whole blocks, and
        never the last, which may grow. Returns what is to be said of it.
        """
        id, page_size = seq.request.id, self.instance.limits.page_size
        past = seq.computed // page_size // BLOCK_PAGES
        known = self.copies.get(id)
        if not past:
            return None
        copy = known or self._open(seq, seq.length)
        copy.past = past
        return None if known else Offered(id, self._offers[id])

    def _open(self, seq: Seq, num_tokens: int) -> Copy:
        """An offer of so many tokens, of which nothing is copied yet."""
        id = seq.request.id
        ticket = self._offers[id] = self.transport.open(id, num_tokens)

        def move(first: int, past: int, last: bool) -> None:
            # As they are now: another sequence's may have taken the place of some.
            pages = self._written(seq)[first * BLOCK_PAGES : past * BLOCK_PAGES]
            self.transport.extend(ticket, self.engine.read_pages(pages), last)

        def ended() -> None:
            if id in self.instance.parked or id in self.instance.evicting:
                self.instance.copied(id)

        return self.copies.add(id, Copy(move, ended))

    def evict(self, seq: Seq) -> None:
        """Offers its KV, which is to be fetched again from here."""
        self._tickets[seq.request.id] = self.offer(seq)

    def drop_offer(self, id: str) -> None:
        """Releases what is on offer of a request, if anything is."""
        self.copies.drop(id)
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

    def write(self, fetched: Fetched) -> None:
        """Writes what has come, save for what was here: others read that."""
        kv = fetched.kv
        assert not isinstance(kv, Exception)
        id = fetched.ticket.request_id
        del self._tickets[id]
        self._ahead.pop(id, None)
        seq, limits = self.instance.waiting[id], self.instance.limits
        first, held = self._first_block(seq.cached, seq.computed), seq.cached // limits.page_size
        pages = [limits.num_pages] * held + self._written(seq)[held:]
        pages = pages[first * BLOCK_PAGES :]

        def move(first: int, past: int, last: bool) -> None:
            some = pages[first * BLOCK_PAGES : past * BLOCK_PAGES]
            self.engine.write_pages(some, kv[first:past])

        def ended() -> None:
            self.instance.fetched(id)
            if id in self._offers:  # it had been evicted from here
                self.drop_offer(id)
            else:
                self._moved(Moved(id, self._clock(), fetched.asked_at))

        self.copies.add(id, Copy(move, ended, len(kv), True))

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
        self.copies.drop(id)
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
