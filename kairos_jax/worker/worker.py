"""The step loop of one instance: drain the inbox, ask the policy, run the step, book it.

One thread owns the ledger and the engine, another waits for the engine's steps. While a step is
under way the first says what the last one gave, takes new requests in, and begins to fetch their
KV; changes of pages wait for the step's end. Messages come in through `post`, from any
thread; events go out through `emit`, which must be quick and callable from this thread.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kairos_jax.engine.calls import Token, wants_prompt_logprobs
from kairos_jax.engine.engine import KV, Engine
from kairos_jax.engine.functions import BLOCK_PAGES
from kairos_jax.kv.transport import KVTransport, Ticket
from kairos_jax.process.logs import of_request
from kairos_jax.worker.messages import (
    Cancel,
    Died,
    Draining,
    Event,
    Failed,
    GoOn,
    HandBack,
    Handover,
    Lost,
    Message,
    Moved,
    Offered,
    Outlined,
    Output,
    Parked,
    Prefetch,
    Release,
    Returned,
    Stay,
    Stepped,
    Submit,
)
from kairos_jax.worker.tally import Steps
from models.sampling import INVALID
from schedulers.ledger.instance import Batch, Instance, Policy, Role, during_step, fetchable
from schedulers.ledger.request import Seq
from schedulers.policies.routing import Summary

log = logging.getLogger(__name__)

_NOT_FINITE = "the model's logits are not finite (NaN or infinity): there is no token to sample"


@dataclass(frozen=True, slots=True)
class _Fetched:
    ticket: Ticket
    kv: KV | Exception
    asked_at: float


@dataclass(frozen=True, slots=True)
class _Ended:
    """The step under way is over."""

    tokens: dict[str, Token] | BaseException


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Item = Message | _Fetched | _Ended | _Stop
_Wait = Callable[[], dict[str, Token]]


class Worker:
    """Drives one instance on two threads of its own.

    outline: sums up the ledger for routers. page_keys: of a prompt (`Request.page_keys`); None:
    prompts share no pages. ran: the steps so far.
    """

    def __init__(
        self,
        instance: Instance,
        policy: Policy,
        engine: Engine,
        transport: KVTransport,
        emit: Callable[[Event], None],
        outline: Callable[[Instance, float], Summary],
        clock: Callable[[], float] = time.monotonic,
        page_keys: Callable[[Sequence[int]], Sequence[int]] | None = None,
    ):
        self.instance, self.policy, self.engine = instance, policy, engine
        self.transport, self.emit, self.outline, self.clock = transport, emit, outline, clock
        self.page_keys, self.ran = page_keys, Steps()
        self._inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._kept: deque[_Item] = deque()  # read during a step, to be handled after it
        self._untold: Callable[[], Stepped] | None = None  # what the last step gave
        self._steps: queue.SimpleQueue[_Wait | None] = queue.SimpleQueue()
        self._num_received = 0
        self._draining = False
        self._aboard: tuple[str, ...] = ()  # requests of the step under way
        self._tickets: dict[str, Ticket] = {}  # of KV that is to be fetched
        self._ahead: dict[str, Ticket] = {}  # of KV that was asked for ahead of its request
        self._offers: dict[str, Ticket] = {}  # of KV that was copied out of this pool
        self._num_offered: dict[str, int] = {}  # pages, of prompts that are still computed
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
        self._step_thread.join(timeout_s)

    def _run(self) -> None:
        try:
            wait = True
            while self._drain(wait):
                now = self.clock()
                batch = self.policy(self.instance, now)
                wait = not batch
                if batch:
                    self._begin(batch, now)
                if batch.work:
                    self._start_step(batch)
                self._tell()
                # Only now, so that the summary counts the step under way. What that step gives is
                # told after it.
                summary = self.outline(self.instance, now)
                self.emit(Outlined(self.instance.id, summary, self._num_received))
                if batch.work:
                    self._end_step(batch, now)
        except BaseException as error:
            log.exception("instance %s died", self.instance.id)
            self._tell()
            self.emit(Died(self.instance.id, error, self._aboard))
            # What it offered must not be fetched from a pool that nobody owns any more.
            for tickets in (self._tickets, self._ahead, self._offers):
                for ticket in tickets.values():
                    self.transport.release(ticket)
        finally:
            self._steps.put(None)

    def _run_steps(self) -> None:
        """Waits for each step, on the thread that is there for it."""
        while (wait := self._steps.get()) is not None:
            try:
                tokens = wait()
            except BaseException as error:
                tokens = error
            self._inbox.put(_Ended(tokens))

    def _drain(self, wait: bool) -> bool:
        """Reads all messages, waiting for one if told to. False: the loop is to end."""
        while self._kept or wait or not self._inbox.empty():
            self._tell()
            message = self._kept.popleft() if self._kept else self._inbox.get()
            if isinstance(message, _Stop):
                return False
            self._receive(message)
            wait = False
        return True

    def _receive(self, message: _Item) -> None:
        match message:
            case Submit(request) | Handover(request=request):
                self._num_received += 1
                if self._draining:
                    ticket = message.ticket if isinstance(message, Handover) else None
                    self.emit(Returned(request.id, ticket))
                else:
                    self._add(message)
            case Prefetch(ticket, prompt):
                if not self._draining:
                    self._ahead[ticket.request_id] = ticket
                    pool = self.instance.pool
                    held = pool.num_cached(self._keys(prompt)) * pool.page_size
                    first = self._first_block(held, ticket.num_tokens)
                    self.transport.prefetch(ticket, self.engine.wire_sharding, first)
            case Release(id):
                self.instance.release(id)
                self._drop_offer(id)
            case Cancel(id):
                self._forget(id)
            case Stay(id, why):
                if id in self.instance.running:
                    self.instance.stay(id, why)
            case GoOn(id, why):
                # If it has ended or was evicted meanwhile, it stays.
                if seq := self.instance.running.get(id):
                    self.instance.hand_over(id, why)
                    self.emit(Parked(id, self._park(seq)))
            case HandBack(running):
                self._hand_back(running)
            case _Fetched():
                self._fetched(message)

    def _add(self, message: Submit | Handover) -> None:
        request = message.request
        if isinstance(message, Submit):
            keys = () if wants_prompt_logprobs(request) else self._keys(request.prompt)
            self.instance.add(replace(request, page_keys=keys))
        else:
            tokens = message.tokens
            request = replace(request, page_keys=self._keys(request.prompt))
            self.instance.add(request, len(tokens), message.first_token_at, tokens)
            self._tickets[request.id] = message.ticket

    def _keys(self, prompt: Sequence[int]) -> Sequence[int]:
        return self.page_keys(prompt) if self.page_keys else ()

    def _hand_back(self, running: bool) -> None:
        if not self._draining:
            self._draining = True
            self.emit(Draining(self.instance.id))
            for id in [id for id in self._ahead if id not in self._tickets]:
                self._forget(id)
        ledger = self.instance
        for id in [seq.request.id for seq in ledger.waiting.values() if _unbegun(seq)]:
            # What came ahead was claimed for here, and is of no use to others.
            ticket = None if id in self._ahead else self._tickets.pop(id, None)
            self._forget(id)
            self.emit(Returned(id, ticket))
        if running:
            for id in [*ledger.waiting, *ledger.running, *ledger.parked]:
                self._forget(id)
                self.emit(Returned(id))

    # One turn of the loop.

    def _begin(self, batch: Batch, now: float) -> None:
        """Copies out what is evicted while it still has its pages; then books the decision."""
        for id in batch.evict:
            self._tickets[id] = self._offer(self.instance.running[id])
        self.instance.begin(batch, now)
        for id in batch.fetch:
            self._fetch(self.instance.waiting[id])

    def _start_step(self, batch: Batch) -> None:
        self._aboard = tuple(batch.work)
        running = self.instance.running
        work = [(running[id], count) for id, count in batch.work.items()]
        self._steps.put(self.engine.start(work))

    def _end_step(self, batch: Batch, begun: float) -> None:
        seqs = {id: self.instance.running[id] for id in batch.work}
        tokens = self._valid(self._until_ended())
        self._aboard = ()
        now = self.clock()
        self.ran.add(now - begun, batch.predicted_s, len(batch.work))
        for id, token in tokens.items():
            seqs[id].tokens.append(token.id)
        stopped = [id for id, token in tokens.items() if token.id in seqs[id].request.stop]
        left = self.instance.end(batch, now, stopped)
        tickets = {seq.request.id: self._park(seq) for seq in left if not seq.finish_reason}
        for seq in left:
            if seq.finish_reason:  # perhaps with its first token, after parts had been offered
                self._drop_offer(seq.request.id)
        if self.transport.overlaps and self.instance.role is Role.PREFILL:
            for seq in filter(None, map(self.instance.running.get, batch.work)):
                self._offer_part(seq)
        if tokens:
            self._untold = lambda: Stepped(
                tuple(_output(seqs[id], tokens[id], now, tickets.get(id)) for id in tokens)
            )

    def _valid(self, tokens: dict[str, Token]) -> dict[str, Token]:
        """The tokens of a step. Ends the requests that got none because their numbers are not
        finite, before the step is booked: so no page of theirs that it filled is cached.
        """
        invalid = [id for id, token in tokens.items() if token.id == INVALID]
        for id in invalid:
            log.error("%s", _NOT_FINITE, extra=of_request(id, instance=self.instance.id))
            self._forget(id)
            self.emit(Failed(id, "not_finite", _NOT_FINITE))
            del tokens[id]
        return tokens

    def _tell(self) -> None:
        """Says what the last step gave: once the next is under way, so that the mesh does not wait
        for it, and before anything else is said or done.
        """
        if stepped := self._untold:
            self._untold = None
            self.emit(stepped())

    def _until_ended(self) -> dict[str, Token]:
        """Reads the inbox until the step under way is over. Fetches begin during the step: half a
        step later, a short answer would miss its TPOT.
        """
        while not isinstance(message := self._inbox.get(), _Ended):
            # A Prefetch too: left for later, it would be overtaken by its Handover.
            if isinstance(message, Submit | Handover | Prefetch):
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
        """Offers all its KV, or what was not offered of it yet."""
        id = seq.request.id
        first = self._num_offered.pop(id, 0)
        kv = self.engine.read_pages(self._written(seq)[first:])
        if first:
            self.transport.extend(self._offers[id], kv, last=True)
        else:
            self._offers[id] = self.transport.offer(id, seq.computed, kv)
        return self._offers[id]

    def _offer_part(self, seq: Seq) -> None:
        """Offers what KV there is of a prompt whose rest is still to be computed: whole blocks, and
        never the last, which may grow.
        """
        id = seq.request.id
        first = self._num_offered.get(id, 0)
        past = seq.computed // self.instance.limits.page_size // BLOCK_PAGES * BLOCK_PAGES
        if past == first:
            return
        if not first:
            self._offers[id] = self.transport.open(id, seq.length)
        self.transport.extend(self._offers[id], self.engine.read_pages(seq.pages[first:past]))
        self._num_offered[id] = past
        if not first:
            self.emit(Offered(id, self._offers[id]))

    def _fetch(self, seq: Seq) -> None:
        ticket, first = self._tickets[seq.request.id], self._first_block(seq.cached, seq.computed)
        asked_at = self.clock()
        self.transport.fetch(
            ticket,
            self.engine.wire_sharding,
            lambda kv: self._inbox.put(_Fetched(ticket, kv, asked_at)),
            first,
        )

    def _first_block(self, held: int, num_tokens: int) -> int:
        """The first block that has to come of so many tokens, of which `held` are here."""
        # The last comes in any case.
        return min(held, num_tokens - 1) // (self.instance.limits.page_size * BLOCK_PAGES)

    def _fetched(self, fetched: _Fetched) -> None:
        ticket, kv = fetched.ticket, fetched.kv
        id = ticket.request_id
        if self._tickets.get(id) is not ticket:
            return  # cancelled while it was fetched
        if isinstance(kv, Exception):
            self._forget(id)
            self.emit(Lost(id, kv))
            return
        del self._tickets[id]
        self._ahead.pop(id, None)
        self._write(self.instance.waiting[id], kv)
        self.instance.fetched(id)
        if id in self._offers:  # it had been evicted from here
            self._drop_offer(id)
        else:
            self.emit(Moved(id, self.clock(), fetched.asked_at))

    def _write(self, seq: Seq, kv: KV) -> None:
        """Writes what has come, save for what was here: others read that."""
        limits, first = self.instance.limits, self._first_block(seq.cached, seq.computed)
        held = seq.cached // limits.page_size
        pages = [limits.num_pages] * held + self._written(seq)[held:]
        self.engine.write_pages(pages[first * BLOCK_PAGES :], kv)

    def _written(self, seq: Seq) -> list[int]:
        """Its pages that hold KV: not one that was given to it for its next token."""
        return seq.pages[: self.instance.limits.pages_for(seq.computed)]

    def _drop_offer(self, id: str) -> None:
        self._num_offered.pop(id, None)
        ticket = self._offers.pop(id, None)
        if ticket is not None:
            self.transport.release(ticket)

    def _forget(self, id: str) -> None:
        self.instance.cancel(id)
        ahead = self._ahead.pop(id, None)
        if ticket := self._tickets.pop(id, ahead):
            self.transport.release(ticket)
        self._drop_offer(id)


def _thread(target: Callable[[], None], name: str) -> threading.Thread:
    """Daemons: a step that never ends must not keep the process alive."""
    return threading.Thread(target=target, name=name, daemon=True)


def _unbegun(seq: Seq) -> bool:
    """Whether nothing was done for a waiting sequence here: no step, and no fetch of its KV."""
    return seq.begun_at is None and not seq.pages


def _output(seq: Seq, token: Token, at: float, ticket: Ticket | None) -> Output:
    assert seq.begun_at is not None
    return Output(seq.request.id, token, seq.begun_at, at, seq.finish_reason, ticket, seq.cached)
