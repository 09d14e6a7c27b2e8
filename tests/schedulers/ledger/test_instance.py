"""The ledger's verbs: random ones against a model in plain Python, and the words of its errors."""

import dataclasses
import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers.ledger.instance import Batch, Instance, Limits, Role
from schedulers.ledger.pages import OutOfPages
from schedulers.ledger.request import Request, Seq, Slo
from schedulers.ledger.rows import Column

LIMITS = Limits(max_batch=8, max_chunk=16, max_context=26, page_size=2, num_pages=32)


@dataclass
class Known:
    """All that should be known of one request. Pages are a number."""

    request: Request
    place: str
    computed: int
    count: int
    ready: bool
    first_at: float | None
    due: float | None
    pages: int = 0
    evicting: bool = False
    worst_slack: float = math.inf

    @property
    def length(self):
        return len(self.request.prompt) + self.count

    @property
    def remaining(self):
        return self.length - self.computed

    @property
    def lacks(self):
        """Pages for the tokens it has."""
        return math.ceil(self.length / LIMITS.page_size) - self.pages


@dataclass
class Begun:
    """A step. whole: those that it computes to their ends; full: those that then have all that
    they may have, or are parked. Both are known once it is expected to end.
    """

    batch: Batch
    expected: bool = False
    whole: tuple[str, ...] = ()
    full: tuple[str, ...] = ()


