"""How much KV is copied between two steps, on a clock that stands still."""

import random
import threading

import fakes
import numpy as np
import pytest
from kv_nodes import offered

from kairos_jax.kv.transport import LocalTransport
from kairos_jax.worker.copies import MOST_S, Copies, Copy
from kairos_jax.worker.moves import Fetched, Moves
from schedulers.ledger.instance import Batch, Instance, Role
from schedulers.ledger.request import Request, Slo

LIMITS = fakes.CONFIG.limits(Role.DECODE)


class Bench:
    """Copies whose blocks take `block_s`, and whose calls take `call_s` of the host. made: the
    first and last of each part that was copied, by id.
    """

    def __init__(self, block_s, call_s=0.0):
        self.block_s, self.call_s, self.now = block_s, call_s, 0.0
        self.copies = Copies(lambda: self.block_s, lambda: self.now)
        self.made, self.ended = [], []

    def add(self, id, blocks, complete=True):
        def move(first, past, last):
            self.made.append((id, first, past, last))
            self.now += self.call_s

        return self.copies.add(id, Copy(move, lambda: self.ended.append(id), blocks, complete))

    def between(self, step_s=0.0):
        """Blocks that are copied between two steps."""
        self.made.clear()
        self.copies.step_begun(step_s)
        self.copies.make()
        return sum(past - first for _, first, past, _ in self.made)


def test_no_more_is_copied_between_two_steps_than_takes_two_milliseconds():
    bench = Bench(MOST_S / 4)
    bench.add("a", 10)
    assert [bench.between() for _ in range(4)] == [4, 4, 2, 0]
    assert bench.ended == ["a"]
    bench.add("a", 3)
    bench.add("b", 9)
    assert bench.between() == 4
    assert bench.made == [("a", 0, 3, True), ("b", 0, 1, False)]
    bench.copies.make()  # again, before the next step
    assert len(bench.made) == 2
    assert [bench.between() for _ in range(3)] == [4, 4, 0]


def test_the_time_of_the_calls_counts_where_it_is_longer():
    bench = Bench(MOST_S / 8, call_s=0.6 * MOST_S)
    for id in "abc":
        bench.add(id, 1)
    assert bench.between() == 2
    assert bench.between() == 1


@pytest.mark.parametrize(
    ("step_s", "blocks"), [(0.0, 1), (10 * MOST_S, 1), (100 * MOST_S, 3), (1000 * MOST_S, 33)]
)
def test_a_block_that_takes_longer_is_copied_all_the_same(step_s, blocks):
    """As on a CPU: a tenth of a step."""
    bench = Bench(3 * MOST_S)
    bench.add("a", 100)
    assert bench.between(step_s) == blocks


def test_where_it_is_not_known_how_long_a_block_takes_all_are_copied():
    bench = Bench(0.0)
    bench.add("a", 1000)
    assert bench.between() == 1000


def test_what_is_still_computed_is_copied_as_it_comes():
    bench = Bench(MOST_S / 2)
    part = bench.add("a", 1, complete=False)
    assert bench.between() == 1
    assert not bench.copies.waiting
    assert "a" in bench.copies
    part.past, part.complete = 3, True
    assert bench.between() == 2
    assert bench.made == [("a", 1, 3, True)]
    assert "a" not in bench.copies


def test_one_that_is_dropped_is_copied_no_further():
    bench = Bench(MOST_S)
    bench.add("a", 5)
    bench.add("b", 1)
    assert bench.between() == 1
    bench.copies.drop("a")
    assert bench.between() == 1
    assert bench.ended == ["b"]
    bench.copies.drop("a")


def test_those_that_are_left_when_a_worker_ends_are_copied_at_once():
    bench = Bench(MOST_S)
    bench.add("a", 5)
    bench.add("b", 7)
    assert bench.between() == 1
    bench.copies.finish_all()
    assert bench.ended == ["a", "b"]


