"""Policies against each other on a long-tailed workload under overload, by a heap-driven run."""

import heapq
import itertools
import random
from dataclasses import replace

import pytest

from schedulers import decode, prefill
from schedulers.attainment import Outcome, summarize
from schedulers.core import Instance, Limits, Request, Role, Slo
from schedulers.cost import CostModel, DecodeCost, PrefillCost, TransferCost
from schedulers.workload import synthetic

# An 8B model on an H100 by roofline, as in SCHEDULING: not measured.
COST = CostModel(
    PrefillCost(5e-3, 32e-6, 0.66e-9),
    DecodeCost(7e-3, 20e-6, 55e-9),
    TransferCost(2e-3, 131072 / 25e9),
    400_000,
)
STOP = 1


def drive(arrivals, prefill_policy, decode_policy, slo, *, num_prefill=1, noise=0.0, **limits):
    """Runs `arrivals` through prefill instances and one decode instance; returns Outcomes."""
    limits = {"max_batch": 512, "max_chunk": 4096, "max_context": 20_000, "page_size": 16} | limits
    limits = Limits(**{"num_pages": COST.kv_capacity_tokens // 16} | limits)
    # Where decode is the bottleneck, prompts wait parked: their pages must not decide the outcome.
    wide = replace(limits, num_pages=1_000_000)
    fronts = [Instance(f"p{i}", Role.PREFILL, wide) for i in range(num_prefill)]
    back = Instance("d", Role.DECODE, limits)
    order, rng, events, busy, link_free = itertools.count(), random.Random(0), [], set(), 0.0
    home, seqs, outcomes = {}, {}, []

    def push(at, what, *args):
        heapq.heappush(events, (at, next(order), what, args))

    def arrive(now, request):
        def backlog(front):
            return sum(s.remaining for p in (front.waiting, front.running) for s in p.values())

        home[request.id] = min(fronts, key=backlog)
        seqs[request.id] = home[request.id].add(request)

    def step_seconds(instance, batch):
        """What the step really costs, whatever the policy predicted."""
        steps = [(instance.running[id], count) for id, count in batch.work.items()]
        if instance is back:
            return COST.decode_s([seq.length for seq, _ in steps])
        return COST.prefill_step_s((count, seq.computed) for seq, count in steps)

    def fetched(now, id):
        home[id].release(id)
        back.fetched(id)

    def step_done(now, instance, batch):
        busy.discard(instance.id)
        places = (instance.running[id] for id in batch.work)
        last = {s.request.id: len(s.tokens) + 1 >= lengths[s.request.id] for s in places}
        for seq in instance.end(batch, {id: int(is_last) for id, is_last in last.items()}, now):
            if seq.finish_reason:
                slo, arrival = seq.request.slo, seq.request.arrival
                outcomes.append(Outcome(slo, arrival, seq.first_token_at, now, len(seq.tokens)))
            elif instance is not back:
                back.add(seq.request, seq.tokens, now)

    lengths = {str(i): a.num_output for i, a in enumerate(arrivals)}
    longest = max(lengths.values())
    for i, a in enumerate(arrivals):
        request = Request(str(i), a.at, range(a.num_prompt), longest, slo, frozenset({STOP}))
        push(a.at, arrive, request)
    while events:
        now, _, what, args = heapq.heappop(events)
        what(now, *args)
        for instance in [*fronts, back]:
            if instance.id in busy:
                continue
            batch = (decode_policy if instance is back else prefill_policy)(instance, now)
            instance.begin(batch, now)
            for id in batch.fetch:
                link_free = max(now, link_free) + COST.transfer_s(back.get(id).computed)
                push(link_free, fetched, id)
            if batch.work:
                busy.add(instance.id)
                step_s = step_seconds(instance, batch) * rng.lognormvariate(0.0, noise)
                push(now + step_s, step_done, instance, batch)
    for instance in [*fronts, back]:
        instance.check()
    assert len(outcomes) == len(arrivals), "some requests never ended"
    return outcomes


POLICIES = {
    "fcfs": (prefill.fcfs(COST), decode.Continuous(COST)),
    "kairos": (prefill.Kairos(COST), decode.Kairos(COST)),
    "kairos_plus": (prefill.KairosPlus(COST), decode.KairosPlus(COST)),
}
# Prefill and decode are both near their capacity.
SLO = Slo(1.0, 0.0125)


@pytest.mark.parametrize("rate", [20, 22])
def test_each_step_from_fcfs_to_kairos_plus_attains_more(rate):
    arrivals = synthetic(700, rate, seed=1)
    e2e, latency = {}, {}
    for name, policies in POLICIES.items():
        summary = summarize(drive(arrivals, *policies, SLO))
        e2e[name], latency[name] = summary["e2e_attainment"], summary["latency_max_s"]
    print(rate, {name: round(percent, 1) for name, percent in e2e.items()})
    assert e2e["kairos_plus"] > e2e["kairos"] + 5 > e2e["fcfs"] + 20
    assert latency["kairos_plus"] < 2 * latency["fcfs"], "the demoted starve"


@pytest.mark.parametrize("name", POLICIES)
def test_under_light_load_all_attain(name):
    summary = summarize(drive(synthetic(200, 2.0, seed=1), *POLICIES[name], SLO))
    assert summary["tpot_attainment"] == 100
    assert summary["e2e_attainment"] > 98


def test_kairos_plus_bears_noisy_steps():
    arrivals = synthetic(700, 20, seed=2)
    exact, noisy = (
        summarize(drive(arrivals, *POLICIES["kairos_plus"], SLO, noise=noise))["e2e_attainment"]
        for noise in (0.0, 0.2)
    )
    assert noisy > exact - 10, "the noise alone makes steps 2 % longer on average"


def test_kairos_plus_bears_a_profile_that_is_half_off():
    """The pace of measured steps corrects it."""
    slow = replace(COST, decode=DecodeCost(3.5e-3, 10e-6, 27.5e-9))
    arrivals = synthetic(700, 20, seed=2)
    policies = prefill.KairosPlus(COST), decode.KairosPlus(slow)
    summary = summarize(drive(arrivals, *policies, SLO))
    exact = summarize(drive(arrivals, *POLICIES["kairos_plus"], SLO))
    assert summary["e2e_attainment"] > exact["e2e_attainment"] - 3
