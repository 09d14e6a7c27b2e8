"""How KV gets from the instance that has it to the one that goes on with it."""

import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import jax
from jax.sharding import Sharding

from kairos_jax.engine.engine import KV


@dataclass(frozen=True, slots=True)
class Ticket:
    """Good for one fetch of one prompt's KV.

    num_tokens: how many tokens of it are real. address: "host:port" of the process that holds it,
    "" where it is this one.
    """

    request_id: str
    num_tokens: int
    uuid: int = field(default_factory=lambda: secrets.randbits(64))
    address: str = ""


Done = Callable[[KV | Exception], None]
"""Called once, on a thread of the transport's."""


class KVTransport(Protocol):
    """Carries KV from the instance that offers it to the one that fetches it.

    All of it returns at once, and is called from any thread. overlaps: whether it gains by offers
    that grow while the rest is computed. received_bytes: of KV that was brought here so far.

    The fetching side may have the first blocks of a prompt already. first: the first block that is
    to come; there is one in any case, by which both sides see that they mean the same.
    """

    overlaps: bool

    @property
    def received_bytes(self) -> int: ...

    def open(self, request_id: str, num_tokens: int) -> Ticket:
        """An offer of which nothing is there yet; it is to have the KV of `num_tokens` tokens, and
        is held until it is released.
        """
        ...

    def extend(self, ticket: Ticket, kv: KV, last: bool = False) -> None:
        """Adds the next blocks, whole ones, to an open offer; `last` completes it. They must be
        copies that nothing else uses: they are the transport's from now on, which may delete them.
        """
        ...

    def prefetch(self, ticket: Ticket, sharding: Sharding | None, first: int = 0) -> None:
        """Brings over what there is of an offer and what is still added to it, ahead of its fetch,
        as far as there is room for it. A hint: nothing is lost without it, nor if the fetch says
        another `first`.
        """
        ...

    def fetch(self, ticket: Ticket, sharding: Sharding | None, done: Done, first: int = 0) -> None:
        """`done` is given the KV from block `first` on, arrived and placed as `sharding` says, or
        the error that kept it away. Which is fetched first, the policy has decided by the order of
        the calls.
        """
        ...

    def release(self, ticket: Ticket) -> None:
        """Drops the KV offered under `ticket`, or what was brought over of it; a fetch under way
        ends by an error. Unknown tickets are passed over.
        """
        ...

    def close(self) -> None:
        """Ends all that is under way. Nothing is asked of it afterwards."""
        ...


class LocalTransport:
    """Between meshes of one process: `jax.device_put`, which reshards.

    One thread waits for the copies, so that no step loop does.
    """

    overlaps = False  # a copy within one process takes no time to speak of

    def __init__(self) -> None:
        self._offers: dict[Ticket, list[jax.Array]] = {}
        self._open: set[Ticket] = set()
        # Fetches of open offers: they begin when all is there.
        self._waiting: dict[Ticket, tuple[Sharding | None, Done, int]] = {}
        self._lock = threading.Lock()
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="kv-transfer")
        self._received_bytes = 0

    @property
    def received_bytes(self) -> int:
        """See `KVTransport`."""
        return self._received_bytes

    @property
    def num_offers(self) -> int:
        """Prompts whose KV is held here."""
        return len(self._offers)

    def open(self, request_id: str, num_tokens: int) -> Ticket:
        """See `KVTransport.open`."""
        ticket = Ticket(request_id, num_tokens)
        self._open.add(ticket)
        self._offers[ticket] = []
        return ticket

    def extend(self, ticket: Ticket, kv: KV, last: bool = False) -> None:
        """See `KVTransport.extend`."""
        with self._lock:
            if ticket not in self._open:
                return
            self._offers[ticket].extend(kv)
            if last:
                self._open.discard(ticket)
                self._begin(ticket)

    def prefetch(self, ticket: Ticket, sharding: Sharding | None, first: int = 0) -> None:
        """Nothing: see `overlaps`."""

    def fetch(self, ticket: Ticket, sharding: Sharding | None, done: Done, first: int = 0) -> None:
        """See `KVTransport.fetch`."""
        with self._lock:
            self._waiting[ticket] = sharding, done, first
            if ticket not in self._open:
                self._begin(ticket)

    def release(self, ticket: Ticket) -> None:
        """See `KVTransport.release`."""
        with self._lock:
            self._open.discard(ticket)
            self._offers.pop(ticket, None)
            self._begin(ticket)

    def close(self) -> None:
        """Ends the thread, after the move it is at."""
        self._mover.shutdown(cancel_futures=True)

    def _begin(self, ticket: Ticket) -> None:
        """The fetch of an offer that is complete, or gone, if there is one."""
        if asked := self._waiting.pop(ticket, None):
            self._mover.submit(self._move, ticket, *asked)

    def _move(self, ticket: Ticket, sharding: Sharding | None, done: Done, first: int) -> None:
        try:
            kv = self._offers.get(ticket)
            if kv is None:
                raise LookupError(f"no KV is offered for request {ticket.request_id!r}")
            kv = kv[first:]
            self._received_bytes += sum(block.nbytes for block in kv)
            if sharding is not None:
                kv = jax.block_until_ready([jax.device_put(block, sharding) for block in kv])
        except Exception as error:
            done(error)
        else:
            done(kv)
