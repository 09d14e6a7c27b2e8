"""Prefill policies on small ledgers whose answer can be worked out by hand."""

import itertools
import math
import random

import pytest

from schedulers import prefill
from schedulers.core import Batch, Instance, Limits, Request, Role, Slo
from schedulers.cost import CostModel, DecodeCost, PrefillCost, TransferCost

# A token takes 1 s, a step nothing more: predictions are prompt lengths.
COST = CostModel(PrefillCost(0.0, 1.0, 0.0), DecodeCost(1, 0, 0), TransferCost(0, 0), 1000)
LIMITS = Limits(max_batch=8, max_chunk=10, max_context=200, page_size=1, num_pages=200)


def ledger(requests, limits=LIMITS):
    """requests: {id: (arrival, ttft, num_prompt)}."""
    instance = Instance("p", Role.PREFILL, limits)
    for id, (arrival, ttft, num_prompt) in requests.items():
        instance.add(Request(id, arrival, range(num_prompt), 1, Slo(ttft, 1.0)))
    return instance


def order(policy, instance, now):
    """Runs the instance until it is empty; the ids in the order in which they are stepped."""
    steps = []
    while instance.waiting or instance.running:
        batch = policy(instance, now)
        instance.begin(batch, now)
        now += batch.predicted_s
        instance.end(batch, dict.fromkeys(batch.work, 7), now)
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
    instance.begin(batch := policy(instance, 1.0), 1.0)
    instance.end(batch, {}, 11.0)
    instance.add(Request("new", 10.0, range(5), 1, Slo(10.0, 1.0)))
    assert list(policy(instance, 11.0).work) == [first]


@pytest.mark.parametrize("name", prefill.POLICIES)
def test_pages_that_do_not_fit_are_passed_over(name):
    limits = Limits(max_batch=8, max_chunk=10, max_context=20, page_size=1, num_pages=20)
    instance = ledger({"done": (0, 99, 10)}, limits)
    policy = prefill.POLICIES[name](COST)
    first = Batch({"done": 10})
    instance.begin(first, 0.0)
    # Booked as a prefill whose request goes on elsewhere: its pages stay held.
    instance.running["done"].request = Request("done", 0, range(10), 2, Slo(99, 1))
    instance.end(first, {"done": 7}, 10.0)
    instance.add(Request("large", 1, range(11), 1, Slo(99, 1)))
    assert not policy(instance, 10.0), "waits for parked pages"
    instance.add(Request("small", 2, range(10), 1, Slo(99, 1)))
    assert dict(policy(instance, 10.0).work) == {"small": 10}
    instance.release("done")
    assert policy(instance, 10.0)


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
    cost = CostModel(PrefillCost(4.0, 1.0, 0.0), COST.decode, COST.transfer, 1000)
    # Every policy's order is a, b, c, d: by arrival, by deadline and by laxity; sjf takes b first.
    requests = {"a": (0, 90, 3), "b": (1, 91, 2), "c": (2, 93, 3), "d": (3, 95, 4)}
    batch = prefill.POLICIES[name](cost, pack)(ledger(requests), 5.0)
    if name == "sjf":
        expected = {0.0: {"b": 2}, 1.0: {"b": 2, "a": 3}}.get(pack, expected)
    assert dict(batch.work) == expected
    assert batch.predicted_s == 4.0 + sum(expected.values())


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


def test_feasible_first_keeps_as_many_as_any_subset():
    """Against every subset, run by deadline."""
    rng = random.Random(1)
    for _ in range(50):
        jobs = [(rng.uniform(1, 12), rng.uniform(0.1, 5), index) for index in range(6)]
        ends, on_time = 0.0, 0
        for index in prefill.feasible_first(jobs, 0.0):
            deadline, seconds, _ = jobs[index]
            if ends + seconds > deadline:
                break
            ends, on_time = ends + seconds, on_time + 1

        def feasible(subset):
            ends = itertools.accumulate(seconds for _, seconds, _ in subset)
            return all(end <= job[0] for end, job in zip(ends, subset, strict=True))

        jobs.sort()
        best = max(
            len(subset)
            for size in range(7)
            for subset in itertools.combinations(jobs, size)
            if feasible(subset)
        )
        assert on_time >= best
