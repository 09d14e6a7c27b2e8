"""The worker's side of the wire: the gRPC service to which routers attach.

A worker knows nothing of routers. This service remembers who sent which request, brings each event
to the router whom it concerns, and cancels what a router leaves behind. It lives on the event loop,
except for `emit`, which the worker's threads call.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from kairos_jax.net.heartbeat import Pulse, first_of
from kairos_jax.observe.worker_spans import WorkerSpans
from kairos_jax.rpc import internal_pb2 as pb
from kairos_jax.rpc import internal_pb2_grpc
from kairos_jax.worker import codec
from kairos_jax.worker.messages import (
    Cancel,
    Died,
    Draining,
    Event,
    Handover,
    Lost,
    Moved,
    Offered,
    Outlined,
    Output,
    Prefetch,
    Release,
    Returned,
    Stepped,
    Submit,
)
from kairos_jax.worker.status import status_of
from kairos_jax.worker.worker import Worker
from schedulers.ledger.request import Request

log = logging.getLogger(__name__)

# Events that a router may be behind: minutes of them, or a few hundred MB at the worst.
MAX_BEHIND = 10_000


class _Refused(Exception):
    """Why a router's call is ended."""

    def __init__(self, code: grpc.StatusCode, reason: str):
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True, slots=True)
class _Pong:
    pass


@dataclass(frozen=True, slots=True)
class _End:
    """Nothing follows."""


@dataclass(eq=False, slots=True)
class _Line:
    """A router that is attached. events: what it is still to be told. requests: its requests here,
    and of them `ahead`, whose KV alone is announced. posts: of those that no outline has counted
    yet, which of all posts each was.
    """

    router: str
    max_behind: int
    events: asyncio.Queue[Event | _Pong | _End] = field(default_factory=asyncio.Queue)
    requests: set[str] = field(default_factory=set)
    ahead: set[str] = field(default_factory=set)
    posts: deque[int] = field(default_factory=deque)
    num_counted: int = 0
    behind: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, event: Event | _Pong | _End) -> None:
        """Puts an event into its queue; where that is full, the line is given up."""
        if self.events.qsize() >= self.max_behind:
            self.behind.set()
        else:
            self.events.put_nowait(event)

    def count(self, num_received: int) -> int:
        """How many of its own requests are among the first so many that the worker received."""
        while self.posts and self.posts[0] <= num_received:
            self.posts.popleft()
            self.num_counted += 1
        return self.num_counted


