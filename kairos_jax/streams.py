"""Requests in progress: from the workers' events to the stream that each client reads.

Lives on the event loop, except for `emit`, which the workers' threads call.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

from kairos_jax.messages import (
    Cancel,
    Died,
    Event,
    Handover,
    Lost,
    Moved,
    Outlined,
    Output,
    Release,
    Stepped,
    Submit,
)
from kairos_jax.peers import Peer, choose_decode, choose_prefill
from kairos_jax.worker import Worker
from schedulers.core import Role
from schedulers.cost import CostModel
from schedulers.request import Request


class IdInUse(Exception):
    """The client's request id is that of a request in progress."""


class Full(Exception):
    """As many requests are in progress as the server takes."""


class WorkerLost(Exception):
    """The instance that served this request failed."""


@dataclass(slots=True)
class Stream:
    """One request's way through the server. Times are seconds on the workers' clock.

    peers: where it was sent to, first to last.
    """

    name: str
    request: Request
    peers: list[Peer]
    begun_at: float | None = None
    first_token_at: float | None = None
    moved_at: float | None = None
    last_token_at: float | None = None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    _queue: asyncio.Queue[Output | Exception] = field(default_factory=asyncio.Queue)

    async def __aiter__(self) -> AsyncIterator[Output]:
        """The outputs, ending with the one that has a finish_reason. Raises WorkerLost."""
        while True:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish_reason:
                return

    def put(self, output: Output) -> None:
        """Books an output and passes it on to the reader."""
        if self.begun_at is None:
            self.begun_at = output.begun_at
        if self.first_token_at is None:
            self.first_token_at = output.at
        self.last_token_at = output.at
        self.tokens.append(output.token.id)
        self.finish_reason = output.finish_reason
        self._queue.put_nowait(output)

    def fail(self, error: Exception) -> None:
        """Ends the stream by an error that its reader is raised."""
        self._queue.put_nowait(error)


class Router:
    """Carries requests to a prefill worker, on to a decode worker, and their tokens back. On
    colocated instances one worker is both.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        max_requests: int,
        cost: CostModel,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.max_requests, self.cost, self.clock = max_requests, cost, clock
        self.died: asyncio.Future[Died] = loop.create_future()
        self._loop = loop
        self._serial = itertools.count(1)
        self._streams: dict[str, Stream] = {}
        self._names: set[str] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    def connect(self, workers: Sequence[Worker]) -> None:
        """Names the workers, not yet started; they were made with this router's `emit`."""
        now = self.clock()
        peers = [Peer(worker, self.cost, now) for worker in workers]
        self._peers = {peer.id: peer for peer in peers}
        self._prefill = [peer for peer in peers if peer.role is not Role.DECODE]
        self._decode = [peer for peer in peers if peer.role is Role.DECODE]

    def emit(self, event: Event) -> None:
        """Takes an event from any thread. Nothing happens once the loop is closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_event, event)

    @property
    def num_streams(self) -> int:
        """Requests in progress."""
        return len(self._streams)

    def check_room(self) -> None:
        """Raises Full if no request can be taken now."""
        if len(self._streams) >= self.max_requests:
            raise Full(f"{self.max_requests} requests are in progress, the most this server takes")

    def submit(self, request: Request) -> Stream:
        """Starts a request; its id is the client's, or empty for one made here.

        Raises:
            IdInUse, Full: nothing was started.
        """
        serial = next(self._serial)
        name = request.id or f"request-{serial}"
        if name in self._names:
            raise IdInUse(f"request_id {name!r} is in use by a request in progress")
        self.check_room()
        if self.died.done():
            raise WorkerLost(f"instance {self.died.result().instance} failed")
        # Inside, ids never come back, so that a late message can never meet a new request.
        request = replace(request, id=f"{name}#{serial}", serial=serial)
        submit = Submit(request)
        peer = choose_prefill(self._prefill, submit, self.cost, self.clock())
        stream = Stream(name, request, [peer])
        self._streams[request.id] = stream
        self._names.add(name)
        self._empty.clear()
        peer.submit(submit)
        return stream

    def cancel(self, stream: Stream) -> None:
        """Ends a request wherever it is. Nothing happens if it has ended."""
        if self._forget(stream.request.id):
            for peer in stream.peers:
                peer.post(Cancel(stream.request.id))

    async def drained(self) -> None:
        """Returns when no request is in progress."""
        await self._empty.wait()

    def _forget(self, id: str) -> Stream | None:
        stream = self._streams.pop(id, None)
        if stream:
            self._names.discard(stream.name)
        if not self._streams:
            self._empty.set()
        return stream

    def _on_event(self, event: Event) -> None:
        match event:
            case Stepped(outputs):
                for output in outputs:
                    self._on_output(output)
            case Moved(id, at):
                if stream := self._streams.get(id):  # else a cancel has dropped the KV
                    stream.moved_at = at
                    stream.peers[0].post(Release(id))
            case Lost(id, error):
                if stream := self._streams.get(id):
                    self.cancel(stream)
                    stream.fail(WorkerLost(f"the KV transfer failed: {error}"))
            case Outlined(instance, summary, num_received):
                self._peers[instance].update(summary, num_received, self.clock())
            case Died(instance, error):
                self._on_died(event, f"instance {instance} failed: {error}")

    def _on_output(self, output: Output) -> None:
        stream = self._streams.get(output.id)
        if stream is None:
            return  # cancelled; the workers have been told
        stream.put(output)
        if output.ticket is not None:
            handover = Handover(stream.request, tuple(stream.tokens), output.at, output.ticket)
            peer = choose_decode(self._decode, handover, self.cost, self.clock())
            stream.peers.append(peer)
            peer.hand_over(handover)
        elif output.finish_reason:
            self._forget(output.id)

    def _on_died(self, event: Died, reason: str) -> None:
        for id in list(self._streams):
            stream = self._forget(id)
            assert stream is not None
            stream.fail(WorkerLost(reason))
        if not self.died.done():
            self.died.set_result(event)