class Verbs:
    """A ledger and what is known of it, led through random verbs: only what a policy may decide is
    begun, and only what an engine can tell is ended. A step may begin behind one that is expected.
    """

    def __init__(self, role: Role, rng: random.Random):
        self.role, self.rng = role, rng
        self.instance = Instance("i", role, LIMITS)
        self.model: dict[str, Known] = {}
        self.steps: list[Begun] = []
        self.now, self.number, self.num_ahead = 0.0, 0, 0

    def do_one(self):
        step = self.begin
        if self.steps:
            expected = self.steps[0].expected
            first = self.begin if expected else self.expect
            step = self.end if len(self.steps) > 1 else self.rng.choice([first, self.end])
        verbs = {self.add: 2, step: 6, self.fetched: 2, self.copied: 1, self.release: 1}
        (verb,) = self.rng.choices([*verbs, self.cancel], [*verbs.values(), 0.5])
        verb()

    def subset(self, ids):
        """All, or some, in any order."""
        some = self.rng.choice([len(ids), self.rng.randint(0, len(ids))])
        return self.rng.sample(ids, some)

    def few(self, ids):
        return [id for id in ids if self.rng.random() < 0.1]

    def those(self, place, **is_so):
        return [
            id
            for id, known in self.model.items()
            if known.place == place
            and all(getattr(known, name) == value for name, value in is_so.items())
        ]

    def add(self):
        least = 1 if self.role is Role.DECODE else 0
        num_prompt, max_tokens = self.rng.randint(1, 20), self.rng.randint(1 + least, 6)
        most = 0 if self.role is Role.PREFILL else max_tokens - 1
        count = self.rng.randint(least, most)
        slo = Slo(1, 0.5)
        request = Request(str(self.number), self.now, range(num_prompt), max_tokens, slo, serial=7)
        first_at = self.now - 0.25 if count else None
        self.instance.add(request, count, first_at)
        self.model[request.id] = Known(
            request,
            "waiting",
            computed=num_prompt + count - 1 if count else 0,
            count=count,
            ready=not count,
            first_at=first_at,
            due=first_at + 0.5 * count if count else None,
        )
        self.number += 1

    def begin(self):
        model, running = self.model, self.those("running")
        free = LIMITS.num_pages - sum(known.pages for known in model.values())
        evict = []
        if self.role is not Role.PREFILL and not self.steps:
            evict = self.few([id for id in running if model[id].count])
        stay = [id for id in running if id not in evict]
        grow = []
        if self.role is not Role.PREFILL:
            for id in stay:
                if model[id].lacks <= free:
                    free -= model[id].lacks
                    grow.append(id)
        fetch, admit = [], []
        for ids, chosen in (
            (self.those("waiting", ready=False, pages=0, evicting=False), fetch),
            (self.those("waiting", ready=True), admit),
        ):
            for id in self.subset(ids):
                if model[id].lacks <= free:
                    free -= model[id].lacks
                    chosen.append(id)
        steps = admit + self.subset(grow if self.role is not Role.PREFILL else stay)
        work = {id: self.rng.randint(1, model[id].remaining) for id in steps}
        batch = Batch(work, tuple(fetch), tuple(evict), 0.1 if work else 0.0)
        self.instance.begin(batch, self.now)
        for id in evict:
            model[id].place, model[id].ready, model[id].evicting = "waiting", False, True
        for id in fetch + [id for id in admit if id in work]:
            model[id].pages += model[id].lacks
        for id in work:
            model[id].place = "running"
        if work:
            self.num_ahead += bool(self.steps)
            self.steps.append(Begun(batch))
            for id in work if self.role is not Role.PREFILL else ():
                model[id].pages += model[id].lacks

    def expect(self):
        (step,) = self.steps
        self.now += self.rng.uniform(0.0, 0.2)
        self.book(step, max(self.now, self.instance.busy_until))
        left = self.instance.expect(self.now)
        assert {seq.request.id for seq in left} == set(step.full)
        for id in step.full:
            self.model[id].place = "ending"

    def book(self, step, at):
        """What a step is certain to do. Times are what they would be if its end was at `at`."""
        model = self.model
        work = {id: n for id, n in step.batch.work.items() if id in model}
        step.expected = True
        step.whole = tuple(id for id, n in work.items() if model[id].remaining == n)
        for id, n in work.items():
            model[id].computed += n
        for id in step.whole:
            self.give_token(model[id], at)
        step.full = tuple(
            id
            for id in step.whole
            if self.role is Role.PREFILL or model[id].count == model[id].request.max_tokens
        )

    def end(self):
        self.now += self.rng.uniform(0.01, 1.0)
        step = self.steps.pop(0)
        if not step.expected:
            self.book(step, self.now)
        for later in self.steps:
            assert not later.expected
        whole = [id for id in step.whole if id in self.model]
        stopped = self.few(whole)
        left = self.instance.end(step.batch, self.now, stopped)
        expected = {}
        for id in whole:
            known = self.model[id]
            self.settle(known)
            if id in stopped or known.count == known.request.max_tokens:
                expected[id] = "stop" if id in stopped else "length"
            elif id in step.full:
                expected[id] = None
        assert {seq.request.id: seq.finish_reason for seq in left} == expected
        for seq in left:
            self.compare(seq, self.model[seq.request.id])
        for id, reason in expected.items():
            if reason:
                del self.model[id]
            else:
                self.model[id].place = "parked"

    def give_token(self, known, at):
        if known.count == 0:
            known.first_at = known.due = at
        known.count += 1
        known.due += 0.5

    def settle(self, known):
        """Its last token is there."""
        if known.count == 1:
            known.first_at, known.due = self.now, self.now + 0.5
        else:
            known.worst_slack = min(known.worst_slack, known.due - 0.5 - self.now)

    def fetched(self):
        far = self.those("waiting", ready=False, evicting=False)
        under_way = [id for id in far if self.model[id].pages]
        for id in self.subset(under_way):
            self.instance.fetched(id)
            self.model[id].ready = True

    def copied(self):
        for id in self.subset(self.those("parked") + self.those("waiting", evicting=True)):
            self.instance.copied(id)
            self.model[id].pages, self.model[id].evicting = 0, False

    def release(self):
        self.instance.release("nobody")
        for id in self.subset(self.those("parked")):
            self.instance.release(id)
            del self.model[id]

    def cancel(self):
        assert not self.instance.cancel("nobody")
        for id in self.few(list(self.model)):
            assert self.instance.cancel(id)
            assert self.instance.get(id) is None
            del self.model[id]

    def check(self):
        instance = self.instance
        instance.check()
        for place in ("waiting", "running", "parked", "ending"):
            assert set(getattr(instance, place)) == set(self.those(place))
        for id, known in self.model.items():
            seq = instance.get(id)
            assert seq is not None
            self.compare(seq, known)
            assert len(seq.pages) == known.pages
        held = sum(known.pages for known in self.model.values())
        assert instance.pages.num_free == LIMITS.num_pages - held
        leaving = self.those("waiting", evicting=True)
        assert set(instance.evicting) == set(leaving)
        assert instance.num_leaving == sum(self.model[id].pages for id in leaving)
        assert instance.parked_tokens == sum(self.model[id].computed for id in self.those("parked"))

    def compare(self, seq: Seq, known: Known):
        assert seq.request is known.request
        assert (seq.computed, seq.num_tokens, seq.length, seq.ready) == (
            *(known.computed, known.count, known.length, known.ready),
        )
        assert seq.first_token_at == known.first_at
        # Where an instance gives the first token, that one counts as having had no slack.
        slack = min(seq.worst_slack, 0.0)
        assert slack == pytest.approx(min(known.worst_slack, 0.0), abs=1e-9)
        cells = seq.cells
        assert known.due is None or cells[Column.DUE] == known.due
        assert (cells[Column.DEADLINE], cells[Column.SERIAL]) == (known.request.arrival + 1, 7)
        decodes = self.role is not Role.PREFILL
        if decodes and known.count and known.count < known.request.max_tokens:
            assert known.count < cells[Column.EXPECTED] <= known.request.max_tokens


