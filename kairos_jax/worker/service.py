"""The worker's side of the wire: the gRPC service to which routers attach.

A worker knows nothing of routers. This service remembers who sent which request, brings each event
to the router that it concerns, and cancels what a router leaves behind. It lives on the event loop,
except for `emit`, which the worker's threads call.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import grpc

from kairos_jax.net.heartbeat import Heartbeat, first_of
from kairos_jax.net.well_formed import EOF
from kairos_jax.rpc import internal_pb2_grpc
from kairos_jax.worker import codec
from kairos_jax.worker.codec import For, Sender
from kairos_jax.worker.messages import (
    Cancel,
    Died,
    Draining,
    Event,
    Failed,
    Handover,
    Hello,
    Lost,
    Message,
    Outlined,
    Output,
    Ping,
    Pong,
    Prefetch,
    Recall,
    Release,
    Returned,
    Stepped,
    Submit,
    Welcome,
)
from kairos_jax.worker.status import status_of
from kairos_jax.worker.unseen import Receipts
from kairos_jax.worker.worker import Worker
from schedulers.ledger.instance import Role

log = logging.getLogger(__name__)

# Why a router is refused for a moment: it tries again soon.
STARTING = "the worker is starting"
# Events that a router may be behind: minutes of them, or a few hundred MB at the worst.
MAX_BEHIND = 10_000


class _Refused(Exception):
    """Why a router's call is ended."""

    def __init__(self, code: grpc.StatusCode, reason: str):
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True, slots=True)
class _Pinged:
    """A ping is to be answered, by the state at the time of the answer."""


@dataclass(frozen=True, slots=True)
class _End:
    """Nothing follows."""


@dataclass(eq=False, slots=True)
class _Attached:
    """A router that is attached. events: what it is still to be told. requests: its requests here,
    and of them `ahead`, whose KV alone is announced.
    """

    name: str
    max_behind: int
    events: asyncio.Queue[Event | _Pinged | _End] = field(default_factory=asyncio.Queue)
    requests: set[str] = field(default_factory=set)
    ahead: set[str] = field(default_factory=set)
    behind: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, event: Event | _Pinged | _End) -> None:
        """Puts an event into its queue; where that is full, the router is given up."""
        if self.events.qsize() >= self.max_behind:
            self.behind.set()
        else:
            self.events.put_nowait(event)


class Spans(Protocol):
    """Is told what goes into a worker and comes out of it: see `observe.worker_spans`."""

    def took(self, message: Submit | Handover) -> None: ...

    def said(self, event: Event) -> None: ...

    def dropped(self, id: str) -> None: ...


