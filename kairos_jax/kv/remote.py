"""KV between processes: offers kept for their claimants, and fetches of what others offer.

All of it happens on one event loop; what may block, on threads beside it. A fetch claims the offer
over gRPC, compares its manifest, and takes its parts as they come: by the transfer server (`jax`)
or in the claim's own stream (`grpc`). The KV that a process fetches back from itself takes the way
of `LocalTransport`.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import jax
from jax.sharding import Sharding

from kairos_jax.engine.engine import KV
from kairos_jax.kv.client import KVClient, Wanted, arrived
from kairos_jax.kv.in_flight import Priority
from kairos_jax.kv.jax_transfer import TransferPort
from kairos_jax.kv.leases import Claimant, Leases
from kairos_jax.kv.manifest import Facts
from kairos_jax.kv.options import TransferOptions
from kairos_jax.kv.servicer import KVServicer
from kairos_jax.kv.transport import Done, Ticket
from kairos_jax.process.logs import of_request
from kairos_jax.rpc import kv_pb2_grpc

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Fetch:
    """KV on its way here, or here already. done: None while nobody has asked for it. first: the
    block with which it begins. wanted: the block with which it was asked for.
    """

    ticket: Ticket
    sharding: Sharding | None
    claimant: Claimant
    num_bytes: int
    small: bool
    first: int
    wanted: int = 0
    done: Done | None = None
    task: asyncio.Task[KV] | None = None
    stopped_by: Exception | None = None

    @property
    def priority(self) -> Priority:
        if self.done is None:
            return Priority.PREFETCH
        return Priority.URGENT if self.small else Priority.BULK


class RemoteTransport:
    """A `KVTransport` between processes. See the module's docstring.

    facts: what the KV of this process is. address: "host:port" where peers reach its KV service.
    channel, metadata: how peers are called. on_expired: told, on the event loop, the request whose
    offer ran out; the ledger must then forget it.
    """

    overlaps = True

    def __init__(
        self,
        facts: Facts,
        address: str,
        loop: asyncio.AbstractEventLoop,
        channel: Callable[[str], grpc.aio.Channel],
        metadata: Sequence[tuple[str, str]] = (),
        options: TransferOptions | None = None,
        on_expired: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Raises OSError if the transfer server cannot listen."""
        self.facts, self.address, self.clock = facts, address, clock
        self.options = options = options or TransferOptions()
        self._loop, self._on_expired = loop, on_expired
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="kv-transfer")
        self._identity = secrets.randbits(64)
        self._leases = Leases(options.lease_s, options.claim_s)
        self._port = None
        if options.kind == "jax":
            self._port = TransferPort(
                options.listens_on(address),
                options.transfer_bytes,
                options.parallel_copies,
                self._in_thread,
            )
        self._servicer = KVServicer(
            self._leases, facts, self._identity, self._port, self._in_thread, clock
        )
        self._client = KVClient(
            facts,
            channel,
            tuple(metadata),
            self._port,
            options.in_flight_bytes,
            options.fetch_s,
            self._in_thread,
        )
        self._fetches: dict[int, _Fetch] = {}
        self._tasks: set[asyncio.Task] = set()
        self._on_loop(lambda: self._start(self._reap()))

    def add_to(self, server: grpc.aio.Server) -> None:
        """Has a server answer claims of what is offered here."""
        kv_pb2_grpc.add_KVServicer_to_server(self._servicer, server)

    @property
    def num_offers(self) -> int:
        """Prompts whose KV is held here for others."""
        return len(self._leases)

    @property
    def num_fetches(self) -> int:
        """Prompts whose KV is on its way here, or staged."""
        return len(self._fetches)

    @property
    def received_bytes(self) -> int:
        """See `KVTransport`; what a process fetches from itself does not count."""
        return self._client.received_bytes

    @property
    def staged_bytes(self) -> int:
        """Room that prefetches have taken."""
        staged = (each for each in self._fetches.values() if each.done is None)
        return sum(each.num_bytes for each in staged if each.task and not _failed(each.task))

    # What a worker calls, from its own thread.

    def open(self, request_id: str, num_tokens: int) -> Ticket:
        """See `KVTransport.open`."""
        ticket = Ticket(request_id, num_tokens, address=self.address)
        self._on_loop(self._leases.open, ticket)
        return ticket

    def extend(self, ticket: Ticket, kv: KV, last: bool = False) -> None:
        """See `KVTransport.extend`."""
        self._on_loop(self._leases.extend, ticket, kv, last, self.clock())

    def prefetch(self, ticket: Ticket, sharding: Sharding | None, first: int = 0) -> None:
        """See `KVTransport.prefetch`."""
        self._on_loop(self._prefetch, ticket, sharding, first)

    def fetch(self, ticket: Ticket, sharding: Sharding | None, done: Done, first: int = 0) -> None:
        """See `KVTransport.fetch`. `done` is called on the event loop.

        It is given a LookupError if the offer has ended, PermissionError if someone else has
        claimed it, ManifestMismatch if it does not fit, TimeoutError, or ConnectionError.
        """
        self._on_loop(self._fetch, ticket, sharding, done, first)

    def release(self, ticket: Ticket) -> None:
        """See `KVTransport.release`."""
        self._on_loop(self._release, ticket)

    def close(self) -> None:
        """See `KVTransport.close`."""
        self._on_loop(self._close)

    def _on_loop(self, call: Callable[..., object], *args: Any) -> None:
        """In the order of the calls, whatever thread they come from."""
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    # The rest is on the event loop.

    def _start(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _in_thread(self, call: Callable[..., Any], *args: Any) -> Any:
        return await self._loop.run_in_executor(self._threads, call, *args)

    async def _reap(self) -> None:
        period = min(self.options.lease_s, self.options.claim_s, 4.0) / 4
        while True:
            await asyncio.sleep(period)
            self._client.forget_lost()
            for lease in self._leases.expire(self.clock()):
                id = lease.ticket.request_id
                whose = "that nobody claimed" if lease.claimant is None else "not fetched in time"
                log.warning("the KV of the request, %s, is freed", whose, extra=of_request(id))
                if self._on_expired:
                    self._on_expired(id)

    def _prefetch(self, ticket: Ticket, sharding: Sharding | None, first: int) -> None:
        fetch = self._expect(ticket, sharding, first)
        room = self.options.staged_bytes - self.staged_bytes
        known = self._is_own(ticket) or ticket.uuid in self._fetches
        if not known and fetch.num_bytes <= room:
            self._fetches[ticket.uuid] = fetch
            self._bring(fetch)

    def _fetch(self, ticket: Ticket, sharding: Sharding | None, done: Done, first: int) -> None:
        fetch = self._fetches.get(ticket.uuid)
        if fetch is None:
            fetch = self._fetches[ticket.uuid] = self._expect(ticket, sharding, first)
        elif fetch.done is not None:
            done(PermissionError(f"the KV of request {ticket.request_id!r} is being fetched"))
            return
        fetch.done, fetch.wanted = done, first
        if fetch.task is None or _failed(fetch.task):  # a prefetch may be tried again
            fetch.first = first
            self._bring(fetch)
        elif fetch.task.done():
            self._deliver(fetch)

    def _expect(self, ticket: Ticket, sharding: Sharding | None, first: int) -> _Fetch:
        num_bytes = (self.facts.num_blocks(ticket.num_tokens) - first) * self.facts.block_bytes
        claimant = Claimant(self._identity, secrets.randbits(64))
        small = num_bytes <= self.options.urgent_bytes
        return _Fetch(ticket, sharding, claimant, num_bytes, small, first)

    def _is_own(self, ticket: Ticket) -> bool:
        return ticket.address in ("", self.address)

    def _release(self, ticket: Ticket) -> None:
        if self._is_own(ticket):
            self._leases.release(ticket.uuid)
        fetch = self._fetches.get(ticket.uuid)
        if fetch is not None:
            _stop(fetch, LookupError(f"request {ticket.request_id!r} was given up"))
            if fetch.done is None:
                del self._fetches[ticket.uuid]

    def _close(self) -> None:
        for fetch in list(self._fetches.values()):
            self._release(fetch.ticket)
        for lease in self._leases:
            self._leases.release(lease.ticket.uuid)
        for task in self._tasks:
            task.cancel()
        self._client.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _bring(self, fetch: _Fetch) -> None:
        way = self._copy if self._is_own(fetch.ticket) else self._take
        fetch.task = self._loop.create_task(way(fetch))
        fetch.task.add_done_callback(lambda _: self._deliver(fetch))

    def _deliver(self, fetch: _Fetch) -> None:
        """Gives what has come, or why it has not, to the caller that asked; otherwise it stays."""
        task = fetch.task
        assert task is not None
        if not task.done():  # it was begun again
            return
        if fetch.done is None:
            if not task.cancelled():
                task.exception()  # looked at: it is not to be logged
            return
        if self._fetches.get(fetch.ticket.uuid) is not fetch:
            return
        if task.cancelled():
            result = fetch.stopped_by or ConnectionError("the transport was closed")
        elif (result := task.exception()) is None:
            if fetch.wanted < fetch.first:
                # What made the first ones needless when it was sent ahead is gone since.
                fetch.first = fetch.wanted
                self._bring(fetch)
                return
            result = task.result()[fetch.wanted - fetch.first :]
            if fetch.first:
                self._taken(fetch)
        del self._fetches[fetch.ticket.uuid]
        fetch.done(result)  # type: ignore[arg-type]

    async def _copy(self, fetch: _Fetch) -> KV:
        """From an offer of this process."""
        ticket = fetch.ticket
        lease = self._leases.claim(ticket.uuid, ticket.request_id, fetch.claimant, self.clock())
        if not lease.complete:
            raise LookupError(f"the KV of request {ticket.request_id!r} is not all there yet")
        kv = lease.kv[fetch.first :]
        if fetch.sharding is not None:
            kv = await self._in_thread(jax.device_put, kv, fetch.sharding)
            await arrived(kv)
        return kv

    async def _take(self, fetch: _Fetch) -> KV:
        """From an offer of another process."""
        wanted = Wanted(
            fetch.ticket,
            fetch.first,
            fetch.sharding,
            fetch.claimant,
            lambda: fetch.priority,
        )
        kv = await self._client.take(wanted)
        if not fetch.first:  # else those before may yet be asked for
            self._taken(fetch)
        return kv

    def _taken(self, fetch: _Fetch) -> None:
        """Nothing more will be asked for of an offer."""
        if not self._is_own(fetch.ticket):
            self._client.delivered(fetch.ticket, fetch.claimant)


def _stop(fetch: _Fetch, error: Exception) -> None:
    if fetch.task is not None:
        fetch.stopped_by = error
        fetch.task.cancel()


def _failed(task: asyncio.Task[KV]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
