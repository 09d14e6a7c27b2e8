"""The prefix cache in the ledger: which pages prompts share, when they go, that none is lost."""

import random
from collections.abc import Sequence

import pytest
from costs import decodes, prefills
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers.cost import CostModel, TransferCost
from schedulers.ledger.instance import Batch, Instance, Limits, Role
from schedulers.ledger.pages import OutOfPages, PageTable
from schedulers.ledger.request import Request, Seq, Slo
from schedulers.policies import decode

COST = CostModel(prefills(0, 1, 0), decodes(0, 0.01, 0), TransferCost(0, 1), 1000)
LIMITS = Limits(max_batch=8, max_chunk=16, max_context=12, page_size=2, num_pages=12)
_KEYS: dict[tuple[int, ...], int] = {}


def request(id: str, prompt: Sequence[int], page_size: int = LIMITS.page_size) -> Request:
    ends = range(page_size, len(prompt) + 1, page_size)
    keys = tuple(_KEYS.setdefault(tuple(prompt[:end]), len(_KEYS)) for end in ends)
    return Request(id, 0.0, prompt, 9, Slo(1.0, 0.5), page_keys=keys)


def run(instance: Instance, work: dict[str, int]) -> None:
    instance.begin(batch := Batch(work), 0.0)
    instance.end(batch, 1.0)
    instance.check()


def prefill(instance: Instance, id: str, prompt: Sequence[int]) -> list[int]:
    """Computes all of a prompt and lets it go. Returns the pages that it had."""
    seq = instance.add(request(id, prompt))
    instance.begin(batch := Batch({id: seq.remaining}), 0.0)
    instance.end(batch, 1.0)
    pages = list(seq.pages)
    instance.cancel(id)
    instance.check()
    return pages


def hand_over(instance: Instance, id: str, prompt: Sequence[int]) -> Seq:
    """A prompt comes to be decoded here, and its KV is asked for."""
    seq = instance.add(request(id, prompt), 1, 0.0)
    instance.begin(Batch(fetch=(id,)), 0.0)
    instance.check()
    return seq


def arrive(instance: Instance, id: str) -> None:
    instance.fetched(id)
    instance.check()


def cached(instance: Instance, prompt: Sequence[int]) -> int:
    """Tokens that would be found of it."""
    computed = instance.add(request("asked", prompt)).computed
    instance.cancel("asked")
    return computed


