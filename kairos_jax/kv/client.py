"""Takes KV that another process offers: claims it, compares its manifest, brings its parts over."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import jax
from jax.sharding import Sharding

from kairos_jax.engine.engine import KV
from kairos_jax.kv import manifest
from kairos_jax.kv.grpc_stream import Reassembly
from kairos_jax.kv.in_flight import InFlight, Priority
from kairos_jax.kv.jax_transfer import TransferPort, Unreachable
from kairos_jax.kv.leases import Claimant
from kairos_jax.kv.manifest import Facts, Manifest
from kairos_jax.kv.transport import Ticket
from kairos_jax.net.well_formed import EOF
from kairos_jax.rpc import kv_pb2 as pb
from kairos_jax.rpc import kv_pb2_grpc

log = logging.getLogger(__name__)

# Between two looks at whether arrays have come, since nothing tells of it without blocking: a part
# of what they have taken so far, within bounds.
_POLL_SHARE, _POLL_S = 1 / 16, (0.0005, 0.005)
_DELIVERED_S = 5.0

_UP = grpc.ChannelConnectivity.READY
_ERRORS = {
    grpc.StatusCode.NOT_FOUND: LookupError,
    grpc.StatusCode.FAILED_PRECONDITION: PermissionError,
    grpc.StatusCode.UNAUTHENTICATED: PermissionError,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimeoutError,
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """One fetch, of the blocks from `first` on. priority: asked for each part anew, since a
    prefetch may become urgent.
    """

    ticket: Ticket
    first: int
    sharding: Sharding | None
    claimant: Claimant
    priority: Callable[[], Priority]


@dataclass(slots=True)
class _Source:
    """A process that offers KV. in_flight: on its way from it. as_bytes: its transfer server cannot
    be reached.
    """

    channel: grpc.aio.Channel
    in_flight: InFlight
    num_takes: int = 0
    as_bytes: bool = False


class KVClient:
    """What one process takes from others. Used on one event loop.

    facts: what KV must be. port: None to have it as bytes. silence_s: fails a fetch of which
    nothing comes for so long. received_bytes: of KV so far.
    """

    def __init__(
        self,
        facts: Facts,
        channel: Callable[[str], grpc.aio.Channel],
        metadata: Sequence[tuple[str, str]],
        port: TransferPort | None,
        in_flight_bytes: int,
        silence_s: float,
        in_thread: Callable[..., Awaitable[Any]],
    ):
        self._facts, self._channel, self._metadata, self._port = facts, channel, metadata, port
        self._in_flight_bytes, self._silence_s = in_flight_bytes, silence_s
        self._in_thread = in_thread
        self.received_bytes = 0
        self._sources: dict[str, _Source] = {}  # by address
        self._telling: set[asyncio.Task] = set()

    async def take(self, wanted: Wanted) -> KV:
        """What is wanted of an offer, also of one that still grows. The owner is to be told once it
        may go.

        Raises:
            LookupError: the offer has ended.
            PermissionError: someone else has claimed it.
            ManifestMismatch: it is not the KV of this model, or has another form.
            TimeoutError, ConnectionError: it did not come.
        """
        address = wanted.ticket.address
        source = self._source(address)
        source.num_takes += 1
        try:
            if self._port is not None and not source.as_bytes:
                try:
                    return await self._take(wanted, as_bytes=False)
                except Unreachable as error:
                    log.warning("KV from %s comes as bytes from now on: %s", address, error)
                    source.as_bytes = True
            return await self._take(wanted, as_bytes=True)
        except grpc.aio.AioRpcError as error:
            kind = _ERRORS.get(error.code(), ConnectionError)
            raise kind(f"KV from {address}: {error.code().name}: {error.details()}") from error
        finally:
            source.num_takes -= 1
            self.forget_lost()

    def forget_lost(self) -> None:
        """Frees what is kept for peers from which nothing is taken and to which no channel is up:
        they may never come back. A channel goes down with its source, and after 30 minutes unused.
        """
        for address, source in list(self._sources.items()):
            if not source.num_takes and source.channel.get_state() is not _UP:
                self._forget(address)

    def delivered(self, ticket: Ticket, claimant: Claimant) -> None:
        """Tells the owner of an offer that all that will be wanted of it has come."""
        self._start(self._tell(ticket, claimant))

    def close(self) -> None:
        """Ends what is under way."""
        for address in list(self._sources):
            self._forget(address)

    def _source(self, address: str) -> _Source:
        if address not in self._sources:
            self._sources[address] = _Source(
                self._channel(address), InFlight(self._in_flight_bytes)
            )
        return self._sources[address]

    async def _take(self, wanted: Wanted, as_bytes: bool) -> KV:
        ticket = wanted.ticket
        stub = kv_pb2_grpc.KVStub(self._source(ticket.address).channel)
        request = pb.ClaimRequest(
            uuid=ticket.uuid,
            request_id=ticket.request_id,
            claimant=_claimant(wanted.claimant),
            as_bytes=as_bytes,
            first=wanted.first,
        )
        call = stub.Claim(request, metadata=self._metadata)
        try:
            told = manifest.from_proto((await self._announced(call, "manifest", wanted)).manifest)
            told.check(self._facts, ticket)
            return await self._parts(call, told, wanted)
        finally:
            call.cancel()

    async def _parts(self, call: Any, told: Manifest, wanted: Wanted) -> KV:
        """Takes all parts, each when there is room for it on the way."""
        parts: list[asyncio.Future[KV]] = []
        missing = told.num_blocks - wanted.first
        try:
            while missing:
                part = (await self._announced(call, "part", wanted)).part
                if not 0 < part.num_blocks <= missing:
                    raise ConnectionError(f"{part.num_blocks} blocks came, {missing} were missing")
                missing -= part.num_blocks
                if told.transfer_address:
                    pull = functools.partial(self._pull, call, told, part, wanted)
                    parts.append(_unwatched(self._admitted(part, wanted, pull)))
                else:
                    read = functools.partial(_read, call, told, part)
                    parcel = await self._admitted(part, wanted, read)
                    # While the next part comes in, the last one is put together.
                    parts.append(_unwatched(self._in_thread(parcel.place, wanted.sharding)))
            blocks = [block for part in await asyncio.gather(*parts) for block in part]
        finally:
            for each in parts:
                each.cancel()
        if wanted.sharding is not None:
            await arrived(blocks)
        return blocks

    async def _admitted(
        self, part: pb.Part, wanted: Wanted, take: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Takes one part when there is room for it."""
        in_flight = self._source(wanted.ticket.address).in_flight
        num_bytes = part.num_blocks * self._facts.block_bytes
        async with in_flight.admit(num_bytes, wanted.priority):
            try:
                async with asyncio.timeout(self._silence_s):
                    taken = await take()
            except TimeoutError as error:
                late = f"a part of the KV did not come within {self._silence_s:g} s"
                raise TimeoutError(late) from error
        self.received_bytes += num_bytes
        return taken

    async def _announced(self, call: Any, what: str, wanted: Wanted) -> pb.ClaimResponse:
        """What comes next. While nobody waits for the KV, its prefill may take its time."""
        reading = _unwatched(_next(call, what))
        while not reading.done():
            await asyncio.wait({reading}, timeout=self._silence_s)
            if not reading.done() and wanted.priority() is not Priority.PREFETCH:
                call.cancel()
                raise TimeoutError(f"no {what} of the KV came within {self._silence_s:g} s")
        return reading.result()

    async def _pull(self, call: Any, told: Manifest, part: pb.Part, wanted: Wanted) -> KV:
        if self._port is None:
            raise ConnectionError("a pull was offered where bytes were asked for")

        async def here(arrays: Sequence[Any]) -> None:
            await arrived(arrays, call)

        urgent = wanted.priority() is Priority.URGENT
        address, sharding = wanted.ticket.address, wanted.sharding
        return await self._port.pull(
            address, told, part.uuid, part.num_blocks, sharding, urgent, here
        )

    async def _tell(self, ticket: Ticket, claimant: Claimant) -> None:
        stub = kv_pb2_grpc.KVStub(self._source(ticket.address).channel)
        message = pb.DeliveredRequest(uuid=ticket.uuid, claimant=_claimant(claimant))
        with contextlib.suppress(grpc.aio.AioRpcError):  # the offer runs out by itself
            await stub.Delivered(message, metadata=self._metadata, timeout=_DELIVERED_S)

    def _forget(self, address: str) -> None:
        self._start(self._sources.pop(address).channel.close())
        if self._port is not None:
            self._port.drop(address)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)


