"""Steps that are dispatched before the result of the one before is there."""

import queue
import random
import threading
import time

import fakes
import pytest

from kairos_jax.engine.engine import num_blocks
from kairos_jax.kv.transport import LocalTransport
from kairos_jax.worker.build import build_policy, build_worker
from kairos_jax.worker.copies import MOST_S
from kairos_jax.worker.messages import (
    Cancel,
    Died,
    Failed,
    HandBack,
    Handover,
    Moved,
    Release,
    Returned,
    Stepped,
    Submit,
)
from kairos_jax.worker.worker import _Stop
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role
from schedulers.ledger.journal import Journal, check
from schedulers.ledger.request import Request, Slo

COST = CostModel.from_profile(fakes.PROFILE)
SLO = Slo(30.0, 30.0)
ROOMY = fakes.altered(colocated=True, max_context=64, prefill__max_chunk=16)
# Eleven pages, of which a sequence may need eight.
TIGHT = fakes.altered(ROOMY, decode__kv_tokens=88, prefill__kv_tokens=88)


class Engine(fakes.FakeEngine):
    """Writes down what is asked of it, in order, and when results are given. steps: of each, its
    sequences.

    The result of a step is held back until the next one is dispatched, or until `let_go`. A block
    takes so long to copy that each has a step of its own before it. most_copied: blocks between two
    steps.
    """

    copy_s = 0.75 * MOST_S

    def __init__(self, limits):
        super().__init__(limits)
        self.log, self.steps = [], []
        self.most_copied = self._copied = 0
        self._given, self._changed = 0, threading.Condition()

    def start(self, work):
        self._copied = 0
        number, wait = len(self.steps), super().start(work)
        self.log.append(("start", number))
        self.steps.append([seq.request.id for seq, _ in work])
        self.let_go(number)

        def result():
            with self._changed:
                assert self._changed.wait_for(lambda: self._given > number, 30)
            self.log.append(("result", number))
            return wait()

        return result

    def let_go(self, count):
        """Gives the results of the first so many steps."""
        with self._changed:
            self._given = max(self._given, count)
            self._changed.notify_all()

    def read_pages(self, pages):
        self.log.append(("read", len(self.steps) - 1))
        self._count(num_blocks(len(pages)))
        return super().read_pages(pages)

    def write_pages(self, pages, kv):
        self._count(len(kv))
        super().write_pages(pages, kv)

    def wait(self):
        self._copied = 0
        super().wait()

    def _count(self, blocks):
        self._copied += blocks
        self.most_copied = max(self.most_copied, self._copied)


class Alone:
    """One worker, and what it says. It gets the result of a step when the next one is dispatched,
    or when it does not dispatch one.
    """

    def __init__(self, role=Role.BOTH, config=TIGHT, transport=None, cost=COST):
        self.transport = transport or LocalTransport()
        self.journal, self.cost = Journal(time.monotonic), cost
        self.config, self.engine = config, Engine(config.limits(role))
        self.events = queue.Queue()
        self.tokens, self.ended = {}, {}
        self.at_third = lambda: None  # on the worker's thread, when a request has three tokens
        self.worker = build_worker(
            config, role, "w", self.engine, cost, self.transport, self.emit, self.journal
        )
        # A machine that stood still makes the next step seem long; its result waits for a dispatch.
        self.spare_s, self.worker._spare_s = self.worker._spare_s, self.short_spare_s
        self._decide, self.worker._decide = self.worker._decide, self.decide
        self._finish, self.worker._finish = self.worker._finish, self.finish

    def decide(self, now):
        batch = self._decide(now)
        if not batch.work:
            self.engine.let_go(len(self.engine.steps))
        return batch

    def short_spare_s(self):
        spare_s = self.spare_s()
        return None if spare_s is None else min(spare_s, 0.01)

    def finish(self):
        self.engine.let_go(len(self.engine.steps))
        self._finish()

    def emit(self, event):
        match event:
            case Stepped(outputs):
                for output in outputs:
                    self.tokens.setdefault(output.id, []).append(output.token.id)
                    if len(self.tokens[output.id]) == 3:
                        self.at_third()
                    if output.finish_reason or output.ticket:
                        self.ended[output.id] = output.finish_reason
            case Failed(id, cause):
                self.ended[id] = cause
        self.events.put(event)

    def submit(self, id, prompt, max_tokens=8, **fields):
        self.worker.post(Submit(Request(id, time.monotonic(), prompt, max_tokens, SLO, **fields)))

    def until(self, done):
        """Reads events until `done()`."""
        while not done():
            event = self.events.get(timeout=30)
            assert not isinstance(event, Died), event.error

    def stop(self):
        self.worker.stop()
        ledger = self.worker.instance
        ledger.check()
        assert not any((ledger.waiting, ledger.running, ledger.ending))
        for id in list(ledger.parked):
            self.worker._forget(id)
        assert ledger.pages.num_free == ledger.limits.num_pages
        assert not self.worker.moves.holds_tickets
        assert self.transport.num_offers == 0
        self.transport.close()
        policy = build_policy(self.config, ledger.role, self.cost)
        records = list(self.journal.take())
        assert check(records, {"w": policy}) > 0
        return records


