"""The step loop of one instance: drain the inbox, ask the policy, run the step, book it.

One thread owns the ledger and the engine, another waits for the engine's steps. While a step is
under way the first says what the last one gave, takes new requests in, and begins to fetch their
KV; changes of pages wait for the next decision. Shortly before the step ends, as predicted, the
next is decided and dispatched behind it: on a ledger in which the step has done what it is certain
to do (`Instance.expect`). Its tokens are on the device then, and booked when they are here.

Messages come in through `post`, from any thread; events go out through `emit`, which must be quick
and callable from this thread.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kairos_jax.engine.calls import Token, wants_prompt_logprobs
from kairos_jax.engine.engine import Engine
from kairos_jax.kv.transport import KVTransport, Ticket
from kairos_jax.process.logs import of_request
from kairos_jax.worker.flights import Ended, Flight, Flights
from kairos_jax.worker.messages import (
    Cancel,
    Died,
    Draining,
    Event,
    Failed,
    GoOn,
    HandBack,
    Handover,
    Kept,
    Lost,
    Message,
    Outlined,
    Output,
    Parked,
    Prefetch,
    Recall,
    Release,
    Returned,
    Stay,
    Stepped,
    Submit,
)
from kairos_jax.worker.moves import Fetched, Moves
from kairos_jax.worker.tally import Steps
from models.sampling import INVALID
from schedulers.ledger.instance import Batch, Instance, Policy, Role, during_step, fetchable
from schedulers.ledger.request import Seq
from schedulers.policies.routing import Summary

log = logging.getLogger(__name__)

_NOT_FINITE = "the model's logits are not finite (NaN or infinity): there is no token to sample"


# How long before the predicted end of a step the next is decided: twice what the host has needed of
# late, and so much of the step, as that is predicted no better, but not more than as much again. A
# request that arrives later waits for the step after the next: on a CPU for 100 ms, to save 1 ms.
_SPREAD = 0.05
# And never more than so much of the step.
_MOST = 0.5
# Weight of a new value in the running average of the host's time.
_NEWEST = 0.1


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Item = Message | Fetched | Ended | _Stop


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
        # Not a SimpleQueue: with a timeout, one of CPython 3.11 and 3.12 may wait for ever.
        self._inbox: queue.Queue[_Item] = queue.Queue()
        self._kept: deque[_Item] = deque()  # read during a step, to be handled after it
        self._untold: Callable[[], Stepped] | None = None  # what the last step gave
        self._flights = Flights(f"steps-{instance.id}", self._inbox.put)
        self._host_s = 0.0  # what the host needs for a step, from the decision on
        self._leaving: dict[str, str] = {}  # what is to go on elsewhere, and why
        self._num_received = 0
        self._draining = False
        self._aboard: tuple[str, ...] = ()  # requests of a step that has failed
        self.moves = Moves(instance, engine, transport, clock, self._inbox.put, self._say)
        name = f"worker-{instance.id}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the step loop."""
        self._flights.start()
        self._thread.start()

    @property
    def num_under_way(self) -> int:
        """Steps that were dispatched and whose results are not booked."""
        return len(self._flights)

    def post(self, message: Message) -> None:
        """Puts a message into the inbox."""
        self._inbox.put(message)

    def stop(self, timeout_s: float | None = None) -> None:
        """Ends the loop after the step it is at, and waits for that, `timeout_s` at most."""
        self._inbox.put(_Stop())
        self._thread.join(timeout_s)
        self._flights.join(timeout_s)

    def _run(self) -> None:
        try:
            wait = True
            while self._drain(wait):
                wait = not self._turn()
        except BaseException as error:
            log.exception("instance %s died", self.instance.id)
            self._tell()
            self.emit(Died(self.instance.id, error, self._aboard))
            self.moves.release_all()
        finally:
            self._flights.stop()

    def _drain(self, wait: bool) -> bool:
        """Reads all messages, waiting for one if told to. False: the loop is to end."""
        while self._kept or wait or not self._inbox.empty():
            self._tell()
            message = self._kept.popleft() if self._kept else self._inbox.get()
            if isinstance(message, _Stop):
                self._finish()
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
                    pool = self.instance.pool
                    held = pool.num_cached(self._keys(prompt)) * pool.page_size
                    self.moves.prefetch(ticket, held)
            case Release(id):
                self.instance.release(id)
                self.moves.drop_offer(id)
            case Cancel(id):
                self._forget(id)
            case Stay(id, why):
                if id in self.instance.running:
                    self.instance.stay(id, why)
            case GoOn(id, why):
                self._leaving[id] = why
            case Recall(id, why):
                self._give_back(id, why)
            case HandBack(running):
                self._hand_back(running)
            case Fetched():
                self._fetched(message)
            case Ended():
                self._end(message)

    def _add(self, message: Submit | Handover) -> None:
        request = message.request
        if isinstance(message, Submit):
            keys = () if wants_prompt_logprobs(request) else self._keys(request.prompt)
            self.instance.add(replace(request, page_keys=keys))
        else:
            tokens = message.tokens
            request = replace(request, page_keys=self._keys(request.prompt))
            self.instance.add(request, len(tokens), message.first_token_at, tokens)
            self.moves.expect(message.ticket)

    def _keys(self, prompt: Sequence[int]) -> Sequence[int]:
        return self.page_keys(prompt) if self.page_keys else ()

    def _hand_back(self, running: bool) -> None:
        if not self._draining:
            self._draining = True
            self.emit(Draining(self.instance.id))
            for id in self.moves.without_request():
                self._forget(id)
        ledger = self.instance
        for id in [seq.request.id for seq in ledger.waiting.values() if seq.unbegun]:
            ticket = self.moves.take_ticket(id)
            self._forget(id)
            self.emit(Returned(id, ticket))
        if running:
            for id in [*ledger.waiting, *ledger.running, *ledger.ending, *ledger.parked]:
                self._forget(id)
                self.emit(Returned(id))

    def _give_back(self, id: str, why: str) -> None:
        seq = self.instance.waiting.get(id)
        if seq and seq.unbegun and not seq.num_tokens:
            self.instance.give_back(id, why)
            self.emit(Returned(id))
        else:
            self.emit(Kept(id))

    def _fetched(self, fetched: Fetched) -> None:
        if not self.moves.is_awaited(fetched):
            return
        id = fetched.ticket.request_id
        if isinstance(fetched.kv, Exception):
            self._forget(id)
            self.emit(Lost(id, fetched.kv))
            return
        self.moves.write(fetched)

    def _forget(self, id: str) -> None:
        """Also what a step under way gives of it: later calls may have its pages, as the device
        runs them after that step.
        """
        self.instance.cancel(id)
        self.moves.forget(id)
        self._flights.drop(id)

    # One turn of the loop.

    def _turn(self) -> bool:
        """Decides, and begins what was decided; if that is a step, reads the inbox until the next
        decision is due. Returns whether there was something to do.
        """
        copies = self.moves.copies
        copies.make()
        now = self.clock()
        batch = self._decide(now)
        if batch:
            self._begin(batch, now)
        if batch.work:
            self._start_step(batch, now)
            self._host_s += _NEWEST * (self.clock() - now - self._host_s)
        self._tell()
        # Only now, so that the summary counts the step under way. What that step gives is told
        # after it.
        summary = self.outline(self.instance, self.clock())
        self.emit(Outlined(self.instance.id, summary, self._num_received))
        if batch.work:
            self._while_under_way()
        elif copies.waiting and not self._flights:
            # No step waits for them, but one that is asked for now is not to wait for all.
            self.engine.wait()
            copies.step_begun(0.0)
            return True
        return bool(batch)

    def _decide(self, now: float) -> Batch:
        """Nothing, if the decision needs the result of the step under way."""
        if not self._flights:
            if self._leaving:
                self._park_leaving()
            return self.policy(self.instance, now)
        if not (self.instance.awaits_result or self._leaving):
            batch = self.policy(self.instance, now)
            if not batch.evict:
                return batch
        self._flights.first.waited_for = True
        return Batch()

    def _park_leaving(self) -> None:
        """Stops what is to go on elsewhere, between two steps. What has ended or was evicted until
        then stays.
        """
        self._tell()  # where it goes on, all its tokens must be known
        for id, why in self._leaving.items():
            if seq := self.instance.running.get(id):
                self.instance.hand_over(id, why)
                self.emit(Parked(id, self.moves.offer(seq)))
        self._leaving.clear()
        self.moves.copies.make()

    def _begin(self, batch: Batch, now: float) -> None:
        """Books the decision, and begins what it moves."""
        self.instance.begin(batch, now)
        for id in batch.evict:
            self.moves.evict(self.instance.evicting[id])
        if batch.evict:
            self.moves.copies.make()
        for id in batch.fetch:
            self.moves.fetch(self.instance.waiting[id])

    def _start_step(self, batch: Batch, now: float) -> None:
        seqs = self.instance.running.some(batch.work)
        try:
            wait = self.engine.start(list(zip(seqs.values(), batch.work.values(), strict=True)))
        except BaseException:
            self._aboard = tuple(batch.work)
            raise
        self.moves.copies.step_begun(self.instance.pace * batch.predicted_s)
        self.ran.num_ahead += len(self._flights)
        self._flights.add(Flight(batch, now, seqs), wait)

    def _while_under_way(self) -> None:
        """Reads the inbox until no step is under way, or the next is to be dispatched behind it.
        Fetches begin during the step: half a step later, a short answer would miss its TPOT.
        """
        while self._flights:
            try:
                message = self._inbox.get(timeout=self._spare_s())
            except queue.Empty:
                self._expect()
                return
            # A Prefetch too: left for later, it would be overtaken by its Handover. And a Recall:
            # another worker waits for it, and what has not begun has no pages.
            if isinstance(message, Submit | Handover | Prefetch | Recall | Ended):
                self._receive(message)
            else:
                self._kept.append(message)
            if self._flights and isinstance(message, Ended):
                self._tell()
            if self._inbox.empty() and self.instance.under_way and fetchable(self.instance):
                now = self.clock()
                if batch := during_step(self.policy(self.instance, now)):
                    self._begin(batch, now)

    def _spare_s(self) -> float | None:
        """Seconds for which the next decision may wait for messages. None: it waits for the result
        of a step.
        """
        flight = self._flights.first
        if flight.expected:
            return None
        step_s = self.instance.pace * flight.batch.predicted_s
        host_s = 2 * self._host_s
        lead_s = min(host_s + min(_SPREAD * step_s, host_s), _MOST * step_s)
        return max(self.instance.busy_until - lead_s - self.clock(), 0.0)

    def _expect(self) -> None:
        """Books what the step under way is certain to do. The KV of its prompts is copied out right
        behind it, so that no handover waits for the next step too.
        """
        flight = self._flights.first
        flight.expected = True
        for seq in self.instance.expect(self.clock()):
            if self.instance.role is Role.PREFILL and seq.request.max_tokens > 1:
                flight.tickets[seq.request.id] = self.moves.offer(seq)
        self._offer_parts(flight)
        self.moves.copies.make()

    def _end(self, ended: Ended) -> None:
        """Books the result of a step."""
        now = self.clock()
        flight = self._flights.land(now)
        if isinstance(ended.tokens, BaseException):
            self._aboard = tuple(flight.batch.work)
            raise ended.tokens
        seqs, batch = flight.seqs, flight.batch
        tokens = self._valid({id: token for id, token in ended.tokens.items() if id in seqs})
        self.ran.add(now - flight.begun_at, batch.predicted_s, len(batch.work))
        self.ran.num_waited += flight.waited_for
        stopped = []
        for id, token in tokens.items():
            seq = seqs[id]
            seq.tokens.append(token.id)
            if token.id in seq.request.stop:
                stopped.append(id)
        left = self.instance.end(batch, now, stopped)
        for seq in left:
            if seq.finish_reason:
                self._finished(seq.request.id)
            elif seq.request.id not in flight.tickets:
                flight.tickets[seq.request.id] = self.moves.offer(seq)
        for seq in left:
            if not (seq.finish_reason or seq.request.id in self.moves.copies):
                self.instance.copied(seq.request.id)
        if not flight.expected:
            self._offer_parts(flight)
        if tokens:
            self._untold = lambda: Stepped(
                tuple(_output(seqs[id], tokens[id], now, flight.tickets.get(id)) for id in tokens)
            )

    def _finished(self, id: str) -> None:
        """Drops its parts on offer, if it ended with its first token; and its row of the step that
        was dispatched before that was known.
        """
        self.moves.drop_offer(id)
        self.ran.num_wasted += self._flights.drop(id)

    def _finish(self) -> None:
        """Waits for the steps under way, and tells what they gave. KV that is on offer or has come
        is copied.
        """
        while self._flights:
            if isinstance(message := self._inbox.get(), Ended):
                self._end(message)
                self._tell()
        self.moves.copies.finish_all()

    def _offer_parts(self, flight: Flight) -> None:
        """Offers what the step computes of prompts that go on, where that gains."""
        if self.transport.overlaps and self.instance.role is Role.PREFILL:
            for seq in filter(None, map(self.instance.running.get, flight.batch.work)):
                if offered := self.moves.offer_part(seq):
                    self.emit(offered)

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

    def _say(self, event: Event) -> None:
        """Says something between two steps."""
        self._tell()
        self.emit(event)

    def _tell(self) -> None:
        """Says what the last step gave: once the next is under way, so that the mesh does not wait
        for it, and before anything else is said or done.
        """
        if stepped := self._untold:
            self._untold = None
            self.emit(stepped())


def _output(seq: Seq, token: Token, at: float, ticket: Ticket | None) -> Output:
    assert seq.begun_at is not None
    return Output(seq.request.id, token, seq.begun_at, at, seq.finish_reason, ticket, seq.cached)
