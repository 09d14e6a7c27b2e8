"""What a worker does while a step is under way."""

import queue
import threading

import fakes
import pytest

from kairos_jax.kv.transport import LocalTransport, Ticket
from kairos_jax.worker.build import build_policy, build_workers
from kairos_jax.worker.messages import (
    Cancel,
    Died,
    Draining,
    HandBack,
    Handover,
    Kept,
    Moved,
    Offered,
    Prefetch,
    Recall,
    Returned,
    Stepped,
    Submit,
)
from schedulers.cost import CostModel
from schedulers.ledger.instance import Batch, Role
from schedulers.ledger.journal import Journal, check, replay
from schedulers.ledger.request import Request, Slo

COST = CostModel.from_profile(fakes.PROFILE)


class Engine(fakes.FakeEngine):
    """Tells when a step has begun."""

    def __init__(self, limits):
        super().__init__(limits)
        self.begun = threading.Semaphore(0)

    def step(self, work):
        self.begun.release()
        return super().step(work)


class Transport(LocalTransport):
    """Tells when a fetch has begun, and when the KV is there."""

    def __init__(self):
        super().__init__()
        self.begun, self.arrived = threading.Semaphore(0), threading.Semaphore(0)

    def fetch(self, ticket, sharding, done, first=0):
        def tell(kv):
            done(kv)
            self.arrived.release()

        super().fetch(ticket, sharding, tell, first)
        self.begun.release()


class Pair:
    """A worker that prefills and one that decodes, each told what to do by the test alone."""

    def __init__(self):
        self.transport, self.journal = Transport(), Journal(fakes.time.monotonic)
        self.engines = [Engine(fakes.CONFIG.limits(role)) for role in fakes.CONFIG.roles]
        self.events = queue.Queue()
        emit = self.events.put
        self.workers = build_workers(
            fakes.CONFIG, self.engines, COST, self.transport, emit, self.journal
        )
        self.prefill, self.decode = self.workers
        for worker in self.workers:
            worker.start()

    def hand_over(self, id: str, max_tokens: int, ahead: bool = False) -> Ticket:
        """A prompt is prefilled, and goes to the decode worker, by the ticket that is returned."""
        self.prefill.post(Submit(Request(id, 0.0, [1, 2, 3], max_tokens, Slo(30.0, 30.0))))
        output = self.next_output(id)
        seq = self.prefill.instance.parked[id]
        handover = Handover(seq.request, (output.token.id,), output.at, output.ticket)
        if ahead:
            self.decode.post(Prefetch(output.ticket, seq.request.prompt))
        self.decode.post(handover)
        return output.ticket

    def next_output(self, id: str):
        while True:
            event = self.events.get(timeout=30)
            assert not isinstance(event, Died), event
            if isinstance(event, Stepped):
                for output in event.outputs:
                    if output.id == id:
                        return output

    def told(self, kind, count=1):
        """The next events of a kind."""
        events = []
        while len(events) < count:
            if isinstance(event := self.events.get(timeout=30), kind):
                events.append(event)
        return events

    def decode_begun(self) -> None:
        """Returns when the decode worker is in a step."""
        assert self.engines[1].begun.acquire(timeout=30)

    def stop(self) -> None:
        self.engines[1].gate.set()
        for worker in self.workers:
            worker.stop()
            worker.instance.check()
        self.transport.close()


@pytest.fixture
def pair():
    pair = Pair()
    yield pair
    pair.stop()


def test_a_fetch_begins_while_a_step_is_under_way(pair):
    pair.engines[1].gate.clear()
    pair.hand_over("long", 20)
    pair.decode_begun()
    assert pair.transport.begun.acquire(timeout=30)
    pair.hand_over("late", 2)
    assert pair.transport.begun.acquire(timeout=30)
    assert pair.engines[1].num_steps == 0, "the step has not ended"
    pair.engines[1].gate.set()
    assert pair.next_output("late").finish_reason == "length"
    pair.stop()
    records = list(pair.journal.take())
    early = [d.batch.fetch for d in replay(records) if d.instance.under_way]
    assert early == [("late",)]
    roles = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
    policies = {id: build_policy(fakes.CONFIG, role, COST) for id, role in roles.items()}
    assert check(records, policies) == len(list(replay(records)))


