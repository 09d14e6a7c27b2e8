"""Laws that every policy keeps on random ledgers, driven until all work is done."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers import decode, prefill
from schedulers.core import Instance, Limits, Request, Role, Slo
from schedulers.cost import CostModel, DecodeCost, PrefillCost, TransferCost


def costs():
    seconds = st.floats(0, 0.1)
    return st.builds(
        CostModel,
        st.builds(PrefillCost, seconds, seconds, seconds, st.sampled_from([1, 8])),
        st.builds(
            DecodeCost,
            seconds,
            seconds,
            seconds,
            st.sampled_from(["ragged", "padded"]),
            st.sampled_from([(), (1, 2, 4)]),
        ),
        st.just(TransferCost(0.01, 0.0)),
        st.just(1000),
    )


@st.composite
def workloads(draw):
    """Limits whose pages hold the longest request, and requests within them."""
    page_size = draw(st.sampled_from([1, 4]))
    needed = -(-48 // page_size)
    limits = Limits(
        max_batch=draw(st.integers(1, 6)),
        max_chunk=draw(st.integers(1, 40)),
        max_context=48,
        page_size=page_size,
        num_pages=draw(st.integers(needed, 4 * needed)),
    )
    slos = st.builds(Slo, st.floats(0.01, 10), st.floats(0.01, 1))
    requests = [
        Request(str(i), draw(st.floats(0, 5)), range(draw(st.integers(1, 40))), count, slo)
        for i, (count, slo) in enumerate(
            draw(st.lists(st.tuples(st.integers(1, 8), slos), min_size=1, max_size=12))
        )
    ]
    return limits, sorted(requests, key=lambda r: r.arrival), draw(st.integers(0, 99))


def decide(policy, instance, now):
    """The decision, after checking all that a ledger's state can say about it."""
    before = repr([instance.waiting, instance.running, instance.parked, instance.pages._free])
    batch = policy(instance, now)
    assert batch == policy(instance, now), "another answer the second time"
    after = repr([instance.waiting, instance.running, instance.parked, instance.pages._free])
    assert before == after, "the policy changed the ledger"
    taken = 0
    for id, count in batch.work.items():
        seq = instance.running.get(id) or instance.waiting[id]
        assert seq.ready
        assert 1 <= count <= seq.remaining
        taken += instance.pages_needed(seq)
    for id in batch.fetch:
        seq = instance.waiting[id]
        assert not seq.ready
        assert not seq.pages
        taken += instance.pages_needed(seq)
    assert len(set(batch.fetch)) == len(batch.fetch)
    assert taken <= instance.pages.num_free
    assert len(batch.work) <= instance.limits.max_batch
    if instance.role is Role.PREFILL:
        assert sum(batch.work.values()) <= instance.limits.max_chunk
        assert not batch.fetch
    else:
        assert set(batch.work.values()) <= {1}
    assert bool(batch.predicted_s) <= bool(batch.work)
    return batch


@pytest.mark.parametrize("name", prefill.POLICIES)
@given(costs(), workloads(), st.sampled_from([0.0, 1.0, float("inf")]))
@settings(max_examples=40, deadline=None)
def test_prefill(name, cost, workload, pack):
    limits, requests, seed = workload
    policy, rng = prefill.POLICIES[name](cost, pack), random.Random(seed)
    instance, now, produced = Instance("p", Role.PREFILL, limits), 0.0, 0
    requests = requests[::-1]
    while requests or instance.waiting or instance.running:
        while requests and (requests[-1].arrival <= now or not instance.waiting):
            now = max(now, requests[-1].arrival)
            instance.add(requests.pop())
        batch = decide(policy, instance, now)
        if not batch:
            assert instance.parked, "an idle instance that waits for nothing"
            instance.release(rng.choice(list(instance.parked)))
            continue
        instance.begin(batch, now)
        now += batch.predicted_s * rng.uniform(0.5, 2.0) + 1e-6
        produced += len(instance.end(batch, dict.fromkeys(batch.work, 0), now))
        instance.check()
    assert produced == len(workload[1])


DECODE = decode.POLICIES | {"impatient": lambda cost: decode.KairosPlus(cost, patience_s=0.5)}


@pytest.mark.parametrize("name", DECODE)
@given(costs(), workloads())
@settings(max_examples=60, deadline=None)
def test_decode(name, cost, workload):
    limits, requests, seed = workload
    policy, rng = DECODE[name](cost), random.Random(seed)
    instance, now, under_way, finished = Instance("d", Role.DECODE, limits), 0.0, [], 0
    # They are handed over in the order of their first tokens, which is not that of their arrivals.
    coming = [
        (r.arrival + rng.uniform(0, 2 * r.slo.ttft), r.id, r) for r in requests if r.max_tokens > 1
    ]
    coming.sort(reverse=True)
    expected = len(coming)
    while coming or instance.waiting or instance.running:
        while coming and (coming[-1][0] <= now or not instance.waiting):
            first_at, _, request = coming.pop()
            now = max(now, first_at)
            instance.add(request, [0], first_at)
        batch = decide(policy, instance, now)
        assert batch or under_way, "an idle instance that waits for nothing"
        instance.begin(batch, now)
        under_way += batch.fetch
        if under_way and (not batch.work or rng.random() < 0.5):
            instance.fetched(under_way.pop(rng.randrange(len(under_way))))
        now += batch.predicted_s * rng.uniform(0.5, 2.0) + 1e-6
        if batch.work:
            done = instance.end(batch, dict.fromkeys(batch.work, 0), now)
            finished += sum(seq.finish_reason is not None for seq in done)
        instance.check()
    assert finished == expected
