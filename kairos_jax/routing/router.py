"""Requests in progress: from the workers' events to the stream that each client reads.

Lives on the event loop, except for `emit`, which the workers' threads call.
"""

import asyncio
import functools
import itertools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from absl import flags

from kairos_jax.engine.calls import wants_prompt_logprobs
from kairos_jax.kv.transport import Ticket
from kairos_jax.observe.metrics import Metrics
from kairos_jax.observe.tracing import Tracing
from kairos_jax.routing.fleet import (
    Full,
    WorkerLost,
    check_admission,
    choose_decode,
    choose_prefill,
    taking,
    wait_s,
)
from kairos_jax.routing.peer import Peer
from kairos_jax.routing.stream import Stream
from kairos_jax.worker.messages import (
    Cancel,
    Died,
    Draining,
    Event,
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
from kairos_jax.worker.page_keys import page_keys
from kairos_jax.worker.status import status_of
from kairos_jax.worker.worker import Worker
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies.routing import ADMISSION

# After so many losses a stream fails: what is lost wherever it goes may be the cause of it.
MAX_RECOVERIES = 3


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    flags.DEFINE_enum("admission", "none", list(ADMISSION), "Who is turned away early.")


class IdInUse(Exception):
    """The client's request id is that of a request in progress."""


class Router:
    """Carries requests to a prefill worker, on to a decode worker, and their tokens back. On
    colocated instances one worker is both.

    What a lost worker had, goes on at another: its prompt and the tokens so far are prefilled
    again, under a new id, so that whatever is still said of the old one is passed over.

    admission: one of `schedulers.policies.routing.ADMISSION`. metrics: what is counted of it; left
    out, its own. tracing: makes a trace of each request; None: there are none. died: the first
    instance that failed.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        max_requests: int,
        cost: CostModel,
        clock: Callable[[], float] = time.monotonic,
        admission: str = "none",
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
    ):
        self.max_requests, self.cost, self.clock = max_requests, cost, clock
        self.admission = ADMISSION[admission]
        self.died: asyncio.Future[Died] = loop.create_future()
        self._loop = loop
        # Workers may have several routers, so ids must differ from those of every other.
        self._identity, self._secret = secrets.token_hex(8), secrets.token_bytes(32)
        self._serial = itertools.count(1)
        self._peers: dict[str, Peer] = {}
        self._streams: dict[str, Stream] = {}
        self._names: set[str] = set()
        self._last_loss = "none has joined"
        self._empty = asyncio.Event()
        self._empty.set()
        self.metrics, self.tracing = metrics or Metrics(), tracing
        self.metrics.watch(self._streams, self._peers, clock)

    # Who there is.

    def connect(self, workers: Sequence[Worker]) -> None:
        """Joins workers of this process, not yet started, made with this router's `emit`."""
        now = self.clock()
        for worker in workers:
            ledger = worker.instance
            summary = worker.outline(ledger, now) if worker.outline else None
            held = ledger.limits.kv_tokens
            size = ledger.limits.page_size if worker.page_keys else 0
            who = ledger.id, ledger.role, worker.post
            look = functools.partial(status_of, ledger, worker.ran)
            self.join(Peer(*who, self.cost, summary, now, held, size, look))
        self.metrics.watch_workers(workers)

    def join(self, peer: Peer) -> None:
        """Takes in a worker, at any time. Raises ValueError if its id is in use."""
        if peer.id in self._peers:
            raise ValueError(f"peer id {peer.id!r} is in use")
        self._peers[peer.id] = peer

    def leave(self, id: str, reason: str = "it has left") -> None:
        """Does without a worker from now on; its requests go on elsewhere. Unknown ids are passed
        over.
        """
        if peer := self._peers.get(id):
            self._lose(peer, f"instance {id}: {reason}", alive=True)

    def emit(self, event: Event) -> None:
        """Takes an event from any thread. Nothing happens once the loop is closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._on_event, event)

    @property
    def peers(self) -> list[Peer]:
        """The workers, those that drain included."""
        return list(self._peers.values())

    # What clients ask.

    @property
    def streams(self) -> list[Stream]:
        """Requests in progress."""
        return list(self._streams.values())

    @property
    def num_streams(self) -> int:
        """How many there are."""
        return len(self._streams)

    def check_room(self, slo: Slo | None = None) -> None:
        """Raises Full if no request can be taken now. slo: of the one that is to be, if known."""
        if len(self._streams) >= self.max_requests:
            self.metrics.rejected("max_requests", slo)
            raise Full(
                f"{self.max_requests} requests are in progress, the most this server takes",
                "max_requests",
                wait_s(self._peers.values(), self.clock()),
            )

    def submit(self, request: Request, trace: Mapping[str, str] | None = None) -> Stream:
        """Starts a request; its id is the client's, or empty for one made here. trace: see
        `tracing.trace_of`.

        Raises:
            IdInUse, Full, WorkerLost: nothing was started.
        """
        serial = next(self._serial)
        name = request.id or f"request-{serial}"
        if name in self._names:
            raise IdInUse(f"request_id {name!r} is in use by a request in progress")
        self.check_room(request.slo)
        try:
            self._check_served()
            check_admission(request, self._peers.values(), self.admission, self.cost, self.clock())
        except (Full, WorkerLost) as error:
            reason = error.limit if isinstance(error, Full) else "no_worker"
            self.metrics.rejected(reason, request.slo)
            raise
        stream = Stream(name, request, trace=trace or {})
        if self.tracing:
            self.tracing.begun(stream)
        self._names.add(name)
        self._empty.clear()
        self._start(stream, serial)
        return stream

    def cancel(self, stream: Stream, outcome: str = "cancelled") -> None:
        """Ends a request wherever it is. Nothing happens if it has ended. outcome: as metrics are
        to count it.
        """
        if self._forget(stream):
            self._drop(stream)
            self._over(stream, outcome)

    async def drained(self) -> None:
        """Returns when no request is in progress."""
        await self._empty.wait()

    # From one worker to the next.

    def _start(self, stream: Stream, serial: int) -> None:
        """Sends a stream to prefill. Inside, ids never come back, so that a late message can never
        meet a new try.
        """
        now = self.clock()
        id = f"{self._identity}/{stream.name}#{serial}"
        stream.request = replace(stream.request, id=id, serial=serial)
        self._streams[id] = stream
        peers, request = self._taking(prefill=True), stream.rest(now, self.cost)
        shares = len(peers) > 1 and not wants_prompt_logprobs(request)
        if shares and (size := peers[0].page_size):
            # To choose by alone: workers have keys of their own.
            keys = page_keys(size, self._secret, request.prompt)
            request = replace(request, page_keys=keys)
        submit = Submit(request, stream.trace)
        peer = choose_prefill(peers, submit, self.cost, now)
        stream.peers = [peer]
        peer.submit(submit)

    def _hand_over(self, stream: Stream, ticket: Ticket) -> None:
        """Sends a stream to decode. The last of its peers has the KV; those before, what came of it
        ahead.
        """
        try:
            peers = self._taking(prefill=False)
        except WorkerLost as error:
            return self._end(stream, str(error))
        *ahead, source = stream.peers
        peer = ahead[0] if ahead and ahead[0] in peers else self._choose_decode(stream, peers)
        for other in ahead:
            if other is not peer:
                other.post(Cancel(stream.request.id))
        stream.peers = [source, peer]
        peer.hand_over(stream.handover(ticket))

    def _choose_decode(self, stream: Stream, peers: Sequence[Peer]) -> Peer:
        length = len(stream.request.prompt) + len(stream.tokens)
        return choose_decode(peers, length, stream.request.slo, self.cost, self.clock())

    def _recover(self, stream: Stream, reason: str, cause: str) -> None:
        """Goes on with a stream that its workers will not bring to its end. cause: in a word."""
        if stream.num_lost > MAX_RECOVERIES:
            return self._end(stream, f"{reason} (lost {stream.num_lost} times)")
        try:
            self._check_served()
        except WorkerLost as error:
            missing = str(error)
            return self._end(stream, missing if reason in missing else f"{reason}; {missing}")
        self._drop(stream)
        del self._streams[stream.request.id]
        self._start(stream, next(self._serial))
        self.metrics.recovered(cause)

    def _lose(self, peer: Peer, reason: str, alive: bool) -> None:
        """Does without a peer; `alive`: it is still to be told what to forget."""
        del self._peers[peer.id]
        self._last_loss = reason
        for stream in [each for each in self._streams.values() if peer in each.peers]:
            if alive:
                peer.post(Cancel(stream.request.id))
            goes_on = stream.peers[-1] is not peer
            stream.peers.remove(peer)
            # Where its KV was being fetched from the lost one, the fetch will tell how it ended.
            if not goes_on:
                stream.num_lost += 1
                self._recover(stream, reason, "handed_back" if peer.draining else "worker_lost")

    def _check_served(self) -> None:
        """Raises WorkerLost where no request could be brought to its end."""
        if any(peer.role is Role.PREFILL for peer in self._taking(prefill=True)):
            self._taking(prefill=False)

    def _taking(self, prefill: bool) -> list[Peer]:
        """The peers that take requests to prefill, or to decode. Raises WorkerLost: there is none,
        and why.
        """
        if peers := taking(self._peers.values(), prefill):
            return peers
        job = "prefills" if prefill else "decodes"
        raise WorkerLost(f"no instance that {job} takes requests ({self._last_loss})")

    def _drop(self, stream: Stream) -> None:
        """Cancels what workers may have of a stream."""
        for peer in stream.peers:
            peer.post(Cancel(stream.request.id))
        stream.peers = []

    def _end(self, stream: Stream, reason: str) -> None:
        self._drop(stream)
        if self._forget(stream):
            self._over(stream, "failed")
        stream.fail(WorkerLost(reason))

    def _over(self, stream: Stream, outcome: str) -> None:
        self.metrics.ended(stream, outcome)
        if self.tracing:
            self.tracing.ended(stream, outcome)

    def _forget(self, stream: Stream) -> bool:
        """False if it had ended."""
        if self._streams.get(stream.request.id) is not stream:
            return False
        del self._streams[stream.request.id]
        self._names.discard(stream.name)
        if not self._streams:
            self._empty.set()
        return True

    # What workers say.

    def _on_event(self, event: Event) -> None:
        match event:
            case Stepped(outputs):
                for output in outputs:
                    if stream := self._streams.get(output.id):  # else the workers have been told
                        self._on_output(stream, output)
            case Offered(id, ticket):
                if stream := self._streams.get(id):
                    self._on_offered(stream, ticket)
            case Moved(id, at):
                if stream := self._streams.get(id):
                    self._on_moved(stream, at)
            case Lost(id, error):
                if stream := self._streams.get(id):
                    stream.num_lost += 1
                    self._recover(stream, f"the KV transfer failed: {error}", "transfer_failed")
            case Returned(id, ticket):
                if stream := self._streams.get(id):
                    self._on_returned(stream, ticket)
            case _:
                if peer := self._peers.get(event.instance):
                    self._on_peer(peer, event)

    def _on_peer(self, peer: Peer, event: Outlined | Draining | Died) -> None:
        match event:
            case Outlined(_, summary, num_received):
                peer.update(summary, num_received, self.clock())
            case Draining(instance):
                peer.draining = True
                self._last_loss = f"instance {instance} is draining"
            case Died(instance, error):
                if not peer.draining:
                    self.metrics.lost(peer.role)
                self._lose(peer, f"instance {instance} failed: {error}", alive=False)
                if not self.died.done():
                    self.died.set_result(event)

    def _on_output(self, stream: Stream, output: Output) -> None:
        last_at = stream.last_token_at
        stream.put(output)
        if last_at is None:
            self.metrics.first_token(stream)
        else:
            self.metrics.gaps.add(output.at - last_at)
        if output.ticket is not None:
            self._hand_over(stream, output.ticket)
        elif output.finish_reason:
            for peer in stream.peers[:-1]:  # where it was to go on
                peer.post(Cancel(stream.request.id))
            self._forget(stream)
            self._over(stream, output.finish_reason)

    def _on_offered(self, stream: Stream, ticket: Ticket) -> None:
        """Its KV may go ahead of it to where it will be decoded."""
        if peers := taking(self._peers.values(), prefill=False):
            peer = self._choose_decode(stream, peers)
            stream.peers.insert(0, peer)
            peer.post(Prefetch(ticket, stream.request.prompt))

    def _on_returned(self, stream: Stream, ticket: Ticket | None) -> None:
        """Goes on elsewhere: with its KV, if who offers that is still there."""
        if ticket is None or len(stream.peers) == 1:
            return self._recover(stream, "the instance that had it is draining", "handed_back")
        stream.peers.pop()  # which has forgotten it
        self._hand_over(stream, ticket)

    def _on_moved(self, stream: Stream, at: float) -> None:
        if stream.moved_at is None:
            stream.moved_at = at
        # Those before the last had its KV until now, save for one that was lost meanwhile.
        *before, last = stream.peers
        for peer in before:
            peer.post(Release(stream.request.id))
        stream.peers = [last]