@pytest.mark.parametrize("seed", range(20))
def test_every_block_is_copied_once_and_in_order(seed):
    rng = random.Random(seed)
    bench = Bench(MOST_S / rng.uniform(0.5, 9))
    sizes, made = {str(n): rng.randint(1, 20) for n in range(9)}, {}
    for id, blocks in sizes.items():
        bench.add(id, blocks)
    most = max(int(MOST_S / bench.block_s), 1)
    while bench.copies.waiting:
        assert 0 < bench.between() <= most
        for id, first, past, last in bench.made:
            assert made.get(id, 0) == first
            assert last == (past == sizes[id])
            made[id] = past
    assert made == sizes
    assert bench.ended == list(sizes)


class Pool:
    """The moves of a decode instance whose blocks take 2 ms each. said: by `Moved`."""

    def __init__(self):
        self.ledger, self.engine = Instance("d", Role.DECODE, LIMITS), fakes.FakeEngine(LIMITS)
        self.engine.copy_s, self.transport = MOST_S, LocalTransport()
        self.arrived, self.said = [], []
        self.moves = Moves(
            *(self.ledger, self.engine, self.transport, lambda: 0.0),
            *(self.arrived.append, self.said.append),
        )

    def fetch(self, id, prompt):
        """KV comes of a prompt that is a block longer than a step may bring in."""
        kv = [np.full((4, LIMITS.page_size), at, np.int32) for at in range(-(-len(prompt) // 32))]
        ticket = offered(self.transport, id, len(prompt), kv)
        self.ledger.add(Request(id, 0.0, prompt, 9, Slo(1.0, 1.0)), 1, 0.0, [5])
        self.moves.expect(ticket)
        self.ledger.begin(Batch(fetch=(id,)), 0.0)
        self.moves.write(Fetched(ticket, kv, 0.0))

    def step(self):
        self.moves.copies.step_begun(0.0)
        self.moves.copies.make()
        self.engine.wait()


def test_a_sequence_is_ready_when_all_of_its_kv_is_in_the_pool():
    pool = Pool()
    pool.fetch("a", [1] * 70)
    for _ in range(2):
        pool.step()
        assert not pool.ledger.waiting["a"].ready
        assert not pool.said
    pool.step()
    seq = pool.ledger.waiting["a"]
    assert seq.ready
    assert [event.id for event in pool.said] == ["a"]
    written = [pool.engine.pool[page][0] for page in seq.pages[:9]]
    assert written == [0] * 4 + [1] * 4 + [2]
    pool.transport.close()


def test_what_is_forgotten_in_between_is_written_no_further():
    pool = Pool()
    pool.fetch("a", [1] * 70)
    pool.step()
    pool.ledger.cancel("a")
    pool.moves.forget("a")
    pool.step()
    assert len(pool.engine.pool) == 4
    assert not pool.said
    assert pool.ledger.pages.num_free == LIMITS.num_pages
    pool.transport.close()


def test_pages_are_free_when_all_of_them_are_copied():
    pool = Pool()
    pool.fetch("a", [1] * 70)
    for _ in range(3):
        pool.step()
    pool.ledger.begin(batch := Batch({"a": 1}), 0.0)
    pool.ledger.end(batch, 0.0)
    seq = pool.ledger.hand_over("a", "a test")
    done, fetched = threading.Event(), []
    ticket = pool.moves.offer(seq)
    pool.transport.fetch(ticket, None, lambda kv: (fetched.append(kv), done.set()))
    for free in (False, False, True):
        assert pool.ledger.parked["a"].pages
        pool.step()
        assert (pool.ledger.pages.num_free == LIMITS.num_pages) == free
        assert free or not fetched, "it waits for all"
    assert done.wait(30)
    assert [int(block[0, 0]) for block in fetched[0]] == [0, 1, 2]
    pool.moves.forget("a")
    pool.transport.close()


def test_a_fetch_of_an_offer_that_is_dropped_before_it_is_whole_fails():
    transport, done, came = LocalTransport(), threading.Event(), []
    ticket = transport.open("a", 70)
    transport.fetch(ticket, None, lambda kv: (came.append(kv), done.set()))
    transport.extend(ticket, [np.zeros(1)])
    assert not came
    transport.release(ticket)
    assert done.wait(30)
    assert isinstance(came[0], LookupError)
    transport.close()