def cut(prompt, max_tokens, stop):
    """What a request gets."""
    tokens = fakes.expected_tokens(prompt, max_tokens)
    last = next((at for at, id in enumerate(tokens) if id in stop), max_tokens - 1)
    return tokens[: last + 1]


def test_a_step_is_dispatched_before_the_result_of_the_one_before():
    alone = Alone()
    alone.submit("a", [1, 2, 3], 6)
    alone.worker.start()
    alone.until(lambda: "a" in alone.ended)
    alone.stop()
    assert alone.tokens["a"] == fakes.expected_tokens([1, 2, 3], 6)
    for number in range(5):
        log = alone.engine.log
        assert log.index(("start", number + 1)) < log.index(("result", number))
    assert alone.worker.ran.num_ahead == 5


def test_a_request_that_arrives_during_a_step_is_in_the_next():
    """Long before its end the next is not decided; here that is predicted to be minutes away."""
    alone = Alone(cost=COST.scaled(1e7))
    alone.submit("a", [1] * 9, 2)
    alone.worker.start()
    alone.until(lambda: alone.engine.steps)
    alone.submit("b", [2] * 9, 2)
    alone.engine.let_go(1)
    alone.until(lambda: len(alone.engine.steps) >= 2)
    assert alone.engine.steps == [["a"], ["a", "b"]]
    alone.engine.let_go(99)
    alone.until(lambda: len(alone.ended) >= 2)
    assert alone.worker.ran.num_ahead == 0
    alone.stop()


def test_how_long_a_decision_waits_for_messages():
    """Until the host needs the time, and a prediction cannot be trusted; then for a result."""
    alone = Alone(cost=COST.scaled(1e3))
    worker, ledger = alone.worker, alone.worker.instance
    now, worker.clock = 10.0, lambda: now
    ledger.add(Request("a", 0.0, [1] * 9, 2, SLO))
    batch = worker.policy(ledger, now)
    worker._begin(batch, now)
    worker._start_step(batch, now)
    step_s = batch.predicted_s
    for host_s, lead_s in (
        (0.0, 0.0),
        (1e-3, 4e-3),
        (0.01, 0.02 + 0.05 * step_s),
        (9.0, step_s / 2),
    ):
        worker._host_s = host_s
        assert alone.spare_s() == pytest.approx(step_s - lead_s)
    now += step_s
    assert alone.spare_s() == 0.0
    worker._expect()
    assert alone.spare_s() is None


def test_an_output_that_its_token_stops_costs_a_row_and_gives_no_token():
    prompt, num_before = [1, 2, 3], 4
    tokens = fakes.expected_tokens(prompt, 20)
    stop = frozenset(tokens[num_before : num_before + 1])
    alone = Alone()
    alone.submit("stops", prompt, 20, stop=stop)
    alone.submit("goes on", prompt, 9)
    alone.worker.start()
    alone.until(lambda: "stops" in alone.ended)
    alone.until(lambda: "goes on" in alone.ended)
    alone.stop()
    assert alone.tokens["stops"] == tokens[: num_before + 1]
    assert alone.tokens["goes on"] == fakes.expected_tokens(prompt, 9)
    assert alone.ended == {"stops": "stop", "goes on": "length"}
    rows = sum("stops" in step for step in alone.engine.steps)
    assert rows == num_before + 2
    assert alone.worker.ran.num_wasted == 1


def test_the_kv_of_a_prompt_is_copied_right_behind_its_step():
    alone = Alone(Role.PREFILL, fakes.CONFIG)
    for number in range(3):
        alone.submit(str(number), [number] * 32, 5)
    alone.worker.start()
    alone.until(lambda: len(alone.ended) >= 2)
    log = list(alone.engine.log)
    assert log.index(("read", 0)) < log.index(("start", 1)) < log.index(("result", 0))
    alone.until(lambda: len(alone.ended) == 3)
    assert alone.ended == dict.fromkeys("012")
    assert all(alone.tokens[id] == fakes.expected_tokens([int(id)] * 32, 1) for id in "012")
    alone.stop()