class Verbs:
    """A ledger led through random verbs. What it has in its pages is known: `content`, the token
    ids of each, written when a step ends or is expected to, as an engine would.
    """

    def __init__(self, role: Role, rng: random.Random):
        self.instance, self.rng, self.number = Instance("i", role, LIMITS), rng, 0
        self.content: dict[int, list[int]] = {}
        self.steps: list[Batch] = []  # that have begun: the first is expected, if there are two
        self.expected: list[str] | None = None  # what may be stopped by the expected step
        self.num_cached = self.num_ahead = 0

    def do_one(self):
        if self.expected is None:
            step = self.rng.choice([self.end, self.expect]) if self.steps else self.begin
        else:
            step = self.begin if len(self.steps) == 1 and self.rng.random() < 0.7 else self.end
        verbs = {self.add: 3, step: 6, self.let_go: 2, self.cancel: 0.5}
        (verb,) = self.rng.choices([*verbs], [*verbs.values()])
        verb()
        self.instance.check()

    def add(self):
        # So few different ones that most begin alike.
        prompt = [self.rng.choice([0, 0, 0, 1]) for _ in range(self.rng.randint(1, 10))]
        self.instance.add(request(str(self.number), prompt))
        self.number += 1

    def begin(self):
        instance, rng = self.instance, self.rng
        free = instance.pages.num_free
        if instance.role is Role.BOTH:
            free -= len(instance.running)
        work = {}
        for seq in instance.running.values():
            work[seq.request.id] = rng.randint(1, seq.remaining)
        for seq in rng.sample(instance.waiting.values(), len(instance.waiting)):
            if instance.pages_needed(seq) + 1 <= free and rng.random() < 0.7:
                free -= instance.pages_needed(seq) + 1
                work[seq.request.id] = rng.randint(1, seq.remaining)
        if free < 0 or not work:
            return
        found = {id: instance.waiting[id].computed for id in work if id in instance.waiting}
        self.steps.append(Batch(work))
        self.num_ahead += len(self.steps) == 2
        instance.begin(self.steps[-1], 0.0)
        for id, count in found.items():
            assert instance.running[id].cached == count, "what was decided upon"
            self.num_cached += count
            self.look(instance.running[id])

    def expect(self):
        self.expected = self.compute()
        self.instance.expect(1.0)

    def compute(self):
        """The step under way runs. Returns whose outputs may end by it."""
        (step,) = self.steps
        for id, count in step.work.items():
            if seq := self.instance.running.get(id):
                for position in range(seq.computed, seq.computed + count):
                    page = seq.pages[position // LIMITS.page_size]
                    ids = self.content.setdefault(page, [-1] * LIMITS.page_size)
                    known = seq.request.prompt[position : position + 1] or [7]
                    ids[position % LIMITS.page_size] = known[0]
        return [
            id
            for id, count in step.work.items()
            if self.instance.role is Role.BOTH
            and (seq := self.instance.running.get(id))
            and seq.remaining == count
            and (self.rng.random() < 0.4 or seq.length == LIMITS.max_context)
        ]

    def end(self):
        stopped = self.compute() if self.expected is None else self.expected
        stopped = [id for id in stopped if self.instance.get(id)]
        for id in self.some(self.steps[0].work) if self.expected is not None else ():
            # Its numbers are not finite: so nothing of it may be cached.
            if self.instance.get(id) and self.rng.random() < 0.3:
                self.spoil(self.instance.get(id))
                self.instance.cancel(id)
        for seq in self.instance.end(self.steps.pop(0), 1.0, stopped):
            if seq.pages:
                self.look(seq)
        self.expected = None
        for seq in self.instance.running.values():
            self.look(seq)

    def spoil(self, seq):
        """What the expected step has written of it is no KV of its tokens."""
        count = self.steps[0].work[seq.request.id]
        for page in seq.pages[(seq.computed - count) // LIMITS.page_size :]:
            if not any(page in other.pages for other in self.everyone() if other is not seq):
                self.content[page] = [-2] * LIMITS.page_size

    def everyone(self):
        instance = self.instance
        places = (instance.waiting, instance.running, instance.parked, instance.ending)
        return [seq for place in places for seq in place.values()]

    def look(self, seq):
        """What it has computed of its prompt is what its pages hold."""
        ids = [id for page in seq.pages for id in self.content.get(page, [-1, -1])]
        count = min(seq.computed, len(seq.request.prompt))
        assert ids[:count] == list(seq.request.prompt[:count])

    def let_go(self):
        for id in self.some(self.instance.parked):
            self.rng.choice([self.instance.copied, self.instance.release])(id)

    def cancel(self):
        for id in self.some([seq.request.id for seq in self.everyone()]):
            self.instance.cancel(id)

    def some(self, ids):
        return [id for id in ids if self.rng.random() < 0.3]


@pytest.mark.parametrize("role", [Role.PREFILL, Role.BOTH])
@given(st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_random_verbs(role, seed):
    verbs = Verbs(role, random.Random(seed))
    for _ in range(80):
        verbs.do_one()
    for seq in verbs.everyone():
        verbs.instance.cancel(seq.request.id)
    verbs.instance.check()
    assert verbs.instance.pages.num_free == LIMITS.num_pages
    assert not verbs.instance.pool._watchers


def test_random_verbs_do_find_what_is_cached():
    verbs = Verbs(Role.PREFILL, random.Random(1))
    for _ in range(300):
        verbs.do_one()
    assert verbs.num_cached > 50
    assert verbs.num_ahead > 10


def test_a_prompt_finds_the_whole_pages_that_it_has_in_common_with_an_earlier_one():
    instance = Instance("p", Role.PREFILL, LIMITS)
    first = prefill(instance, "a", [1, 2, 3, 4, 5])
    seq = instance.add(request("b", [1, 2, 3, 4, 9, 9]))
    assert (seq.computed, seq.remaining, seq.pages) == (4, 2, [])
    instance.begin(Batch({"b": 2}), 0.0)
    assert (seq.pages[:2], seq.cached) == (first[:2], 4)
    assert cached(instance, [1, 2, 9, 4, 5]) == 2
    assert cached(instance, [9, 2, 3, 4, 5]) == 0


@pytest.mark.parametrize(("length", "expected"), [(1, 0), (2, 0), (3, 2), (4, 2), (5, 4)])
def test_its_last_token_is_computed_in_any_case(length, expected):
    """Though all of its pages are whole and there."""
    instance = Instance("p", Role.PREFILL, LIMITS)
    prefill(instance, "a", [1, 2, 3, 4, 5])
    seq = instance.add(request("b", [1, 2, 3, 4, 5][:length]))
    assert seq.computed == expected
    run(instance, {"b": length - expected})
    assert instance.parked["b"].num_tokens == 1


def test_a_page_can_be_found_as_soon_as_the_chunk_that_fills_it_has_ended():
    instance = Instance("p", Role.PREFILL, LIMITS)
    instance.add(request("a", [1, 2, 3, 4, 5, 6]))
    waiting = instance.add(request("b", [1, 2, 3, 4, 5, 7]))
    run(instance, {"a": 1})
    assert waiting.computed == 0
    run(instance, {"a": 2})
    assert waiting.computed == 2
    run(instance, {"a": 2})
    assert waiting.computed == 4
    assert instance.waiting.computed.tolist() == [4.0]


def test_a_page_that_two_share_outlasts_the_cancel_of_one():
    instance = Instance("p", Role.PREFILL, LIMITS)
    prefill(instance, "a", [1, 2, 3])
    for id in ("b", "c"):
        instance.add(request(id, [1, 2, 3, 4, 5]))
    instance.begin(batch := Batch({"b": 1, "c": 1}), 0.0)
    b, c = instance.running.values()
    assert b.pages[0] == c.pages[0]
    assert instance.pages.num_shared == 1
    shared = c.pages[0]
    instance.cancel("b")
    instance.end(batch, 1.0)
    instance.check()
    assert instance.pages.num_shared == 0
    taken = instance.pages.alloc(instance.pages.num_free)
    assert shared not in taken
    assert c.pages[0] == shared


def test_two_that_compute_the_same_at_once_end_up_with_one_copy():
    instance = Instance("p", Role.PREFILL, LIMITS)
    for id in ("a", "b"):
        instance.add(request(id, [1, 2, 3, 4, 5]))
    instance.begin(batch := Batch({"a": 4, "b": 4}), 0.0)
    assert instance.pages.num_free == 12 - 6
    instance.end(batch, 1.0)
    instance.check()
    a, b = instance.running.values()
    assert a.pages[:2] == b.pages[:2]
    assert instance.pages.num_free == 12 - 4


def test_what_nobody_holds_goes_when_the_room_is_needed_the_longest_unheld_first():
    instance = Instance("p", Role.PREFILL, LIMITS)
    prefill(instance, "old", [1, 1, 1, 1, 1])
    prefill(instance, "new", [2, 2, 2, 2, 2])
    assert instance.pages.num_free == 12, "what is cached counts as free"
    waiting = instance.add(request("w", [1, 1, 1, 1, 9]))
    assert waiting.computed == 4
    held = instance.pages.alloc(9)  # 8 hold nothing
    assert waiting.computed == 2, "the last page of a prompt goes first"
    held += instance.pages.alloc(1)
    assert (waiting.computed, cached(instance, [2, 2, 2, 2, 9])) == (0, 4)
    instance.pages.free(held)
    instance.check()


def test_what_was_found_again_stays_longest():
    instance = Instance("p", Role.PREFILL, LIMITS)
    prefill(instance, "a", [1, 1, 1])
    prefill(instance, "b", [2, 2, 2])
    prefill(instance, "a again", [1, 1, 3])
    instance.pages.free(instance.pages.alloc(11))
    assert (cached(instance, [1, 1, 9]), cached(instance, [2, 2, 9])) == (2, 0)


def test_what_a_batch_has_found_is_not_given_to_others_of_it():
    """Though it is what nobody has held for the longest time, and nothing else is free."""
    instance = Instance("p", Role.PREFILL, LIMITS)
    prefill(instance, "a", [1, 1, 1, 1])
    prefill(instance, "b", [2, 2, 2, 2])
    instance.pages.alloc(12 - 6)
    instance.add(request("first", [3] * 6))
    found = instance.add(request("second", [1, 1, 1, 1, 5]))
    instance.begin(Batch({"first": 6, "second": 1}), 0.0)
    assert found.cached == 4
    assert len({page for seq in instance.running.values() for page in seq.pages}) == 6


@pytest.mark.parametrize("name", decode.POLICIES)
def test_an_eviction_frees_no_page_that_another_holds(name):
    """Three that share two pages of three each need a fourth, and none is free."""
    instance = Instance("b", Role.BOTH, LIMITS)
    prefill(instance, "prefix", [1, 1, 1, 1, 1])
    for id in ("a", "b", "c"):
        instance.add(request(id, [1, 1, 1, 1, ord(id), 1]))
    run(instance, dict.fromkeys("abc", 2))
    instance.pages.alloc(instance.pages.num_free)
    assert (instance.pages.num_free, instance.pages.num_shared) == (0, 4)
    batch = decode.POLICIES[name](COST)(instance, 1.0)
    assert len(batch.evict) == 2, "the first frees a page, and is one less to need one"
    instance.begin(batch, 1.0)
    assert not batch.work
    for id in batch.evict:
        instance.copied(id)
    batch = decode.POLICIES[name](COST)(instance, 1.0)
    assert len(batch.work) == 1
    instance.begin(batch, 1.0)
    assert sum(len(seq.pages) for seq in instance.running.values()) == 4


def test_nothing_is_shared_without_keys():
    instance = Instance("p", Role.PREFILL, LIMITS)
    prefill(instance, "a", [1, 2, 3, 4, 5])
    plain = Request("b", 0.0, [1, 2, 3, 4, 5], 9, Slo(1.0, 0.5))
    assert instance.add(plain).computed == 0
    decode = Instance("d", Role.DECODE, LIMITS)
    hand_over(decode, "a", [1, 2, 3, 4, 5])
    arrive(decode, "a")
    seq = decode.add(plain, 1, 0.0)
    decode.begin(Batch(fetch=("b",)), 0.0)
    assert (seq.cached, decode.pages.num_free) == (0, 12 - 6)


@pytest.mark.parametrize("prompt", [[1, 2, 3, 4], [1, 2, 3, 4, 9, 9, 9]])
def test_of_a_prompt_that_is_fetched_the_whole_pages_of_earlier_ones_are_here(prompt):
    """The last as well, if it is whole: nothing of it is to be computed."""
    instance = Instance("d", Role.DECODE, LIMITS)
    first = hand_over(instance, "a", [1, 2, 3, 4, 5])
    assert (first.cached, instance.pages.num_cached) == (0, 0)
    arrive(instance, "a")
    assert (first.cached, instance.pages.num_cached) == (0, 2)
    run(instance, {"a": 1})
    pages = first.pages[:2]
    free = instance.pages.num_free
    seq = hand_over(instance, "b", prompt)
    assert (seq.cached, seq.pages[:2]) == (4, pages)
    assert free - instance.pages.num_free == instance.limits.pages_for(seq.length) - 2
    instance.cancel("a")
    arrive(instance, "b")
    run(instance, {"b": 1})
    assert seq.pages[:2] == pages
    instance.cancel("b")
    assert instance.pages.num_free == LIMITS.num_pages


def test_two_that_fetch_the_same_at_once_end_up_with_one_copy():
    instance = Instance("d", Role.DECODE, LIMITS)
    a, b = (hand_over(instance, id, [1, 2, 3, 4, 5]) for id in "ab")
    assert b.cached == 0, "the pages of the other have not been written yet"
    assert instance.pages.num_free == 12 - 6
    arrive(instance, "b")
    arrive(instance, "a")
    assert a.pages[:2] == b.pages[:2]
    assert instance.pages.num_free == 12 - 4


def test_what_was_evicted_finds_its_beginning_again_while_it_lasts():
    instance = Instance("d", Role.DECODE, LIMITS)
    seq = hand_over(instance, "a", [1, 2, 3, 4, 5])
    arrive(instance, "a")
    run(instance, {"a": 1})
    for others, expected in ((0, 4), (11, 2), (12, 0)):
        instance.begin(Batch(evict=("a",)), 1.0)
        assert instance.pages.num_free < 12, "until they are copied"
        instance.copied("a")
        assert instance.pages.num_free == 12
        instance.pages.free(instance.pages.alloc(others))
        instance.begin(Batch(fetch=("a",)), 1.0)
        assert seq.cached == expected
        arrive(instance, "a")
        run(instance, {"a": 1})


def test_a_full_table_refuses_and_changes_nothing():
    table = PageTable(4)
    pages = table.alloc(3)
    assert table.cache(pages[:1], [17]) == pages[:1]
    table.free(pages[:2])
    with pytest.raises(OutOfPages, match="4 pages asked for, 3 of 4 free"):
        table.alloc(4)
    assert (17 in table, table.num_free, table.num_cached) == (True, 3, 1)
    table.check([pages[2:]])
    assert table.num_freed_by(table.share([17])) == 1


@pytest.mark.parametrize(
    ("held", "message"),
    [([[0, 1]], "leaked"), ([[0], [0, 2, 1]], "pages shared"), ([[0, 0, 1, 2]], "twice")],
)
def test_check_notices(held, message):
    table = PageTable(4)
    table.alloc(3)
    with pytest.raises(AssertionError, match=message):
        table.check(held)


def test_a_prompt_awaits_the_pages_that_an_expected_step_computes_of_it():
    instance = Instance("p", Role.PREFILL, LIMITS)
    instance.add(request("a", [1, 2, 3, 4, 5]))
    instance.begin(first := Batch({"a": 5}), 0.0)
    instance.add(request("other", [7, 7, 7, 7, 7]))
    instance.expect(0.5)
    assert not instance.awaits_result
    alike = instance.add(request("alike", [1, 2, 3, 4, 9]))
    assert instance.awaits_result
    assert alike.computed == 0, "what is not known to be finite is not shared"
    instance.end(first, 1.0)
    assert alike.computed == 4
    instance.check()


def test_what_turns_out_not_to_be_finite_is_never_cached():
    instance = Instance("p", Role.PREFILL, LIMITS)
    instance.add(request("a", [1, 2, 3, 4, 5]))
    instance.begin(first := Batch({"a": 5}), 0.0)
    instance.expect(0.5)
    instance.cancel("a")
    instance.end(first, 1.0)
    assert cached(instance, [1, 2, 3, 4, 5]) == 0
    assert instance.pages.num_free == LIMITS.num_pages