def _claimant(claimant: Claimant) -> pb.Claimant:
    return pb.Claimant(identity=claimant.identity, nonce=claimant.nonce)


async def _next(call: Any, what: str) -> pb.ClaimResponse:
    response = await call.read()
    if response is EOF:
        raise ConnectionError(f"the KV's stream ended before its {what}")
    if response.WhichOneof("what") != what:
        raise ConnectionError(f"a {what} was due, and {response.WhichOneof('what')} came")
    return response


async def _read(call: Any, told: Manifest, part: pb.Part) -> Reassembly:
    parcel = Reassembly(told, part.num_blocks)
    while not parcel.complete:
        parcel.add((await _next(call, "chunk")).chunk)
    return parcel


def _unwatched(awaitable: Awaitable[Any]) -> asyncio.Future[Any]:
    """Begins it. Where something else fails first, nobody asks how it has ended."""
    future = asyncio.ensure_future(awaitable)
    future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return future


async def arrived(arrays: Sequence[Any], call: Any = None) -> None:
    """Returns when all are there; never blocks.

    call: one that the sender keeps open as a sign of life.

    Raises:
        ConnectionError: the copy failed, or the call has ended.
    """
    shortest, longest = _POLL_S
    begin = time.monotonic()
    while not all(array.is_ready() for array in arrays):
        if call is not None and call.done():
            raise ConnectionError(f"the sender of KV was lost: {await call.code()}")
        waited = time.monotonic() - begin
        await asyncio.sleep(min(max(waited * _POLL_SHARE, shortest), longest))
    try:
        jax.block_until_ready(arrays)
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(f"KV did not come over: {str(error).splitlines()[0]}") from error
