"""What a worker does while a step is under way."""

import queue
import threading

import fakes
import pytest

from kairos_jax.instances import build_policy, build_workers
from kairos_jax.messages import Cancel, Died, Handover, Moved, Stepped, Submit
from kairos_jax.transfer import LocalTransport
from schedulers.core import Role
from schedulers.cost import CostModel
from schedulers.journal import Journal, check, replay
from schedulers.request import Request, Slo

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

    def fetch(self, ticket, sharding, done):
        def tell(kv):
            done(kv)
            self.arrived.release()

        super().fetch(ticket, sharding, tell)
        self.begun.release()


class Pair:
    """A worker that prefills and one that decodes, each told what to do by the test alone."""

    def __init__(self):
        self.transport, self.journal = Transport(), Journal(fakes.time.monotonic)
        self.engines = [Engine(fakes.CONFIG.limits(role)) for role in fakes.CONFIG.roles]
        self.events = queue.SimpleQueue()
        emit = self.events.put
        self.workers = build_workers(
            fakes.CONFIG, self.engines, COST, self.transport, emit, self.journal
        )
        self.prefill, self.decode = self.workers
        for worker in self.workers:
            worker.start()

    def hand_over(self, id: str, max_tokens: int) -> None:
        """A prompt is prefilled, and goes to the decode worker."""
        self.prefill.post(Submit(Request(id, 0.0, [1, 2, 3], max_tokens, Slo(30.0, 30.0))))
        output = self.next_output(id)
        seq = self.prefill.instance.parked[id]
        handover = Handover(seq.request, (output.token.id,), output.at, output.ticket)
        self.decode.post(handover)

    def next_output(self, id: str):
        while True:
            event = self.events.get(timeout=30)
            assert not isinstance(event, Died), event
            if isinstance(event, Stepped):
                for output in event.outputs:
                    if output.id == id:
                        return output

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


def test_cancelled_in_a_step_it_is_forgotten_after_it(pair):
    pair.engines[1].gate.clear()
    pair.hand_over("gone", 20)
    pair.decode_begun()
    pair.decode.post(Cancel("gone"))
    pair.hand_over("next", 3)  # so the cancel has been read by now
    assert pair.transport.begun.acquire(timeout=30)
    assert pair.transport.begun.acquire(timeout=30)
    assert "gone" in pair.decode.instance.running
    pair.engines[1].gate.set()
    assert pair.next_output("gone").finish_reason is None, "the token of that step"
    pair.next_output("next")
    assert "gone" not in pair.decode.instance.running
    assert pair.next_output("next").finish_reason == "length"


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