@pytest.mark.parametrize("role", Role)
@given(st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_random_verbs(role, seed):
    verbs = Verbs(role, random.Random(seed))
    for _ in range(150):
        verbs.do_one()
        verbs.check()


@pytest.mark.parametrize("role", Role)
def test_random_verbs_do_begin_steps_ahead(role):
    verbs = Verbs(role, random.Random(1))
    for _ in range(1500):
        verbs.do_one()
    assert verbs.num_ahead > 10


def request(id="a", num_prompt=6, max_tokens=9, **fields):
    return Request(id, 0.0, range(num_prompt), max_tokens, Slo(1.0, 0.5), **fields)


def test_admission_is_in_the_order_of_the_work():
    """Not of a set, whose order is another in each process: a replay would break ties otherwise."""
    instance = Instance("p", Role.PREFILL, LIMITS)
    ids = [f"r{i}" for i in range(8)]
    for id in ids:
        instance.add(request(id, 1))
    order = ids[::-2] + ids[::2]
    instance.begin(Batch(dict.fromkeys(order, 1)), 0.0)
    assert list(instance.running) == order


def test_pages_are_given_as_a_sequence_grows():
    instance = Instance("d", Role.DECODE, LIMITS)
    seq = instance.add(request(num_prompt=6, max_tokens=19), 1, 0.0)
    instance.begin(Batch(fetch=("a",)), 0.0)
    instance.fetched("a")
    held = []
    for now in range(6):
        instance.begin(batch := Batch({"a": 1}), now)
        held.append((seq.length, len(seq.pages)))
        instance.end(batch, now + 0.5)
    assert held == [(7, 4), (8, 4), (9, 5), (10, 5), (11, 6), (12, 6)]


def test_spread_tells_how_far_steps_are_from_their_predictions():
    instance = Instance("p", Role.PREFILL, LIMITS)
    instance.add(request(num_prompt=20))
    for number in range(19):
        instance.begin(batch := Batch({"a": 1}, predicted_s=1.0), 0.0)
        instance.end(batch, 2.0 if number % 2 else 1.0)
    assert 0.1 < instance.spread < 0.4
    steady = Instance("p", Role.PREFILL, LIMITS)
    assert steady.spread == 0.0
    steady.add(request(num_prompt=20))
    for _ in range(19):
        steady.begin(batch := Batch({"a": 1}, predicted_s=1.0), 0.0)
        steady.end(batch, 1.0)
    assert steady.spread == 0.0


def test_pace_follows_the_measured_steps_slowly():
    instance = Instance("p", Role.PREFILL, LIMITS)
    instance.add(request(num_prompt=20))
    assert instance.pace == 1.0
    instance.begin(batch := Batch({"a": 1}, predicted_s=1.0), 10.0)
    assert instance.busy_until == 11.0
    instance.end(batch, 13.0)
    assert instance.pace == 1 + 2 / 11, "the profile counts for ten steps"
    instance.begin(batch, 20.0)
    instance.end(batch, 9999.0)
    assert instance.pace < 2, "one stalled step does not turn it"
    pace = instance.pace
    instance.begin(unpredicted := Batch({"a": 1}), 20.0)
    instance.end(unpredicted, 9999.0)
    assert instance.pace == pace


def decoding(ids, max_tokens=9):
    """A decode instance that has the KV of these."""
    instance = Instance("d", Role.DECODE, LIMITS)
    for id in ids:
        instance.add(request(id, max_tokens=max_tokens), 1, 0.0)
    instance.begin(Batch(fetch=tuple(ids)), 0.0)
    for id in ids:
        instance.fetched(id)
    return instance


def test_a_step_behind_another_begins_when_that_ends():
    instance = Instance("p", Role.PREFILL, LIMITS)
    for id in ("a", "b"):
        instance.add(request(id))
    instance.begin(first := Batch({"a": 6}, predicted_s=1.0), 10.0)
    (left,) = instance.expect(10.5)
    assert (left.request.id, left.first_token_at) == ("a", 11.0), "by when it is predicted"
    instance.begin(second := Batch({"b": 6}, predicted_s=2.0), 10.6)
    b = instance.running["b"]
    assert (b.begun_at, instance.busy_until) == (10.6, 13.0)
    instance.end(first, 12.0)
    assert left.first_token_at == 12.0
    assert (b.begun_at, instance.busy_until) == (12.0, 12.0 + 2 * instance.pace)
    pace = instance.pace
    instance.end(second, 14.0)
    assert instance.pace == pace + (1.0 - pace) / 12, "it took two seconds, as predicted"


def test_what_a_token_stops_is_in_the_step_behind_and_gets_nothing_of_it():
    instance = decoding(["a", "b"])
    instance.begin(first := Batch({"a": 1, "b": 1}), 1.0)
    assert instance.expect(1.5) == []
    instance.begin(second := Batch(instance.running.ones), 1.5)
    (a,) = instance.end(first, 2.0, ["a"])
    assert (a.request.id, a.finish_reason, a.num_tokens) == ("a", "stop", 2)
    assert instance.end(second, 3.0) == []
    assert [seq.num_tokens for seq in instance.running.values()] == [3]
    assert a.num_tokens == 2
    instance.check()


def test_what_has_all_its_tokens_keeps_its_pages_until_its_result_is_there():
    instance = decoding(["a"], max_tokens=2)
    free = instance.pages.num_free
    instance.begin(first := Batch({"a": 1}), 1.0)
    (a,) = instance.expect(1.5)
    assert list(instance.ending) == ["a"]
    assert instance.get("a") is a
    assert not instance.running
    assert instance.pages.num_free == free
    assert instance.end(first, 2.0, ["a"]) == [a]
    assert a.finish_reason == "stop", "the last that it may have is a stop token"
    assert instance.pages.num_free == LIMITS.num_pages


def test_a_prompt_that_lacks_what_the_expected_step_gives_back_awaits_it():
    limits = dataclasses.replace(LIMITS, num_pages=14)
    instance = Instance("p", Role.PREFILL, limits)
    for id, num_prompt in (("a", 20), ("small", 8), ("large", 16)):
        instance.add(request(id, num_prompt))
    instance.begin(first := Batch({"a": 20}), 0.0)
    instance.expect(0.5)
    assert instance.awaits_result, "the large one needs 8 pages, 4 are free, and 10 are held"
    instance.cancel("large")
    assert not instance.awaits_result
    instance.end(first, 1.0)


def test_parked_room_sets_running_prompts_aside():
    limits = dataclasses.replace(LIMITS, parked_tokens=40)
    instance = Instance("p", Role.PREFILL, limits)
    assert instance.parked_room == 40
    instance.add(request(num_prompt=6))
    instance.begin(batch := Batch({"a": 6}), 0.0)
    assert instance.parked_room == 34
    instance.end(batch, 1.0)
    instance.copied("a")
    assert (instance.parked_room, instance.pages.num_free) == (34, LIMITS.num_pages)
    instance.release("a")
    assert instance.parked_room == 40
    assert Instance("p", Role.PREFILL, LIMITS).parked_room == math.inf


def test_ids_of_prompt_and_output():
    seq = Instance("d", Role.DECODE, LIMITS).add(request(num_prompt=3), 2, 0.0, tokens=(70, 71))
    assert seq.token_ids(0, 5) == [0, 1, 2, 70, 71]
    assert (seq.token_ids(2, 4), seq.token_ids(4, 5)) == ([2, 70], [71])


def test_verbs_that_cannot_be():
    instance = Instance("d", Role.DECODE, LIMITS)
    instance.add(request("a"), 1, 0.0)
    with pytest.raises(ValueError, match="request id 'a' is in use on instance 'd'"):
        instance.add(request("a"))
    with pytest.raises(ValueError, match="'d': a step has ended that was not begun"):
        instance.end(Batch({"a": 1}), 1.0)
    with pytest.raises(ValueError, match="'d': no step can be expected to end"):
        instance.expect(1.0)
    busy = decoding(["a"])
    busy.begin(Batch({"a": 1}), 0.0)
    with pytest.raises(ValueError, match="'d': a step began behind one that is not expected"):
        busy.begin(Batch({"a": 1}), 0.0)
    busy.expect(0.5)
    busy.begin(Batch({"a": 1}), 0.5)
    with pytest.raises(ValueError, match="'d': no step can be expected to end"):
        busy.expect(1.0)
    with pytest.raises(AssertionError, match="request 'a' was scheduled before its KV arrived"):
        instance.begin(Batch({"a": 1}), 0.0)
    for number in range(7):
        instance.add(request(f"b{number}", num_prompt=20), 1, 0.0)
    with pytest.raises(OutOfPages, match="asked for"):
        instance.begin(Batch(fetch=tuple(f"b{number}" for number in range(7))), 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_batch": 0}, "limits.max_batch must be at least 1, got 0"),
        (
            {"num_pages": 6},
            "limits.num_pages must hold max_context = 26 tokens: at least 13, got 6",
        ),
        ({"parked_tokens": 9}, "limits.parked_tokens must be at least max_context = 26, got 9"),
    ],
)
def test_limits_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LIMITS, **change)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["ttft", "tpot"])
def test_slos_are_checked(name, value):
    with pytest.raises(ValueError, match=rf"slo.{name} must be a positive number of seconds, got"):
        Slo(**({"ttft": 1.0, "tpot": 1.0} | {name: value}))
