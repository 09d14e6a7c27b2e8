"""Prefill policies on small ledgers whose answer can be worked out by hand."""

import itertools
import math
import random

import numpy as np
import pytest
from costs import decodes, prefills

from schedulers.cost import CostModel, TransferCost
from schedulers.ledger.instance import Batch, Instance, Limits, Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies import prefill

# A token takes 1 s, a step nothing more: predictions are prompt lengths.
COST = CostModel(prefills(0.0, 1.0, 0.0), decodes(1, 0, 0), TransferCost(0, 0), 1000)
LIMITS = Limits(max_batch=8, max_chunk=10, max_context=200, page_size=1, num_pages=200)


def ledger(requests, limits=LIMITS, max_tokens=1):
    """requests: {id: (arrival, ttft, num_prompt)}."""
    instance = Instance("p", Role.PREFILL, limits)
    for id, (arrival, ttft, num_prompt) in requests.items():
        instance.add(Request(id, arrival, range(num_prompt), max_tokens, Slo(ttft, 1.0)))
    return instance


def step(policy, instance, now):
    """One decision, run for as long as it was predicted to take. Returns it and its end."""
    batch = policy(instance, now)
    instance.begin(batch, now)
    now += batch.predicted_s
    instance.end(batch, now)
    return batch, now


def order(policy, instance, now):
    """Runs the instance until it is empty; the ids in the order in which they are stepped."""
    steps = []
    while instance.waiting or instance.running:
        batch, now = step(policy, instance, now)
        steps.append("+".join(batch.work))
    return steps


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # All are queued at 6.5 s. Deadlines: a 100.5, b 21.5, c 12.5, d 15.5; d needs 9 s, so it
        # just makes it alone, and c is hopeless from the start (8 s of work, 6 s left).
        ("fcfs", ["a", "a", "b", "c", "d"]),
        ("sjf", ["b", "c", "d", "a", "a"]),
        ("edf", ["c", "d", "b", "a", "a"]),
        # Laxities: a 74, b 8, d 0. After d, at 15.5 s, b has 6 s for 7: hopeless.
        ("kairos", ["d", "a", "a", "b", "c"]),
        # d and b cannot both be met, and b is the shorter; d has missed its chance by then.
        ("kairos_plus", ["b", "a", "a", "c", "d"]),
    ],
)
def test_order(name, expected):
    # No step begins on the even seconds, where the hopeless have their share of the clock.
    requests = {"a": (0.5, 100, 20), "b": (1.5, 20, 7), "c": (2.5, 10, 8), "d": (3.5, 12, 9)}
    assert order(prefill.POLICIES[name](COST, pack=0.0), ledger(requests), 6.5) == expected


@pytest.mark.parametrize(
    ("name", "first"),
    [("fcfs", "old"), ("sjf", "old"), ("edf", "old"), ("kairos", "old"), ("kairos_plus", "new")],
)
def test_only_kairos_plus_preempts_a_begun_prompt(name, first):
    instance = ledger({"old": (0, 500, 100)})
    policy = prefill.POLICIES[name](COST)
    _, now = step(policy, instance, 1.0)
    instance.add(Request("new", 10.0, range(5), 1, Slo(10.0, 1.0)))
    assert list(policy(instance, now).work) == [first]


@pytest.mark.parametrize("name", prefill.POLICIES)
def test_pages_that_do_not_fit_are_passed_over(name):
    limits = Limits(max_batch=8, max_chunk=10, max_context=20, page_size=1, num_pages=20)
    instance = ledger({"done": (0, 99, 10)}, limits, max_tokens=2)
    policy = prefill.POLICIES[name](COST)
    step(policy, instance, 1.0)
    assert "done" in instance.parked
    instance.add(Request("large", 1, range(11), 1, Slo(99, 1)))
    assert not policy(instance, 11.0), "waits for parked pages"
    instance.add(Request("small", 2, range(10), 1, Slo(99, 1)))
    assert dict(policy(instance, 11.0).work) == {"small": 10}
    instance.cancel("small")
    instance.copied("done")
    assert dict(policy(instance, 11.0).work) == {"large": 10}


