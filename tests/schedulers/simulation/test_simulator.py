"""The simulator on workloads whose course can be worked out by hand, and its own laws."""

import math
import re
from collections import Counter

import pytest
from costs import decodes, prefills

from kairos_jax.observe.explain import explain
from schedulers.cost import CostModel, TransferCost
from schedulers.ledger.journal import Journal, check, from_lines, to_lines
from schedulers.ledger.request import Slo
from schedulers.policies import decode, prefill
from schedulers.simulation.scenario import Scenario, build, simulate
from schedulers.simulation.workload import Arrival, SloClass, synthetic

# A prompt takes 1 s a token, a step 1 s a sequence, a transfer 1 s a token.
COST = CostModel(prefills(0, 1, 0), decodes(0, 1, 0), TransferCost(0, 1), 10_000)
ROOMY = (SloClass(1.0, Slo(1e6, 1e5)),)
PAIRS = [(first, second) for first in prefill.POLICIES for second in decode.POLICIES]


def run(arrivals, cost=COST, **options):
    return build(Scenario(cost, ROOMY, **options), arrivals).run()


def test_one_request_prefills_moves_and_decodes():
    (outcome,) = run([Arrival(5.0, 4, 3)])
    # 4 s of prefill, 4 s for the KV of 4 tokens, then two steps of 1 s.
    assert outcome.first_token_at == 9.0
    assert outcome.last_token_at == 15.0
    assert outcome.num_output == 3


def test_a_colocated_instance_moves_nothing():
    (outcome,) = run([Arrival(5.0, 4, 3)], colocated=1)
    assert (outcome.first_token_at, outcome.last_token_at) == (9.0, 11.0)


def test_a_fetch_begins_in_the_midst_of_a_step():
    slow = CostModel(COST.prefill, decodes(10, 0, 0), COST.transfer, 10_000)
    arrivals = [Arrival(0.0, 1, 9), Arrival(2.0, 1, 9)]
    first, second = run(arrivals, slow, prefill_policy="fcfs", decode_policy="continuous")
    # Prefilled at 3 s, in the other's step from 2 s to 12 s; moved at 4 s, in the next step.
    assert first.first_token_at == 1.0
    assert second.first_token_at == 3.0
    assert second.last_token_at == pytest.approx(12 + 8 * 10)


@pytest.mark.parametrize("colocated", [0, 1, 2])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_request_gets_exactly_its_tokens(first, second, colocated):
    cost = CostModel(
        prefills(5e-3, 32e-6, 0.66e-9),
        decodes(7e-3, 20e-6, 55e-9),
        TransferCost(2e-3, 5.2e-6),
        20_000,  # so little that some are evicted
    )
    arrivals = synthetic(60, 12.0, seed=5, max_prompt=8000)
    scenario = Scenario(
        cost,
        (SloClass(0.5, Slo(1.0, 0.025)), SloClass(0.5, Slo(10.0, 0.1))),
        prefill_policy=first,
        decode_policy=second,
        colocated=colocated,
        num_decode=2,
    )
    simulation = build(scenario, arrivals)
    outcomes = simulation.run()
    assert [outcome.num_output for outcome in outcomes] == [a.num_output for a in arrivals]
    for outcome, arrival in zip(outcomes, arrivals, strict=True):
        assert outcome.first_token_at is not None
        assert outcome.last_token_at is not None
        assert arrival.at < outcome.first_token_at <= outcome.last_token_at
    for instance, _ in (*simulation.fleet.prefill, *simulation.fleet.decode):
        instance.check()
        assert instance.pages.num_free == instance.limits.num_pages, "pages are held"