def test_a_prefetch_is_not_overtaken_by_its_handover_during_a_step(pair):
    pair.engines[1].gate.clear()
    pair.hand_over("long", 20)
    pair.decode_begun()
    pair.hand_over("late", 2, ahead=True)
    pair.engines[1].gate.set()
    assert pair.next_output("late").finish_reason == "length"
    pair.stop()
    assert not pair.decode.moves._ahead


def test_what_ends_with_its_first_token_leaves_no_part_on_offer(pair):
    pair.transport.overlaps = True
    pair.prefill.post(Submit(Request("one", 0.0, [1] * 100, 1, Slo(30.0, 30.0))))
    assert pair.told(Offered), "parts of it while the rest was computed"
    assert pair.next_output("one").finish_reason == "length"
    pair.prefill.stop()
    assert pair.transport.num_offers == 0


def test_what_is_on_offer_of_a_prompt_counts_as_parked_from_its_first_chunk(pair):
    pair.transport.overlaps = True
    ledger, extend, seen = pair.prefill.instance, pair.transport.extend, []

    def watched(ticket, kv, last=False):
        extend(ticket, kv, last)
        seen.append((len(kv), ledger.limits.parked_tokens - ledger.parked_room))

    pair.transport.extend = watched
    pair.prefill.post(Submit(Request("long", 0.0, [1] * 100, 4, Slo(30.0, 30.0))))
    pair.next_output("long")
    assert seen == [(1, 100)] * 4, "blocks of 32 tokens"


def test_cancelled_in_a_step_it_is_forgotten_before_the_next_decision(pair):
    pair.engines[1].gate.clear()
    pair.hand_over("gone", 20)
    pair.decode_begun()
    pair.decode.post(Cancel("gone"))
    pair.hand_over("next", 3)  # so the cancel has been read by now
    assert pair.transport.begun.acquire(timeout=30)
    assert pair.transport.begun.acquire(timeout=30)
    assert pair.engines[1].num_steps == 0, "the step has not ended"
    pair.engines[1].gate.set()
    told = []
    while told.count("next") < 2:
        told += [output.id for event in pair.told(Stepped) for output in event.outputs]
    assert "gone" not in pair.decode.instance.running
    assert told.count("gone") <= 2, "of the steps that had been dispatched"


def test_what_a_step_gave_is_told_when_the_next_has_begun(pair):
    done, emit, start = [], pair.decode.emit, pair.engines[1].start

    def told(event):
        if isinstance(event, Stepped):
            done.append("told")
        emit(event)

    def started(work):
        done.append("started")
        return start(work)

    pair.decode.emit, pair.engines[1].start = told, started
    pair.hand_over("long", 4)
    while pair.next_output("long").finish_reason is None:
        pass
    assert done == ["started", "started", "told", "started", "told", "told"]


def test_kv_that_arrives_in_a_step_is_written_after_it(pair):
    pair.engines[1].gate.clear()
    pair.hand_over("long", 20)
    pair.decode_begun()
    assert pair.transport.arrived.acquire(timeout=30)
    pair.hand_over("late", 2)
    assert pair.transport.arrived.acquire(timeout=30)
    held = len(pair.engines[1].pool)
    pair.engines[1].gate.set()
    while not (isinstance(event := pair.events.get(timeout=30), Moved) and event.id == "late"):
        assert not isinstance(event, Died), event
    assert pair.next_output("late").token.id == fakes.expected_tokens([1, 2, 3], 2)[1]
    assert len(pair.engines[1].pool) > held


def test_a_step_that_fails_ends_the_instance_with_its_error(pair):
    pair.engines[1].gate.clear()
    pair.hand_over("lost", 20)
    pair.decode_begun()
    pair.decode.post(Cancel("lost"))
    pair.engines[1].fail = RuntimeError("no more memory")
    pair.engines[1].gate.set()
    while not isinstance(event := pair.events.get(timeout=30), Died):
        pass
    assert event.error is pair.engines[1].fail


