"""The step loop of one instance: drain the inbox, ask the policy, run the step, book it.

One thread owns the ledger and the engine. Messages come in through `post`, from any thread; events
go out through `emit`, which must be quick and callable from this thread.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kairos_jax.engine import KV, Engine, Token
from kairos_jax.transfer import KVTransport, Ticket
from schedulers.core import Batch, Instance, Policy, Request, Seq

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Submit:
    """A request to prefill here."""

    request: Request


@dataclass(frozen=True, slots=True)
class Handover:
    """A request whose prefill was done elsewhere; `ticket` is for its KV."""

    request: Request
    tokens: tuple[int, ...]
    first_token_at: float
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Release:
    """The decode side has the KV of this request."""

    id: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for this request any more."""

    id: str


@dataclass(frozen=True, slots=True)
class _Fetched:
    ticket: Ticket
    kv: KV | Exception


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


Message = Submit | Handover | Release | Cancel | _Fetched | _Stop


@dataclass(frozen=True, slots=True)
class Output:
    """One new token of one request. ticket: set where the request is now to be decoded elsewhere.

    begun_at, at: when its first step here began, and when this token was there, in seconds.
    """

    id: str
    token: Token
    begun_at: float
    at: float
    finish_reason: str | None = None
    ticket: Ticket | None = None


@dataclass(frozen=True, slots=True)
class Stepped:
    """All tokens of one step."""

    outputs: tuple[Output, ...]


@dataclass(frozen=True, slots=True)
class Moved:
    """The KV of this request has been written here, at `at`; the prefill side may drop it."""

    id: str
    at: float


@dataclass(frozen=True, slots=True)
class Lost:
    """This one request failed here, and is forgotten here."""

    id: str
    error: Exception


@dataclass(frozen=True, slots=True)
class Died:
    """The step loop has ended by an error; nothing on this instance will go on."""

    instance: str
    error: BaseException


Event = Stepped | Moved | Lost | Died


class Worker:
    """Drives one instance on a thread of its own."""

    def __init__(
        self,
        instance: Instance,
        policy: Policy,
        engine: Engine,
        transport: KVTransport,
        emit: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.instance, self.policy, self.engine = instance, policy, engine
        self.transport, self.emit, self.clock = transport, emit, clock
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._tickets: dict[str, Ticket] = {}
        self._thread = threading.Thread(target=self._run, name=f"worker-{instance.id}", daemon=True)

    def start(self) -> None:
        """Starts the step loop."""
        self._thread.start()

    def post(self, message: Message) -> None:
        """Puts a message into the inbox; the loop reads it between two steps."""
        self._inbox.put(message)

    def stop(self, timeout_s: float | None = None) -> None:
        """Ends the loop after the step it is at, and waits for that, `timeout_s` at most."""
        self.post(_Stop())
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            wait = True
            while self._drain(wait):
                now = self.clock()
                batch = self.policy(self.instance, now)
                wait = not batch
                if batch:
                    self._step(batch, now)
        except BaseException as error:
            log.exception("instance %s died", self.instance.id)
            self.emit(Died(self.instance.id, error))

    def _drain(self, wait: bool) -> bool:
        """Reads all messages, waiting for one if told to. False: the loop is to end."""
        try:
            message = self._inbox.get(block=wait)
            while True:
                if isinstance(message, _Stop):
                    return False
                self._receive(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return True

    def _receive(self, message: Message) -> None:
        match message:
            case Submit(request):
                self.instance.add(request)
            case Handover(request, tokens, first_token_at, ticket):
                self.instance.add(request, tokens, first_token_at)
                self._tickets[request.id] = ticket
            case Release(id):
                self.instance.release(id)
                self._forget(id)
            case Cancel(id):
                self.instance.cancel(id)
                self._forget(id)
            case _Fetched(ticket, kv):
                self._fetched(ticket, kv)

    def _step(self, batch: Batch, now: float) -> None:
        self.instance.begin(batch, now)
        for id in batch.fetch:
            self._fetch(self._tickets[id])
        if not batch.work:
            return
        work = [(self.instance.running[id], count) for id, count in batch.work.items()]
        tokens = self.engine.step(work)
        now = self.clock()
        sampled = {id: token.id for id, token in tokens.items()}
        produced = self.instance.end(batch, sampled, now)
        if produced:
            self.emit(Stepped(tuple(self._output(seq, tokens, now) for seq in produced)))

    def _output(self, seq: Seq, tokens: dict[str, Token], now: float) -> Output:
        id = seq.request.id
        ticket = None
        if id in self.instance.parked:
            kv = self.engine.read_pages(seq.pages)
            ticket = self._tickets[id] = self.transport.offer(id, seq.computed, kv)
        assert seq.begun_at is not None
        return Output(id, tokens[id], seq.begun_at, now, seq.finish_reason, ticket)

    def _fetch(self, ticket: Ticket) -> None:
        self.transport.fetch(
            ticket, self.engine.wire_sharding, lambda kv: self.post(_Fetched(ticket, kv))
        )

    def _fetched(self, ticket: Ticket, kv: KV | Exception) -> None:
        id = ticket.request_id
        # A cancelled request may have come back under the same id: its ticket is another one.
        if self._tickets.get(id) is not ticket:
            return
        self._tickets.pop(id)
        if isinstance(kv, Exception):
            self.instance.cancel(id)
            self.emit(Lost(id, kv))
            return
        seq = self.instance.fetched(id)
        self.engine.write_pages(seq.pages[: self.instance.limits.pages_for(seq.computed)], kv)
        self.emit(Moved(id, self.clock()))

    def _forget(self, id: str) -> None:
        ticket = self._tickets.pop(id, None)
        if ticket is not None:
            self.transport.release(ticket)