@pytest.mark.parametrize("name", prefill.POLICIES)
def test_no_prompt_is_begun_that_could_not_be_parked(name):
    limits = Limits(
        max_batch=8, max_chunk=10, max_context=20, page_size=1, num_pages=99, parked_tokens=25
    )
    instance = ledger({"first": (0, 99, 10)}, limits, max_tokens=2)
    policy = prefill.POLICIES[name](COST, pack=0.0)
    step(policy, instance, 1.0)
    instance.copied("first")
    instance.add(Request("large", 1, range(16), 2, Slo(99, 1)))
    assert not policy(instance, 11.0), "10 of 25 are parked, and 16 more would be"
    instance.add(Request("fits", 2, range(15), 2, Slo(99, 1)))
    step(policy, instance, 11.0)
    assert list(instance.running) == ["fits"]
    instance.add(Request("small", 3, range(1), 2, Slo(999, 1)))
    assert list(policy(instance, 21.0).work) == ["fits"], "it will be parked, though it is not yet"
    instance.release("first")
    assert "large" not in policy(instance, 21.0).work, "its room is one token short"


@pytest.mark.parametrize("name", prefill.POLICIES)
@pytest.mark.parametrize(
    ("pack", "expected"),
    [
        (0.0, {"a": 3}),
        (1.0, {"a": 3, "b": 2}),  # b's 2 s are within the 4 s of base cost; c's 3 s are not left
        (math.inf, {"a": 3, "b": 2, "c": 3}),  # d's 4 tokens are more than max_chunk has left
    ],
)
def test_packing_joins_what_the_base_cost_pays_for(name, pack, expected):
    cost = CostModel(prefills(4.0, 1.0, 0.0), COST.decode, COST.transfer, 1000)
    # Every policy's order is a, b, c, d: by arrival, by deadline and by laxity; sjf takes b first.
    requests = {"a": (0, 90, 3), "b": (1, 91, 2), "c": (2, 93, 3), "d": (3, 95, 4)}
    batch = prefill.POLICIES[name](cost, pack)(ledger(requests), 5.0)
    if name == "sjf":
        expected = {0.0: {"b": 2}, 1.0: {"b": 2, "a": 3}}.get(pack, expected)
    assert dict(batch.work) == expected
    assert batch.predicted_s == 4.0 + sum(expected.values())


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        ({"a": (0, 9, 2), "b": (0, 20, 3)}, {"a": 2, "b": 3}),
        ({"a": (0, 4, 2), "b": (0, 20, 3)}, {"a": 2}),  # a ends at 3 s by itself, at 6 s with b
        ({"a": (0, 9, 2), "b": (0, 0.5, 3)}, {"a": 2}),  # b is late as it is, and would hold up a
        ({"a": (0, 0.5, 2), "b": (0, 0.9, 3)}, {"a": 2, "b": 3}),  # neither has anything to lose
        ({"a": (0, 9, 2), "b": (0, 20, 9)}, {"a": 2}),  # b does not end in this step
    ],
)
def test_kairos_plus_packs_while_none_becomes_late_by_it(requests, expected):
    assert dict(prefill.KairosPlus(COST)(ledger(requests), 1.0).work) == expected


def test_the_last_prompt_of_a_step_may_fill_it():
    instance = ledger({"a": (0, 99, 2), "b": (0, 100, 9)})
    assert dict(prefill.KairosPlus(COST, fill=True)(instance, 1.0).work) == {"a": 2, "b": 8}


def test_predictions_follow_the_pace():
    instance = ledger({"long": (0, 20, 10), "short": (0, 25, 2)})
    policy = prefill.Kairos(COST)
    assert list(policy(instance, 1.0).work) == ["long"]
    instance.pace = 2.0
    assert list(policy(instance, 1.0).work) == ["short"], "the long one has become hopeless"


def test_the_hopeless_have_their_share_of_the_clock():
    instance = ledger({"late": (0, 5, 9), "live": (99, 50, 9)})
    policy = prefill.KairosPlus(COST, hopeless_share=0.1, period_s=10.0)
    assert list(policy(instance, 100.5).work) == ["late"]
    assert list(policy(instance, 101.5).work) == ["live"]