@pytest.mark.parametrize(
    ("policy", "colocated"), [*((name, 0) for name in prefill.POLICIES), ("kairos_plus", 1)]
)
def test_prompts_that_begin_alike_have_their_first_tokens_sooner(policy, colocated):
    """Ten turns each of 12 conversations, every prompt a block of 512 tokens longer than the last,
    at what is near the limit without a cache.
    """
    cost = CostModel(
        prefills(5e-3, 32e-6, 0.66e-9),
        decodes(7e-3, 20e-6, 55e-9),
        TransferCost(2e-3, 5.2e-6),
        80_000,  # so little that not everything stays cached
    )
    arrivals = [
        Arrival(0.1 * (12 * turn + who), 512 * (turn + 1) + 100, 5, blocks)
        for turn in range(10)
        for who in range(12)
        for blocks in [tuple(100 * who + block for block in range(turn + 2))]
    ]
    results = {}
    for cache in (False, True):
        scenario = Scenario(
            cost,
            (SloClass(1.0, Slo(1.0, 0.1)),),
            prefill_policy=policy,
            colocated=colocated,
            prefix_cache=cache,
        )
        results[cache] = simulate(scenario, arrivals)
    before, after = (results[cache]["ttft_s"] for cache in (False, True))
    assert after["p50"] < 0.7 * before["p50"]
    assert results[True]["ttft_attainment"] >= results[False]["ttft_attainment"]
    assert results[True]["ttft_bound"] is None, "of prompts computed whole"


def test_same_seed_same_result_and_noise_keeps_the_mean():
    arrivals = synthetic(300, 5.0, seed=1)
    cost = CostModel(
        prefills(5e-3, 32e-6, 0.66e-9),
        decodes(7e-3, 20e-6, 55e-9),
        TransferCost(2e-3, 5.2e-6),
        400_000,
    )
    noisy = Scenario(cost, ROOMY, noise=0.3, seed=3)
    assert simulate(noisy, arrivals) == simulate(noisy, arrivals)
    exact = simulate(Scenario(cost, ROOMY), arrivals)["tpot_s"]["p50"]
    assert simulate(noisy, arrivals)["tpot_s"]["p50"] == pytest.approx(exact, rel=0.05)


def test_one_token_after_a_prompt_in_chunks_ends_at_once_beside_a_decoder():
    arrivals = [Arrival(0.0, 100, 300), Arrival(0.5, 1400, 1)]
    cost = CostModel(prefills(5e-3, 32e-6, 0), decodes(7e-3, 0, 0), COST.transfer, 10_000)
    outcomes = run(arrivals, cost, colocated=1, chunk=512)
    assert [outcome.num_output for outcome in outcomes] == [300, 1]


@pytest.mark.parametrize("policy", ["fcfs", "edf"])
def test_a_long_prompt_gets_its_room_in_its_turn(policy):
    """Though short ones fit into whatever is given back, and come without a pause."""
    cost = CostModel(
        prefills(5e-3, 32e-6, 0), decodes(7e-3, 20e-6, 55e-9), TransferCost(2e-3, 0), 8000
    )
    arrivals = [Arrival(0.04 * i, 200, 300) for i in range(600)]
    arrivals.insert(50, Arrival(1.99, 3000, 300))
    scenario = Scenario(
        cost,
        (SloClass(1.0, Slo(1.0, 0.05)),),
        colocated=1,
        prefill_policy=policy,
        decode_policy="continuous",
    )
    outcome = build(scenario, arrivals).run()[50]
    assert outcome.first_token_at < 15.0, "the last short one comes at 24 s"


# A small fleet with so much to decode that one instance does not do.
BUSY = CostModel(
    prefills(5e-3, 32e-6, 0.66e-9), decodes(7e-3, 60e-6, 2e-7), TransferCost(2e-3, 5.2e-6), 400_000
)


PLACED = ("stay", "hand_over")


def flowing(arrivals, **options):
    """A journaled run in which roles flow: (simulation, outcomes, records)."""
    slo = (SloClass(1.0, Slo(1.0, 0.025)),)
    simulation = build(Scenario(BUSY, slo, 2, 1, fluid=True, **options), arrivals)
    journal = Journal(lambda: simulation.now)
    for instance, _ in (*simulation.fleet.prefill, *simulation.fleet.decode):
        instance.journal = journal.recorder(instance)
    outcomes = simulation.run()
    return simulation, outcomes, list(from_lines(to_lines(journal.take())))