def test_a_first_token_that_ends_the_output_drops_the_copy():
    prompt = [5] * 32
    alone = Alone(Role.PREFILL, fakes.CONFIG)
    alone.submit("stops", prompt, 5, stop=frozenset(fakes.expected_tokens(prompt, 1)))
    alone.submit("one", [6] * 32, 1)
    alone.submit("last", [7] * 32, 5)
    alone.worker.start()
    alone.until(lambda: len(alone.engine.steps) >= 3)
    alone.until(lambda: len(alone.ended) == 3)
    assert alone.ended == {"stops": "stop", "one": "length", "last": None}
    assert alone.transport.num_offers == 1
    alone.stop()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("config", [TIGHT, ROOMY], ids=["tight", "roomy"])
def test_tokens_are_those_of_the_model_whatever_ends_when(seed, config):
    """Prompts that begin alike, outputs that stop, of one token, cancelled, not finite; and a pool
    of which the last page is given.
    """
    rng, alone = random.Random(seed), Alone(config=config)
    alone.engine.bad = 96
    asked, cancelled = {}, {}
    for number in range(24):
        prompt = [3] * rng.choice([0, 8, 16]) + [
            rng.randrange(97) for _ in range(rng.randint(1, 14))
        ]
        max_tokens = rng.choice([1, 2, 5, 20])
        stop = frozenset(rng.sample(range(97), rng.choice([0, 0, 12])))
        asked[str(number)] = prompt, max_tokens, stop
        if rng.random() < 0.2:
            cancelled[str(number)] = rng.randrange(4)
    plain = alone.emit

    def emit(event):
        """Cancels some, as soon as they have so many tokens."""
        plain(event)
        for id, count in list(cancelled.items()):
            if len(alone.tokens.get(id, ())) >= count > 0 and id not in alone.ended:
                alone.worker.post(Cancel(id))
                alone.ended[id] = "cancelled"
                alone.events.put(event)  # until() may have looked before this one counted as ended

    alone.worker.emit = emit
    for id, (prompt, max_tokens, stop) in asked.items():
        alone.submit(id, prompt, max_tokens, stop=stop)
    for id, count in cancelled.items():
        if not count:
            alone.worker.post(Cancel(id))
            alone.ended[id] = "cancelled"
    alone.worker.start()
    alone.until(lambda: len(alone.ended) == len(asked))
    records = alone.stop()
    for id, request in asked.items():
        expected, told = cut(*request), alone.tokens.get(id, [])
        spoilt = 96 in request[0] or 96 in expected[:-1]
        assert told == expected[: len(told)], id
        if id not in cancelled:
            assert alone.ended[id] == "not_finite" if spoilt else told == expected, id
    assert alone.worker.ran.num_ahead > len(alone.engine.steps) // 2
    assert any(verb == "expect" for _, verb, *_ in records)


def test_what_needs_the_last_result_waits_for_it_and_is_counted():
    """A prompt whose pages another computes, one that lacks pages which another gives back, and
    evictions.
    """
    counted = []
    for requests in (
        [([4] * 33, 2), ([4] * 40, 2)],
        [([4] * 40, 2), ([5] * 41, 2), ([6] * 42, 2)],
        [([4] * 12, 40), ([5] * 12, 40), ([6] * 12, 40), ([7] * 12, 40)],
    ):
        alone = Alone()
        for number, (prompt, max_tokens) in enumerate(requests):
            alone.submit(str(number), prompt, max_tokens)
        alone.worker.start()
        alone.until(lambda alone=alone, requests=requests: len(alone.ended) == len(requests))
        alone.stop()
        for number, request in enumerate(requests):
            assert alone.tokens[str(number)] == fakes.expected_tokens(*request)
        counted.append(alone.worker.ran.num_waited)
    assert all(counted), counted


def test_evicted_kv_is_copied_in_parts_beside_the_steps_of_others():
    alone = Alone(config=fakes.altered(TIGHT, max_context=88))
    requests = {"long": ([4] * 66, 20), "short": ([5] * 9, 40)}  # nine pages, in three blocks
    for id, request in requests.items():
        alone.submit(id, *request)
    alone.worker.start()
    alone.until(lambda: len(alone.ended) == 2)
    records = alone.stop()
    verbs = [record[1] for record in records]
    evicts = [record[1] == "begin" and bool(record[6]) for record in records]
    first = evicts.index(True)
    until_copied = verbs[first + 1 : verbs.index("copied", first)]
    assert "begin" in until_copied, "the other one steps between the parts"
    assert alone.engine.most_copied == 1
    assert alone.tokens == {id: fakes.expected_tokens(*each) for id, each in requests.items()}