def test_overdue_prompts_come_first_in_a_tenth_of_the_time():
    """That is after 20 TTFTs, if the tenth clears all late prompts within 80: 40 s of them."""
    prompts = {"late": (0, 5, 1), "live": (99, 50, 9)}
    policy = prefill.KairosPlus(COST, pack=0, hopeless_share=0.0, period_s=10.0)

    def first(now, **more):
        (id,) = policy(ledger(prompts | more), now).work
        return id

    assert first(99.5) == "live"
    assert first(100.5) == "late"
    assert first(101.5) == "live"
    assert first(100.5, more=(90, 5, 39)) == "late"
    assert first(100.5, more=(90, 5, 40)) == "live", "41 s of late prompts"
    assert first(100.5, late=(0, 5, 2)) == "live", "it takes more than a quarter of its TTFT"
    assert prefill.overdue(COST, ledger({}), 100.5).size == 0


def test_feasible_first_keeps_as_many_as_any_subset():
    """Against every subset, run by deadline."""
    rng = random.Random(1)
    for _ in range(50):
        deadline = np.array([rng.uniform(1, 12) for _ in range(6)])
        seconds = np.array([rng.uniform(0.1, 5) for _ in range(6)])
        order = prefill.feasible_first(np.arange(6), deadline, seconds, 0.0)
        assert sorted(order) == list(range(6))
        ends = seconds[order].cumsum()
        kept = int(np.argmin(ends <= deadline[order])) if (ends > deadline[order]).any() else 6
        dropped = seconds[order[kept:]]
        assert dropped.tolist() == sorted(dropped), "the others follow, shortest first"

        def feasible(subset, deadline=deadline, seconds=seconds):
            jobs = sorted(subset, key=lambda job: deadline[job])
            return bool((seconds[jobs].cumsum() <= deadline[jobs]).all())

        best = max(
            size
            for size in range(7)
            if any(feasible(subset) for subset in itertools.combinations(range(6), size))
        )
        assert kept >= best


def test_feasible_first_names_jobs_and_counts_from_now():
    jobs, deadline = np.array([7, 3, 5]), np.array([14.0, 12.0, 30.0])
    assert prefill.feasible_first(jobs, deadline, np.array([2.0, 2.0, 9.0]), 10.0) == [3, 7, 5]
    assert prefill.feasible_first(jobs, deadline, np.array([2.0, 2.1, 9.0]), 10.0) == [7, 5, 3]
    assert prefill.feasible_first(jobs[:0], deadline[:0], deadline[:0], 10.0) == []


def test_feasible_first_keeps_the_earliest_of_very_many():
    """The others, of which the last due may be left out, change nothing about the next step."""
    deadline = np.arange(10_000, 0.0, -1.0)
    order = prefill.feasible_first(np.arange(10_000), deadline, np.full(10_000, 0.9), 0.0)
    assert order[:3] == [9999, 9998, 9997]
    assert len(order) >= 1000


def test_packed_prompts_fill_the_chunk():
    cost = CostModel(prefills(9.0, 1.0, 0.0), COST.decode, COST.transfer, 1000)
    prompts = {"a": (0, 90, 2), "b": (1, 90, 3), "c": (2, 90, 5), "d": (3, 90, 1)}
    batch = prefill.fcfs(cost)(ledger(prompts), 5.0)
    assert dict(batch.work) == {"a": 2, "b": 3, "c": 5}, "together the chunk of 10"


@pytest.mark.parametrize("name", prefill.POLICIES)
def test_the_room_of_the_oldest_prompt_that_has_waited_for_very_long_is_kept_for_it(name):
    limits = Limits(max_batch=8, max_chunk=10, max_context=20, page_size=1, num_pages=20)
    instance = ledger({"held": (0, 99, 8)}, limits)
    instance.begin(Batch({"held": 8}), 0.0)
    instance.running["held"].request = Request("held", 0, range(8), 9, Slo(99, 1))
    instance.add(Request("long", 1, range(15), 1, Slo(5, 1)))
    instance.add(Request("short", 2, range(4), 1, Slo(999, 1)))
    policy = prefill.POLICIES[name](COST, 0.0)
    instance.end(Batch({"held": 8}), 8.0)
    # It has waited for very long after 60 of its 5 s.
    assert dict(policy(instance, 300.5).work) == {"short": 4}, "the long one is late, not for long"
    assert not policy(instance, 301.5), "12 pages are free, and the long one needs them and 3 more"
    instance.release("held")
    assert policy(instance, 301.5)