def test_what_waits_goes_back_and_what_runs_goes_on(pair):
    pair.engines[0].gate.clear()
    slo = Slo(30.0, 30.0)
    for id in ("a", "b"):
        pair.prefill.post(Submit(Request(id, 0.0, [1] * 40, 4, slo)))  # two chunks each
    assert pair.engines[0].begun.acquire(timeout=30)
    pair.prefill.post(HandBack(running=False))
    pair.prefill.post(Submit(Request("c", 0.0, [1], 4, slo)))
    pair.engines[0].gate.set()
    assert pair.told(Draining) == [Draining("prefill-0")]
    assert pair.told(Returned, 2) == [Returned("b"), Returned("c")]
    assert pair.next_output("a").ticket, "what had begun is prefilled to its end, and parked"
    pair.prefill.post(HandBack(running=True))
    assert pair.told(Returned) == [Returned("a")]
    pair.prefill.stop()
    assert pair.transport.num_offers == 0
    assert pair.prefill.instance.pages.num_free == pair.prefill.instance.limits.num_pages


def test_a_recalled_prompt_goes_back_unless_it_has_begun(pair):
    pair.engines[0].gate.clear()
    slo = Slo(30.0, 30.0)
    for id in ("begun", "waits"):
        pair.prefill.post(Submit(Request(id, 0.0, [1] * 40, 4, slo)))  # two chunks each
    assert pair.engines[0].begun.acquire(timeout=30)
    for id in ("begun", "waits", "unknown"):
        pair.prefill.post(Recall(id, "another has time for it"))
    # At once, while the step goes on.
    told = pair.told(Returned | Kept, 3)
    assert told == [Kept("begun"), Returned("waits"), Kept("unknown")]
    pair.engines[0].gate.set()
    assert pair.next_output("begun").ticket
    pair.prefill.post(Cancel("begun"))
    pair.prefill.stop()
    assert pair.prefill.instance.pages.num_free == pair.prefill.instance.limits.num_pages


def test_what_runs_goes_back_too_if_told_so_and_its_fetch_is_dropped(pair):
    pair.engines[1].gate.clear()
    pair.hand_over("runs", 20)
    pair.decode_begun()
    assert pair.transport.begun.acquire(timeout=30)
    pair.hand_over("fetched", 20)
    assert pair.transport.arrived.acquire(timeout=30)
    assert pair.transport.arrived.acquire(timeout=30)
    pair.decode.post(HandBack(running=True))
    pair.engines[1].gate.set()
    assert {event.id for event in pair.told(Returned, 2)} == {"runs", "fetched"}
    pair.decode.stop()
    assert not pair.decode.moves._tickets
    assert pair.decode.instance.pages.num_free == pair.decode.instance.limits.num_pages


def test_kv_that_was_not_asked_for_goes_back_by_its_ticket(pair):
    pair.decode.policy = lambda instance, now: Batch()
    waits = pair.hand_over("waits", 20)
    pair.hand_over("came ahead", 20, ahead=True)
    pair.decode.post(HandBack(running=False))
    assert pair.told(Returned, 2) == [Returned("waits", waits), Returned("came ahead")]
    late = pair.hand_over("late", 20)
    assert pair.told(Returned) == [Returned("late", late)]
    held = queue.Queue()
    for ticket in (waits, late):
        pair.transport.fetch(ticket, None, held.put)
        assert isinstance(held.get(timeout=30), list), "still on offer"
    pair.decode.stop()
    assert not pair.decode.moves._tickets
    assert not pair.decode.moves._ahead


def test_a_forgotten_ticket_is_released_whether_or_not_its_fetch_has_begun(pair):
    released, release = queue.Queue(), pair.transport.release
    pair.transport.release = lambda ticket: (released.put(ticket.request_id), release(ticket))
    fetch, held = pair.transport.fetch, queue.Queue()
    pair.transport.fetch = lambda *args: held.put(args)
    pair.hand_over("gone", 20)
    args = held.get(timeout=30)
    pair.decode.post(Cancel("gone"))
    assert released.get(timeout=30) == "gone"
    fetch(*args)  # which comes late, and to nothing
    assert pair.transport.arrived.acquire(timeout=30)
    pair.transport.fetch = fetch
    pair.hand_over("next", 2)
    assert pair.next_output("next").finish_reason == "length"


def test_a_worker_that_dies_takes_its_offers_with_it(pair):
    pair.transport.fetch = lambda *args: None
    pair.hand_over("parked", 20)
    assert pair.transport.num_offers == 1
    pair.engines[0].fail = RuntimeError("no more memory")
    pair.prefill.post(Submit(Request("last", 0.0, [1], 4, Slo(30.0, 30.0))))
    assert pair.told(Died)[0].error is pair.engines[0].fail
    pair.prefill.stop()
    assert pair.transport.num_offers == 0
