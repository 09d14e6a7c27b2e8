"""The step loop of one instance: drain the inbox, ask the policy, run the step, book it.

One thread owns the ledger, another runs the engine's steps. While a step is under way the first
takes new requests in, and begins to fetch their KV; whatever touches pages or the engine waits for
the step's end, so the engine is used by one thread at a time. Messages come in through `post`, from
any thread; events go out through `emit`, which must be quick and callable from this thread.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kairos_jax.engine import KV, Engine, Token
from kairos_jax.messages import (
    Cancel,
    Died,
    Event,
    Handover,
    Lost,
    Message,
    Moved,
    Outlined,
    Output,
    Release,
    Stepped,
    Submit,
)
from kairos_jax.transfer import KVTransport, Ticket
from schedulers.core import Batch, Instance, Policy, during_step, fetchable
from schedulers.request import Seq
from schedulers.routing import Summary

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Fetched:
    ticket: Ticket
    kv: KV | Exception


@dataclass(frozen=True, slots=True)
class _Ended:
    """The step under way is over."""

    tokens: dict[str, Token] | BaseException


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Item = Message | _Fetched | _Ended | _Stop
_Work = Sequence[tuple[Seq, int]]


class Worker:
    """Drives one instance on two threads of its own.

    outline: sums up the ledger for a router that has a choice; None if there is none.
    """

    def __init__(
        self,
        instance: Instance,
        policy: Policy,
        engine: Engine,
        transport: KVTransport,
        emit: Callable[[Event], None],
        outline: Callable[[Instance, float], Summary] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.instance, self.policy, self.engine = instance, policy, engine
        self.transport, self.emit, self.outline, self.clock = transport, emit, outline, clock
        self._inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._kept: deque[_Item] = deque()  # read during a step, to be handled after it
        self._steps: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._num_received = 0
        self._tickets: dict[str, Ticket] = {}  # of KV that is to be fetched
        self._offers: dict[str, Ticket] = {}  # of KV that was copied out of this pool
        self._thread = _thread(self._run, f"worker-{instance.id}")
        self._step_thread = _thread(self._run_steps, f"steps-{instance.id}")

    def start(self) -> None:
        """Starts the step loop."""
        self._step_thread.start()
        self._thread.start()

    def post(self, message: Message) -> None:
        """Puts a message into the inbox."""
        self._inbox.put(message)

    def stop(self, timeout_s: float | None = None) -> None:
        """Ends the loop after the step it is at, and waits for that, `timeout_s` at most."""
        self._inbox.put(_Stop())
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            wait = True
            while self._drain(wait):
                now = self.clock()
                batch = self.policy(self.instance, now)
                wait = not batch
                if batch:
                    self._begin(batch, now)
                if self.outline:
                    # With the step under way booked: what is sent meanwhile comes after it.
                    summary = self.outline(self.instance, now)
                    self.emit(Outlined(self.instance.id, summary, self._num_received))
                if batch.work:
                    self._step(batch)
        except BaseException as error:
            log.exception("instance %s died", self.instance.id)
            self.emit(Died(self.instance.id, error))
        finally:
            self._steps.put(None)

    def _run_steps(self) -> None:
        """Runs what `_step` hands over, one step at a time, on the thread that is there for it."""
        while (work := self._steps.get()) is not None:
            try:
                tokens = self.engine.step(work)
            except BaseException as error:
                tokens = error
            self._inbox.put(_Ended(tokens))

    def _drain(self, wait: bool) -> bool:
        """Reads all messages, waiting for one if told to. False: the loop is to end."""
        while self._kept or wait or not self._inbox.empty():
            message = self._kept.popleft() if self._kept else self._inbox.get()
            if isinstance(message, _Stop):
                return False
            self._receive(message)
            wait = False
        return True

    def _receive(self, message: _Item) -> None:
        match message:
            case Submit(request):
                self._num_received += 1
                self.instance.add(request)
            case Handover(request, tokens, first_token_at, ticket):
                self._num_received += 1
                self.instance.add(request, len(tokens), first_token_at, tokens)
                self._tickets[request.id] = ticket
            case Release(id):
                self.instance.release(id)
                self._drop_offer(id)
            case Cancel(id):
                self._forget(id)
            case _Fetched(ticket, kv):
                self._fetched(ticket, kv)

    # One turn of the loop.

    def _begin(self, batch: Batch, now: float) -> None:
        """Copies out what is evicted while it still has its pages; then books the decision."""
        for id in batch.evict:
            self._tickets[id] = self._offer(self.instance.running[id])
        self.instance.begin(batch, now)
        for id in batch.fetch:
            self._fetch(self._tickets[id])

    def _step(self, batch: Batch) -> None:
        seqs = {id: self.instance.running[id] for id in batch.work}
        self._steps.put([(seqs[id], count) for id, count in batch.work.items()])
        tokens = self._until_ended()
        now = self.clock()
        for id, token in tokens.items():
            seqs[id].tokens.append(token.id)
        stopped = [id for id, token in tokens.items() if token.id in seqs[id].request.stop]
        left = self.instance.end(batch, now, stopped)
        tickets = {seq.request.id: self._park(seq) for seq in left if not seq.finish_reason}
        if tokens:
            outputs = [_output(seqs[id], tokens[id], now, tickets.get(id)) for id in tokens]
            self.emit(Stepped(tuple(outputs)))

    def _until_ended(self) -> dict[str, Token]:
        """Reads the inbox until the step under way is over; fetches begin meanwhile: half a step
        later, a short answer would miss its TPOT by it.
        """
        while not isinstance(message := self._inbox.get(), _Ended):
            if isinstance(message, Submit | Handover):
                self._receive(message)
            else:
                self._kept.append(message)
            if self._inbox.empty() and fetchable(self.instance):
                now = self.clock()
                if batch := during_step(self.policy(self.instance, now)):
                    self._begin(batch, now)
        if isinstance(message.tokens, BaseException):
            raise message.tokens
        return message.tokens

    # KV out of the pool and into it.

    def _park(self, seq: Seq) -> Ticket:
        ticket = self._offer(seq)
        self.instance.copied(seq.request.id)
        return ticket

    def _offer(self, seq: Seq) -> Ticket:
        kv = self.engine.read_pages(self._written(seq))
        ticket = self.transport.offer(seq.request.id, seq.computed, kv)
        self._offers[seq.request.id] = ticket
        return ticket

    def _fetch(self, ticket: Ticket) -> None:
        self.transport.fetch(
            ticket, self.engine.wire_sharding, lambda kv: self._inbox.put(_Fetched(ticket, kv))
        )

    def _fetched(self, ticket: Ticket, kv: KV | Exception) -> None:
        id = ticket.request_id
        if self._tickets.get(id) is not ticket:
            return  # cancelled meanwhile
        if isinstance(kv, Exception):
            self._forget(id)
            self.emit(Lost(id, kv))
            return
        del self._tickets[id]
        seq = self.instance.fetched(id)
        self.engine.write_pages(self._written(seq), kv)
        if id in self._offers:  # it had been evicted from here
            self._drop_offer(id)
        else:
            self.emit(Moved(id, self.clock()))

    def _written(self, seq: Seq) -> list[int]:
        """Its pages that hold KV: not one that was given to it for its next token."""
        return seq.pages[: self.instance.limits.pages_for(seq.computed)]

    def _drop_offer(self, id: str) -> None:
        ticket = self._offers.pop(id, None)
        if ticket is not None:
            self.transport.release(ticket)

    def _forget(self, id: str) -> None:
        self.instance.cancel(id)
        self._tickets.pop(id, None)
        self._drop_offer(id)


def _thread(target: Callable[[], None], name: str) -> threading.Thread:
    """Daemons: a step that never ends must not keep the process alive."""
    return threading.Thread(target=target, name=name, daemon=True)


def _output(seq: Seq, token: Token, at: float, ticket: Ticket | None) -> Output:
    assert seq.begun_at is not None
    return Output(seq.request.id, token, seq.begun_at, at, seq.finish_reason, ticket)