@pytest.mark.parametrize("parked_tokens", [math.inf, 9000])
def test_where_roles_flow_every_request_gets_its_tokens_and_decisions_replay(parked_tokens):
    arrivals = synthetic(250, 60.0, seed=5, max_prompt=8000)
    simulation, outcomes, records = flowing(arrivals, parked_tokens=parked_tokens, noise=0.1)
    assert [each.num_output for each in outcomes] == [each.num_output for each in arrivals]
    pairs = (*simulation.fleet.prefill, *simulation.fleet.decode)
    assert check(records, {instance.id: policy for instance, policy in pairs}) > 500
    for instance, _ in pairs:
        instance.check()
        assert not any((instance.waiting, instance.running, instance.parked))
    verbs = Counter(record[1] for record in records)
    assert min(verbs["stay"], verbs["hand_over"]) >= 5, "an overload of both jobs"
    assert verbs["release"] == verbs["hand_over"]


def test_explained_is_where_a_request_went_and_why():
    simulation, _, records = flowing(synthetic(250, 44.0, seed=5, max_prompt=8000))
    pairs = (*simulation.fleet.prefill, *simulation.fleet.decode)
    policies = {instance.id: policy for instance, policy in pairs}
    of_verb = {verb: args[0] for _, verb, _, *args in records[::-1] if verb in PLACED}
    stayed, moved = ("\n".join(explain(records, policies, of_verb[verb])) for verb in PLACED)
    assert re.search(r"kept at prefill\d: decode0 decodes \d+% of its time", stayed)
    assert "handed over to" not in stayed
    assert re.search(r"leaves prefill\d: decode0 decodes \d+% of its time", moved)
    assert "handed over to decode0" in moved


def test_of_prompts_that_end_together_none_decodes_at_home_before_it_is_placed():
    slo = (SloClass(1.0, Slo(1.0, 0.025)),)
    simulation = build(Scenario(BUSY, slo, 2, 1, fluid=True), [Arrival(0.0, 200, 9)] * 6)
    unplaced, place = [], simulation.place

    def noted(seq, instances, home, now, ids):
        assert seq.request.id in ids
        unplaced.append(len(ids))
        return place(seq, instances, home, now, ids)

    simulation.place = noted
    simulation.run()
    assert unplaced == [2, 1] * 3, "two prompts in a step of each instance, placed one by one"


@pytest.mark.parametrize("rate", [24.0, 40.0])
def test_flowing_roles_keep_at_least_what_fixed_ones_do(rate):
    arrivals = synthetic(300, rate, seed=3, max_prompt=4000)
    slo = (SloClass(1.0, Slo(1.0, 0.025)),)
    fixed, fluid = (
        simulate(Scenario(BUSY, slo, 2, 1, fluid=flows), arrivals)["e2e_attainment"]
        for flows in (False, True)
    )
    assert fluid >= fixed - 0.5


def test_late_prompts_go_where_none_waits():
    """Each takes 4 s, of a TTFT of 2 s, so all go to the first instance: none has time for them."""
    scenario = Scenario(COST, (SloClass(1.0, Slo(2.0, 1e5)),), num_prefill=2, pack=0)
    simulation = build(scenario, [Arrival(0.0, 4, 1)] * 6)
    journal = Journal(lambda: simulation.now)
    for instance, _ in (*simulation.fleet.prefill, *simulation.fleet.decode):
        instance.journal = journal.recorder(instance)
    # They are late at 2 s, but nothing happens until the first step ends.
    assert sorted(outcome.last_token_at for outcome in simulation.run()) == [4, 8, 8, 12, 12, 16]
    records = list(from_lines(to_lines(journal.take())))
    policies = {instance.id: policy for instance, policy in simulation.fleet.prefill}
    assert check(records, policies) == 6
    moved = next(record[3] for record in records if record[1] == "give_back")
    lines = "\n".join(explain(records, policies, moved))
    assert re.search(
        r"given back by prefill0: prefill1 has time for it\n.* queued on prefill1", lines
    )


def test_fluid_needs_instances_that_decode():
    with pytest.raises(ValueError, match="fluid does not go with colocated"):
        Scenario(COST, ROOMY, 0, 0, colocated=2, fluid=True)
