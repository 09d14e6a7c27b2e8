"""What clients ask of a router: to take a request, to cancel it, and how many are in progress.

Lives on the event loop, except for `emit`, which the workers' threads call.
"""

import asyncio
import functools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence

from absl import flags

from kairos_jax.routing.dispatch import Dispatch
from kairos_jax.routing.fleet import Fleet, Full, WorkerLost, no_slot
from kairos_jax.routing.observer import Observer
from kairos_jax.routing.peer import Peer
from kairos_jax.routing.stream import Stream
from kairos_jax.worker.messages import Died, Event
from kairos_jax.worker.status import status_of
from kairos_jax.worker.worker import Worker
from schedulers.cost import CostModel
from schedulers.ledger.request import Request, Slo
from schedulers.policies.routing import ADMISSION


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    flags.DEFINE_enum(
        "admission", "none", list(ADMISSION), "Which requests are refused at arrival."
    )


class IdInUse(Exception):
    """The client's request id is that of a request in progress."""


class Router:
    """Carries requests to a prefill worker, on to a decode worker, and their tokens back. On
    colocated instances one worker is both.

    cost, admission: see `Fleet`. observers: told what becomes of requests. rejoin_s: how long a
    request waits for a worker where none can go on with it; 0: it fails at once. fleet: its
    workers. died: the first instance that failed.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        max_requests: int,
        cost: CostModel,
        clock: Callable[[], float] = time.monotonic,
        admission: str = "none",
        observers: Sequence[Observer] = (),
        rejoin_s: float = 0.0,
    ):
        self.max_requests, self.clock = max_requests, clock
        self.fleet = Fleet(cost, admission, clock)
        self.died: asyncio.Future[Died] = loop.create_future()
        self._loop, self.observers = loop, list(observers)
        self._dispatch = Dispatch(self.fleet, self.observers, self._over, loop, rejoin_s)
        self._names: set[str] = set()
        self._prefix = secrets.token_hex(4)  # of names that are made here
        self._empty = asyncio.Event()
        self._empty.set()

    # The workers.

    def connect(self, workers: Sequence[Worker]) -> None:
        """Joins workers of this process, not yet started, made with this router's `emit`."""
        now = self.clock()
        for worker in workers:
            ledger = worker.instance
            held = ledger.limits.kv_tokens
            size = ledger.limits.page_size if worker.page_keys else 0
            who = ledger.id, ledger.role, worker.post
            look = functools.partial(status_of, ledger, worker.ran)
            summary = worker.outline(ledger, now)
            self.join(Peer(*who, self.fleet.cost, summary, held, size, look))

    def join(self, peer: Peer) -> None:
        """Takes in a worker, at any time. Raises ValueError if its id is in use."""
        self.fleet.join(peer)
        self._dispatch.joined(peer)

    def leave(self, id: str, reason: str = "it has left") -> None:
        """Does without a worker; its requests go on elsewhere. An unknown id is ignored."""
        if peer := self.fleet.peers.get(id):
            self._dispatch.lose(peer, f"{peer.noun}: {reason}", alive=True)

    def emit(self, event: Event) -> None:
        """Takes an event from any thread. Nothing happens once the loop is closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_event, event)

    @property
    def peers(self) -> list[Peer]:
        """The workers, those that drain included."""
        return list(self.fleet.peers.values())

    # What clients ask.

    @property
    def streams(self) -> list[Stream]:
        """Requests in progress."""
        return list(self._dispatch.streams.values())

    @property
    def num_streams(self) -> int:
        """How many there are."""
        return len(self._dispatch.streams)

    def check_room(self, slo: Slo | None = None) -> None:
        """Raises Full if no request can be taken now. slo: of the one that is to be, if known."""
        if self.num_streams >= self.max_requests:
            self.rejected("max_requests", slo)
            raise no_slot(self.max_requests, self.fleet.wait_s())

    def rejected(self, reason: str, slo: Slo | None = None) -> None:
        """Tells the observers of a request that was not taken. reason, slo: see `Observer`."""
        for each in self.observers:
            each.rejected(reason, slo)

    def submit(self, request: Request, trace: Mapping[str, str] | None = None) -> Stream:
        """Starts a request; its id is the client's, or empty for one made here. trace: W3C headers
        of the trace that it is a part of.

        Raises:
            IdInUse, Full, WorkerLost: nothing was started.
        """
        serial = next(self._dispatch.serials)
        name = request.id or self._own_name(serial)
        if name in self._names:
            raise IdInUse(f"request_id {name!r} is in use by a request in progress")
        self.check_room(request.slo)
        try:
            self.fleet.check_admission(request)
        except Full as error:
            self.rejected(error.limit, request.slo)
            raise
        except WorkerLost:
            if not self._dispatch.rejoin_s:  # else it waits for a worker, as those in progress do
                self.rejected("no_worker", request.slo)
                raise
        stream = Stream(name, request, trace=trace or {})
        for each in self.observers:
            each.begun(stream)
        self._names.add(name)
        self._empty.clear()
        self._dispatch.start(stream, serial)
        return stream

    def _own_name(self, serial: int) -> str:
        """A name that no request in progress has, though clients choose theirs as they like."""
        name = f"{self._prefix}-{serial}"
        while name in self._names:
            name = f"{secrets.token_hex(8)}-{serial}"
        return name

    def cancel(self, stream: Stream, outcome: str = "cancelled") -> None:
        """Ends a request wherever it is. Nothing happens if it has ended. outcome: as observers are
        told.
        """
        if self._dispatch.forget(stream):
            self._dispatch.drop(stream)
            self._over(stream, outcome)

    def wait_s(self) -> float:
        """Seconds until something of what is in progress has ended, as predicted."""
        return self.fleet.wait_s()

    async def drained(self) -> None:
        """Returns when no request is in progress."""
        await self._empty.wait()

    def _over(self, stream: Stream, outcome: str) -> None:
        self._names.discard(stream.name)
        if not self.num_streams:
            self._empty.set()
        for each in self.observers:
            each.ended(stream, outcome)

    def _on_event(self, event: Event) -> None:
        self._dispatch.on_event(event)
        if isinstance(event, Died) and not self.died.done():
            self.died.set_result(event)
