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
    unseen = Unseen(IDLE, 0.0)
    unseen.sent(loads(1))
    unseen.sent(loads(10))
    assert unseen.summary(0.0).load == 11
    unseen.update(replace(IDLE, load=1), 1, 0.0)
    assert unseen.summary(0.0).load == 11, "the first is in the summary, the second is added"
    unseen.sent(loads(100))
    unseen.update(replace(IDLE, load=11), 2, 0.0)
    assert unseen.summary(0.0).load == 111
    unseen.update(replace(IDLE, load=0), 3, 0.0)
    assert unseen.summary(0.0).load == 0


def test_the_time_until_it_is_free_passes():
    unseen = Unseen(IDLE, 10.0)
    assert unseen.summary(12.0).free_s == 3.0
    assert unseen.summary(99.0).free_s == 0.0


def test_a_place_that_is_booked_while_a_summary_is_made_does_not_break_it():
    """As by the event loop, while a thread renders the metrics."""
    unseen = Unseen(IDLE, 0.0)

    def add(summary):
        unseen.book("b", loads(10))
        return replace(summary, load=summary.load + 1)

    unseen.book("a", add)
    assert unseen.summary(0.0).load == 1
    assert unseen.summary(0.0).load == 11


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
