"""Laws that every policy keeps on random ledgers, driven until all work is done."""

import dataclasses
import math
import random

import numpy as np
import pytest
from costs import decodes, prefills
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers.cost import CostModel, TransferCost
from schedulers.ledger.instance import Instance, Limits, Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies import decode, prefill
from schedulers.policies.colocated import Colocated

LONGEST = 48
# Decisions in a row that bring nobody a token nearer.
PATIENCE = 100


def costs():
    seconds = st.floats(0, 0.1)
    return st.builds(
        CostModel,
        st.builds(prefills, seconds, seconds, seconds),
        st.builds(
            decodes,
            seconds,
            seconds,
            seconds,
            st.sampled_from(["ragged", "padded"]),
            st.sampled_from([(), (1, 2, 4)]),
        ),
        st.just(TransferCost(0.01, 0.0)),
        st.just(1000),
    )


def sharing(request, prefix, page_size):
    """The request, whose prompt has its first `prefix` tokens in common with others."""
    ends = range(page_size, len(request.prompt) + 1, page_size)
    own = 1000 * (1 + int(request.id))
    keys = tuple(end if end <= prefix else own + end for end in ends)
    return dataclasses.replace(request, page_keys=keys)


@st.composite
def workloads(draw):
    """Limits whose pages hold the longest request, often no more, and requests within them."""
    page_size = draw(st.sampled_from([1, 4]))
    needed = -(-LONGEST // page_size)
    limits = Limits(
        max_batch=draw(st.integers(1, 6)),
        max_chunk=draw(st.integers(1, 40)),
        max_context=LONGEST,
        page_size=page_size,
        num_pages=draw(st.just(needed) | st.integers(needed, 4 * needed)),
        parked_tokens=draw(st.just(math.inf) | st.integers(LONGEST, 3 * LONGEST)),
    )
    # Now and then an SLO that no step can keep.
    slos = st.builds(Slo, st.floats(0.01, 10) | st.just(1e-6), st.floats(0.01, 1) | st.just(1e-6))
    prefixes = st.sampled_from([0, 9, 24])  # tokens with which others begin too
    requests = [
        sharing(
            Request(str(i), draw(st.floats(0, 5)), range(draw(st.integers(1, 32))), count, slo),
            draw(prefixes),
            page_size,
        )
        for i, (count, slo) in enumerate(
            draw(st.lists(st.tuples(st.integers(1, 16), slos), min_size=1, max_size=12))
        )
    ]
    return limits, sorted(requests, key=lambda r: r.arrival), draw(st.integers(0, 99))


def snapshot(instance):
    """All that a policy could change about a ledger, to compare."""
    places = [
        (list(place), place.cells.copy(), [list(seq.pages) for seq in place.values()])
        for place in (instance.waiting, instance.running, instance.parked)
    ]
    return places, instance.pages.num_free, instance.pace, instance.parked_tokens


def decide(policy, instance, now):
    """The decision, after checking all that a ledger's state can say about it."""
    before = snapshot(instance)
    batch = policy(instance, now)
    assert batch == policy(instance, now), "another answer the second time"
    np.testing.assert_equal(snapshot(instance), before, "the policy changed the ledger")
    limits, running, waiting = instance.limits, instance.running, instance.waiting
    for ids in (batch.fetch, batch.evict):
        assert len(set(ids)) == len(ids)
    assert not (batch.work.keys() & {*batch.fetch, *batch.evict})
    for id in batch.evict:
        assert running[id].num_tokens, "evicted in the midst of its prefill"
    for id in batch.fetch:
        assert not waiting[id].ready
        assert not waiting[id].pages, "fetched twice"
    for id, count in batch.work.items():
        seq = running.get(id) or waiting[id]
        assert seq.ready
        assert 1 <= count <= seq.remaining
    check_pages(instance, batch)
    assert len(batch.work) <= limits.max_batch
    if instance.role is not Role.DECODE:
        chunks = [
            n for id, n in batch.work.items() if not (running.get(id) or waiting[id]).num_tokens
        ]
        assert sum(chunks) <= limits.max_chunk
    if instance.role is Role.PREFILL:
        assert not batch.fetch
        assert not batch.evict
        begun = running.ids | batch.work.keys()
        held = sum((running.get(id) or waiting[id]).length for id in begun)
        assert instance.parked_tokens + held <= limits.parked_tokens
    elif instance.role is Role.DECODE:
        assert set(batch.work.values()) <= {1}
    assert math.isfinite(batch.predicted_s)
    assert bool(batch.predicted_s) <= bool(batch.work)
    return batch


def check_pages(instance, batch):
    """What it takes, and what those of its work grow by, is there without what it evicts."""
    running, waiting = instance.running, instance.waiting
    taken = [instance.pages_needed(waiting[id]) for id in batch.fetch]
    taken += [instance.pages_needed(waiting[id]) for id in batch.work if id in waiting]
    if batch.work and instance.role is not Role.PREFILL:
        taken += [instance.pages_needed(running[id]) for id in batch.work if id in running]
    assert sum(taken) <= instance.pages.num_free


@pytest.mark.parametrize("name", prefill.POLICIES)
@given(costs(), workloads(), st.sampled_from([0.0, 1.0, math.inf]))
@settings(max_examples=30, deadline=None)
def test_prefill(name, cost, workload, pack):
    limits, requests, seed = workload
    policy, rng = prefill.POLICIES[name](cost, pack), random.Random(seed)
    instance, now, left = Instance("p", Role.PREFILL, limits), 0.0, []
    requests = requests[::-1]
    while requests or instance.waiting or instance.running:
        while requests and (requests[-1].arrival <= now or not instance.waiting):
            now = max(now, requests[-1].arrival)
            instance.add(requests.pop())
        batch = decide(policy, instance, now)
        if not batch:
            assert instance.parked, "an idle instance that waits for nothing"
            id = rng.choice(list(instance.parked))
            rng.choice([instance.copied, instance.release])(id)
            continue
        instance.begin(batch, now)
        now += batch.predicted_s * rng.uniform(0.5, 2.0) + 1e-6
        ended = instance.end(batch, now)
        left += [seq.request.id for seq in ended]
        assert all(bool(seq.finish_reason) == (seq.request.max_tokens == 1) for seq in ended)
        instance.check()
    assert sorted(left) == sorted(request.id for request in workload[1])


def finish(policy, instance, coming, rng, stops=0.0):
    """The ids of all that come, in the order in which they finish, once they have. coming: when,
    and what `Instance.add` is given then. stops: how likely a token ends its output.
    """
    now, under_way, finished, idle = 0.0, [], [], 0
    coming = coming[::-1]
    while coming or instance.waiting or instance.running:
        while coming and (coming[-1][0] <= now or not instance.waiting):
            at, added = coming.pop()
            now = max(now, at)
            instance.add(*added)
        batch = decide(policy, instance, now)
        assert batch or under_way or instance.evicting, "an idle instance that waits for nothing"
        instance.begin(batch, now)
        instance.check()
        under_way += batch.fetch
        if under_way and (not batch.work or rng.random() < 0.5):
            instance.fetched(under_way.pop(rng.randrange(len(under_way))))
        if instance.evicting and (not batch.work or rng.random() < 0.5):
            instance.copied(rng.choice(list(instance.evicting)))
        now += batch.predicted_s * rng.uniform(0.5, 2.0) + 1e-6
        idle = 0 if batch.work else idle + 1
        assert idle < PATIENCE, "requests are fetched and evicted, and never step"
        if batch.work:
            stopped = [id for id in batch.work if rng.random() < stops]
            finished += [seq.request.id for seq in instance.end(batch, now, stopped)]
        instance.check()
    return finished


DECODE = decode.POLICIES | {"one_at_a_time": lambda cost: decode.Continuous(cost, cap=1)}
if "patience_s" in {field.name for field in dataclasses.fields(decode.KairosPlus)}:
    DECODE["impatient"] = lambda cost: decode.KairosPlus(cost, patience_s=0.5)


@pytest.mark.parametrize("name", DECODE)
@given(costs(), workloads())
@settings(max_examples=60, deadline=None)
def test_decode(name, cost, workload):
    limits, requests, seed = workload
    policy, rng = DECODE[name](cost), random.Random(seed)
    firsts = [
        (r.arrival + rng.uniform(0, 2 * r.slo.ttft), r.id, r) for r in requests if r.max_tokens > 1
    ]
    # They are handed over in the order of their first tokens, which is not that of their arrivals.
    coming = [(at, (request, 1, at)) for at, _, request in sorted(firsts)]
    finished = finish(policy, Instance("d", Role.DECODE, limits), coming, rng, stops=0.05)
    assert sorted(finished) == sorted(id for _, id, _ in firsts)


@pytest.mark.parametrize(
    "names", [("fcfs", "continuous"), ("kairos", "kairos"), ("kairos_plus",) * 2]
)
@given(costs(), workloads())
@settings(max_examples=40, deadline=None)
def test_colocated(names, cost, workload):
    limits, requests, seed = workload
    policy, rng = Colocated(cost, *names), random.Random(seed)
    coming = [(request.arrival, (request,)) for request in requests]
    finished = finish(policy, Instance("b", Role.BOTH, limits), coming, rng)
    assert sorted(finished) == sorted(request.id for request in requests)
