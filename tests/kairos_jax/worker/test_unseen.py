"""What was sent and is not in a summary yet, at both ends."""

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kairos_jax.worker.unseen import Receipts, Unseen
from schedulers.ledger.instance import Role
from schedulers.policies.routing import Summary

IDLE = Summary("w", Role.DECODE, 5.0, [], [], 1.0, 0.0, math.inf)


def loads(amount):
    return lambda summary: replace(summary, load=summary.load + amount)


def test_what_was_sent_counts_until_a_summary_has_it():
    unseen = Unseen(IDLE)
    unseen.sent(loads(1))
    unseen.sent(loads(10))
    assert unseen.summary.load == 11
    unseen.update(replace(IDLE, load=1), 1)
    assert unseen.summary.load == 11, "the first is in the summary, the second is added"
    unseen.sent(loads(100))
    unseen.update(replace(IDLE, load=11), 2)
    assert unseen.summary.load == 111
    unseen.update(replace(IDLE, load=0), 3)
    assert unseen.summary.load == 0


def test_a_place_counts_until_it_is_given_up():
    unseen = Unseen(IDLE)
    unseen.book("a", loads(1))
    unseen.book("b", loads(10))
    unseen.book("a", loads(2))
    assert unseen.summary.load == 12
    unseen.update(replace(IDLE, load=100), 0)
    assert unseen.summary.load == 112
    unseen.unbook("a")
    unseen.unbook("unknown")
    assert unseen.summary.load == 110
    unseen.unbook("b")
    assert unseen.summary.load == 100


@given(st.lists(st.sampled_from("abc")), st.data())
def test_each_router_is_told_of_its_own_requests(order, data):
    receipts = Receipts()
    for router in "ab":
        receipts.join(router)
    for router in order:
        receipts.posted(router)
    for count in sorted(data.draw(st.lists(st.integers(0, len(order))))):
        receipts.count(count)
        seen = order[:count]
        assert (receipts.of("a"), receipts.of("b")) == (seen.count("a"), seen.count("b"))
    receipts.leave("a")
    receipts.count(len(order))
    assert receipts.of("b") == order.count("b")