@pytest.mark.parametrize("point", ["start", "result"])
@pytest.mark.parametrize("number", range(7))
def test_cancelled_at_any_point_it_takes_nothing_with_it(point, number):
    alone = Alone()

    class Cancelling:
        """Cancels a request when a step is dispatched, or when its result is there."""

        limits, wire_sharding = alone.engine.limits, None

        def __getattr__(self, name):
            return getattr(alone.engine, name)

        def start(self, work):
            step, wait = len(alone.engine.steps), alone.engine.start(work)
            if (point, number) == ("start", step):
                alone.worker.post(Cancel("gone"))

            def result():
                if (point, number) == ("result", step):
                    alone.worker.post(Cancel("gone"))
                return wait()

            return result

    alone.worker.engine = alone.worker.moves.engine = Cancelling()
    prompts = {"gone": [1] * 20, "stays": [2] * 20, "comes": [1] * 24}
    for id, prompt in prompts.items():
        alone.submit(id, prompt, 12)
    alone.worker.start()
    alone.until(lambda: {"stays", "comes"} <= alone.ended.keys())
    alone.stop()
    for id in ("stays", "comes"):
        assert alone.tokens[id] == fakes.expected_tokens(prompts[id], 12)
    told = alone.tokens.get("gone", [])
    assert told == fakes.expected_tokens(prompts["gone"], 12)[: len(told)]
    assert len(told) < 12


def test_what_is_handed_back_with_a_step_under_way_gives_no_more_tokens():
    alone = Alone()
    alone.at_third = lambda: alone.worker.post(HandBack(running=True))
    alone.submit("a", [1, 2, 3], 30)
    alone.worker.start()
    while not isinstance(event := alone.events.get(timeout=30), Returned):
        pass
    assert event == Returned("a")
    count = len(alone.tokens["a"])
    alone.stop()
    assert 3 <= len(alone.tokens["a"]) == count < len(alone.engine.steps)


def test_a_worker_that_stops_tells_what_its_steps_gave():
    alone = Alone()
    alone.at_third = lambda: alone.worker._inbox.put(_Stop())
    alone.submit("a", [1, 2, 3], 30)
    alone.worker.start()
    alone.worker._thread.join(30)
    alone.worker.stop()
    told = len(alone.tokens["a"])
    assert told == len(alone.engine.steps), "the tokens of every step that was dispatched"
    assert alone.worker.instance.running["a"].num_tokens == told


@pytest.mark.parametrize("config", [TIGHT, ROOMY], ids=["tight", "roomy"])
@pytest.mark.parametrize("seed", range(6))
def test_kv_that_is_handed_over_is_that_of_the_prompt(seed, config):
    rng, config = random.Random(seed), fakes.altered(config, colocated=False)
    transport = LocalTransport()
    prefill, decode = (Alone(role, config, transport) for role in (Role.PREFILL, Role.DECODE))
    asked = {
        str(number): Request(
            str(number),
            time.monotonic(),
            [3] * rng.choice([0, 8, 16]) + [rng.randrange(97) for _ in range(rng.randint(1, 14))],
            rng.choice([1, 2, 5, 20]),
            SLO,
            stop=frozenset(rng.sample(range(97), rng.choice([0, 12]))),
        )
        for number in range(24)
    }
    plain, ended = prefill.emit, threading.Event()

    def handed_over(event):
        plain(event)
        for output in event.outputs if isinstance(event, Stepped) else ():
            if output.ticket:
                first = (output.token.id,)
                decode.worker.post(Handover(asked[output.id], first, output.at, output.ticket))

    def moved(event):
        decode.emit(event)
        if isinstance(event, Moved):
            prefill.worker.post(Release(event.id))
        over = {id for id, why in prefill.ended.items() if why} | decode.ended.keys()
        if over == asked.keys():
            ended.set()

    prefill.worker.emit, decode.worker.emit = handed_over, moved
    for request in asked.values():
        prefill.worker.post(Submit(request))
    for each in (prefill, decode):
        each.worker.start()
    prefill.until(lambda: len(prefill.ended) == len(asked))
    assert ended.wait(30)
    assert prefill.engine.most_copied == decode.engine.most_copied == 1
    for each in (prefill, decode):
        each.stop()
        assert each.worker.ran.num_ahead
    for id, request in asked.items():
        told = prefill.tokens[id] + decode.tokens.get(id, [])
        assert told == cut(request.prompt, request.max_tokens, request.stop), id