class WorkerService(internal_pb2_grpc.WorkerServicer):
    """Answers UNAVAILABLE until `open`, and again from `drain` on.

    stuck_s: a step that takes so much longer than predicted has hung: pings are not answered then.
    hang_s: a router from which nothing comes for so long is dropped. spans: what is added to the
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
        self.spans: Spans | None = None
        self._loop = loop
        self._routers: set[_Attached] = set()
        self._router_of: dict[str, _Attached] = {}
        self._receipts = Receipts()
        self._worker: Worker | None = None
        self.linked = asyncio.Event()  # a router has been here
        self._empty = asyncio.Event()
        self._empty.set()

    def open(self, worker: Worker, welcome: Welcome) -> None:
        """Takes routers for a worker that is not started yet, and was made with this `emit`."""
        summary = worker.outline(worker.instance, self.clock())
        self._outlined = Outlined(welcome.instance, summary, 0)
        self._worker, self._welcome = worker, welcome

    def emit(self, event: Event) -> None:
        """Takes an event from any thread. Nothing happens once the loop is closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_event, event)

    @property
    def num_requests(self) -> int:
        """Requests that routers have here."""
        return len(self._router_of)

    @property
    def num_routers(self) -> int:
        """Routers that are attached."""
        return len(self._routers)

    async def drained(self) -> None:
        """Returns when no router has a request here."""
        await self._empty.wait()

    def drain(self) -> None:
        """Takes no new routers, and tells those that are attached at once: the worker itself may
        be in a long step.
        """
        self.draining = True
        for router in self._routers:
            router.tell(Draining(self._welcome.instance))

    def close(self) -> None:
        """Ends each router's call once all events are with it."""
        self.draining = True
        for router in self._routers:
            router.tell(_End())

    async def Attach(self, request_iterator: Any, context: Any) -> None:
        """See internal.proto."""
        router = None
        try:
            router = self._admit(await context.read())
            log.info("router %s attached", router.name)
            await context.write(codec.encode(self._welcome, 0.0))
            heartbeat = Heartbeat(self.hang_s / 4, self.hang_s)
            await first_of(
                self._read(router, context, heartbeat),
                self._write(router, context),
                self._too_slow(router),
                heartbeat.lost(),
            )
        except _Refused as error:
            await self._end(router, context, error.code, error)
        except TimeoutError as error:
            await self._end(router, context, grpc.StatusCode.DEADLINE_EXCEEDED, error)
        except ValueError as error:
            await self._end(router, context, grpc.StatusCode.INVALID_ARGUMENT, error)
        finally:
            # Where the router died or went away, this task was cancelled.
            if router:
                self._leave(router)

    # A router's call.

    def _admit(self, first: Any) -> _Attached:
        unavailable = grpc.StatusCode.UNAVAILABLE
        if self.draining:
            raise _Refused(unavailable, "the worker is draining")
        if self._worker is None:
            raise _Refused(unavailable, STARTING)
        if not self._goes_on():
            raise _Refused(unavailable, "the worker's step loop has ended, or hangs in a step")
        unfit = grpc.StatusCode.FAILED_PRECONDITION
        hello = None if first is EOF else codec.decode(first, Sender())
        if not isinstance(hello, Hello):
            raise _Refused(unfit, "the first message must be a Hello")
        try:
            codec.check_version(hello.version, hello.oldest)
        except ValueError as error:
            raise _Refused(unfit, str(error)) from error
        router = _Attached(hello.router, self.max_behind)
        # As it was when last told; what was sent here since is in the next one.
        router.tell(replace(self._outlined, num_received=0))
        self._routers.add(router)
        self._receipts.join(router)
        self.linked.set()
        return router

    async def _read(self, router: _Attached, context: Any, heartbeat: Heartbeat) -> None:
        while (sent := await context.read()) is not EOF:
            heartbeat.heard()
            match codec.decode(sent, Sender(self.clock())):
                case Ping():
                    if self._goes_on():
                        router.tell(_Pinged())
                case Hello():
                    raise ValueError("a Hello is the first message, and no other")
                case message:
                    self._take(router, message)

    async def _write(self, router: _Attached, context: Any) -> None:
        while not isinstance(event := await router.events.get(), _End):
            if isinstance(event, _Pinged):
                assert self._worker is not None
                said = Pong(status_of(self._worker.instance, self._worker.ran))
            else:
                said = event
            await context.write(codec.encode(said, self.clock()))

    async def _too_slow(self, router: _Attached) -> None:
        await router.behind.wait()
        raise _Refused(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"the router has read too slowly: it is {self.max_behind} events behind",
        )

    async def _end(
        self, router: _Attached | None, context: Any, code: grpc.StatusCode, error: Exception
    ) -> None:
        if router:
            self._leave(router)
            log.error("router %s is dropped: %s", router.name, error)
        await context.abort(code, str(error))

    def _goes_on(self) -> bool:
        """Whether the step loop does, as far as can be seen from here."""
        assert self._worker is not None
        # Minus infinity when no step is under way. One read: the worker's thread writes it.
        until = self._worker.instance.busy_until
        return not self.died.done() and (until < 0 or self.clock() - until < self.stuck_s)

    # From a router to the worker.

    def _take(self, router: _Attached, message: Message) -> None:
        assert self._worker is not None
        match message:
            case Submit(request) | Handover(request=request):
                self._check(message)
                if request.id in router.ahead:
                    router.ahead.discard(request.id)
                else:
                    self._know(request.id, router)
                if self.spans:
                    self.spans.took(message)
                self._receipts.posted(router)
            case Prefetch(ticket):
                self._check(message)
                self._know(ticket.request_id, router)
                router.ahead.add(ticket.request_id)
            case Release(id) | Cancel(id):
                if not self._forget(id, router):
                    return  # it has ended here, or was never this router's
            case Recall(id) if id not in router.requests:
                return
        self._worker.post(message)

    def _know(self, id: str, router: _Attached) -> None:
        """Raises ValueError for an id that would end the step loop."""
        if id in self._router_of:
            raise ValueError(f"request id {id!r} is in use here")
        router.requests.add(id)
        self._router_of[id] = router
        self._empty.clear()

    def _check(self, message: Submit | Handover | Prefetch) -> None:
        """Raises ValueError for a message that would end the step loop."""
        role, kind = self._welcome.role, type(message).__name__
        other = Role.DECODE if isinstance(message, Submit) else Role.PREFILL
        if role is other and not self._welcome.fluid:
            raise ValueError(f"a {kind} is not for a worker whose role is {role.value!r}")
        if isinstance(message, Prefetch):
            return
        request = message.request
        if isinstance(message, Handover) and not message.tokens:
            raise ValueError(f"request {request.id!r}: a Handover must have at least 1 token")
        if request.max_length > (most := self._welcome.limits.max_context):
            raise ValueError(
                f"request {request.id!r}: prompt and max_tokens together must be at most {most} "
                f"tokens, got {request.max_length}"
            )

    def _leave(self, router: _Attached) -> None:
        """The router is gone: nobody waits for its requests any more."""
        if router not in self._routers:
            return
        assert self._worker is not None
        self._routers.discard(router)
        self._receipts.leave(router)
        for id in sorted(router.requests):
            self._forget(id, router)
            self._worker.post(Cancel(id))

    def _forget(self, id: str, router: _Attached) -> bool:
        """False if the request is not one of this router's."""
        if self._router_of.get(id) is not router:
            return False
        del self._router_of[id]
        router.requests.discard(id)
        router.ahead.discard(id)
        if self.spans:
            self.spans.dropped(id)
        if not self._router_of:
            self._empty.set()
        return True

    # From the worker to the routers.

    def _on_event(self, event: Event) -> None:
        if self.spans:
            self.spans.said(event)
        match codec.address_of(event):
            case For.OUTPUTS, outputs:
                self._on_outputs(outputs)
            case For.REQUEST, id:
                if router := self._router_of.get(id):
                    router.tell(event)
                    if isinstance(event, Lost | Failed | Returned):
                        self._forget(id, router)
            case For.INSTANCE, _:
                self._on_instance(event)

    def _on_instance(self, event: Event) -> None:
        if isinstance(event, Outlined):
            self._outlined = event
            self._receipts.count(event.num_received)
            for router in self._routers:
                own = replace(event, num_received=self._receipts.of(router))
                if late := event.summary.late:
                    late = tuple(id for id in late if id in router.requests)
                    own = replace(own, summary=replace(event.summary, late=late))
                router.tell(own)
            return
        for router in self._routers:
            if isinstance(event, Died):
                own = tuple(id for id in event.aboard or () if id in router.requests)
                router.tell(replace(event, aboard=own))
            else:
                router.tell(event)
        if isinstance(event, Died) and not self.died.done():
            self.died.set_result(event)

    def _on_outputs(self, outputs: tuple[Output, ...]) -> None:
        by_router: dict[_Attached, list[Output]] = {}
        for output in outputs:
            if router := self._router_of.get(output.id):  # else its router is gone
                by_router.setdefault(router, []).append(output)
                if output.finish_reason:
                    self._forget(output.id, router)
        for router, own in by_router.items():
            router.tell(Stepped(tuple(own)))