class Attachments(internal_pb2_grpc.WorkerServicer):
    """Answers UNAVAILABLE until `open`, and again from `drain` on.

    stuck_s: a step that takes so much longer than predicted has hung: pings are not answered then.
    hang_s: a router from whom nothing comes for so long is dropped. spans: what is added to the
    traces of requests; None: nothing.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        stuck_s: float = 30.0,
        hang_s: float = 10.0,
        max_behind: int = MAX_BEHIND,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.stuck_s, self.hang_s, self.max_behind, self.clock = stuck_s, hang_s, max_behind, clock
        self.died: asyncio.Future[Died] = loop.create_future()
        self.draining = False
        self.spans: WorkerSpans | None = None
        self._loop = loop
        self._lines: set[_Line] = set()
        self._line_of: dict[str, _Line] = {}
        self._num_posted = 0
        self._worker: Worker | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    def open(self, worker: Worker, welcome: codec.Welcome) -> None:
        """Takes routers for a worker that is not started yet, and was made with this `emit`."""
        if worker.outline is None:
            raise ValueError(f"worker {welcome.instance!r} must have an outline, for its routers")
        now = self.clock()
        summary = worker.outline(worker.instance, now)
        self._outlined, self._outlined_at = Outlined(welcome.instance, summary, 0), now
        self._worker, self._welcome = worker, welcome

    def emit(self, event: Event) -> None:
        """Takes an event from any thread. Nothing happens once the loop is closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_event, event)

    @property
    def num_requests(self) -> int:
        """Requests that routers have here."""
        return len(self._line_of)

    @property
    def num_routers(self) -> int:
        """Routers that are attached."""
        return len(self._lines)

    async def drained(self) -> None:
        """Returns when no router has a request here."""
        await self._empty.wait()

    def drain(self) -> None:
        """Takes no new routers, and tells those that are attached at once: the worker itself may
        be in a long step.
        """
        self.draining = True
        for line in self._lines:
            line.tell(Draining(self._welcome.instance))

    def close(self) -> None:
        """Ends each router's call once all events are with it."""
        self.draining = True
        for line in self._lines:
            line.tell(_End())

    async def Attach(self, request_iterator: Any, context: Any) -> None:
        """See internal.proto."""
        line = None
        try:
            hello = await context.read()
            line = self._admit(hello)
            log.info("router %s attached", line.router)
            await context.write(codec.encode_welcome(self._welcome))
            pulse = Pulse(self.hang_s / 4, self.hang_s)
            await first_of(
                self._read(line, context, pulse),
                self._write(line, context),
                self._too_slow(line),
                pulse.lost(),
            )
        except _Refused as error:
            await self._end(line, context, error.code, error)
        except TimeoutError as error:
            await self._end(line, context, grpc.StatusCode.DEADLINE_EXCEEDED, error)
        except ValueError as error:
            await self._end(line, context, grpc.StatusCode.INVALID_ARGUMENT, error)
        finally:
            # Where the router died or went away, this task was cancelled.
            if line:
                self._leave(line)

    # A router's call.

    def _admit(self, hello: Any) -> _Line:
        unavailable = grpc.StatusCode.UNAVAILABLE
        if self.draining:
            raise _Refused(unavailable, "the worker is draining")
        if self._worker is None:
            raise _Refused(unavailable, "the worker is starting")
        if not self._goes_on():
            raise _Refused(unavailable, "the worker's step loop has ended, or hangs in a step")
        if hello is codec.EOF or hello.WhichOneof("kind") != "hello":
            raise _Refused(grpc.StatusCode.FAILED_PRECONDITION, "the first message must be a Hello")
        if hello.hello.version != codec.VERSION:
            raise _Refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"version must be {codec.VERSION}, as of this worker, got {hello.hello.version}",
            )
        line = _Line(hello.hello.router, self.max_behind)
        # As it was when last told; what was sent here since is in the next one.
        waited_s = self.clock() - self._outlined_at
        summary = self._outlined.summary
        summary = replace(summary, free_s=max(summary.free_s - waited_s, 0.0))
        line.tell(replace(self._outlined, summary=summary, num_received=0))
        self._lines.add(line)
        return line

    async def _read(self, line: _Line, context: Any, pulse: Pulse) -> None:
        while (sent := await context.read()) is not codec.EOF:
            pulse.heard()
            if sent.WhichOneof("kind") != "ping":
                self._take(line, sent)
            elif self._goes_on():
                line.tell(_Pong())

    async def _write(self, line: _Line, context: Any) -> None:
        while not isinstance(event := await line.events.get(), _End):
            if isinstance(event, _Pong):
                assert self._worker is not None
                status = status_of(self._worker.instance, self._worker.ran)
                await context.write(codec.encode_pong(status))
            else:
                await context.write(codec.encode_event(event, self.clock()))

    async def _too_slow(self, line: _Line) -> None:
        await line.behind.wait()
        raise _Refused(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"the router has read too slowly: it is {self.max_behind} events behind",
        )

    async def _end(
        self, line: _Line | None, context: Any, code: grpc.StatusCode, error: Exception
    ) -> None:
        if line:
            self._leave(line)
            log.error("router %s is dropped: %s", line.router, error)
        await context.abort(code, str(error))

    def _goes_on(self) -> bool:
        """Whether the step loop does, as far as can be seen from here."""
        assert self._worker is not None
        # Minus infinity when no step is under way. One read: the worker's thread writes it.
        until = self._worker.instance.busy_until
        return not self.died.done() and (until < 0 or self.clock() - until < self.stuck_s)

    # From a router to the worker.

    def _take(self, line: _Line, sent: pb.ToWorker) -> None:
        assert self._worker is not None
        message = codec.decode_message(sent, self.clock())
        match message:
            case Submit(request) | Handover(request=request):
                self._check(request)
                if request.id in line.ahead:
                    line.ahead.discard(request.id)
                else:
                    self._know(request.id, line)
                if self.spans:
                    self.spans.took(message)
                self._num_posted += 1
                line.posts.append(self._num_posted)
            case Prefetch(ticket):
                self._know(ticket.request_id, line)
                line.ahead.add(ticket.request_id)
            case Release(id) | Cancel(id):
                if not self._forget(id, line):
                    return  # it has ended here meanwhile, or was never this router's
        self._worker.post(message)

    def _know(self, id: str, line: _Line) -> None:
        """Raises ValueError for an id that would end the step loop."""
        if id in self._line_of:
            raise ValueError(f"request id {id!r} is in use here")
        line.requests.add(id)
        self._line_of[id] = line
        self._empty.clear()

    def _check(self, request: Request) -> None:
        """Raises ValueError for what would end the step loop."""
        if request.max_length > (most := self._welcome.limits.max_context):
            raise ValueError(
                f"request {request.id!r}: prompt and max_tokens together must be at most {most} "
                f"tokens, got {request.max_length}"
            )

    def _leave(self, line: _Line) -> None:
        """The router is gone: nobody waits for its requests any more."""
        if line not in self._lines:
            return
        assert self._worker is not None
        self._lines.discard(line)
        for id in sorted(line.requests):
            self._forget(id, line)
            self._worker.post(Cancel(id))

    def _forget(self, id: str, line: _Line) -> bool:
        """False if the request is not one of this router's."""
        if self._line_of.get(id) is not line:
            return False
        del self._line_of[id]
        line.requests.discard(id)
        line.ahead.discard(id)
        if self.spans:
            self.spans.dropped(id)
        if not self._line_of:
            self._empty.set()
        return True

    # From the worker to the routers.

    def _on_event(self, event: Event) -> None:
        if self.spans:
            self.spans.said(event)
        match event:
            case Stepped(outputs):
                self._on_outputs(outputs)
            case Offered(id) | Moved(id) | Lost(id) | Returned(id):
                if line := self._line_of.get(id):
                    line.tell(event)
                    if isinstance(event, Lost | Returned):
                        self._forget(id, line)
            case Outlined():
                self._outlined, self._outlined_at = event, self.clock()
                for line in self._lines:
                    line.tell(replace(event, num_received=line.count(event.num_received)))
            case Died() | Draining():
                for line in self._lines:
                    line.tell(event)
                if isinstance(event, Died) and not self.died.done():
                    self.died.set_result(event)

    def _on_outputs(self, outputs: tuple[Output, ...]) -> None:
        by_line: dict[_Line, list[Output]] = {}
        for output in outputs:
            if line := self._line_of.get(output.id):  # else its router is gone
                by_line.setdefault(line, []).append(output)
                if output.finish_reason:
                    self._forget(output.id, line)
        for line, own in by_line.items():
            line.tell(Stepped(tuple(own)))
