"""How sequences count in the load by which routers choose, hopeless ones among them."""

import itertools
import math

import pytest
from costs import decodes, prefills
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers.cost import CostModel, TransferCost
from schedulers.ledger.instance import Batch, Instance, Limits, Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies import decode, routing
from schedulers.policies.colocated import Colocated

# Llama 3 8B on one H100: see schedulers/profiles.
COST = CostModel(
    prefills(5e-3, 32e-6, 0.66e-9),
    decodes(7e-3, 20e-6, 55e-9),
    TransferCost(2e-3, 5.2e-6),
    400_000,
)
LIMITS = Limits(max_batch=256, max_chunk=4096, max_context=4096, page_size=16, num_pages=25_000)
NORMAL, POISON = Slo(1.0, 0.025), Slo(1.0, 1e-6)


def instance_of(*requests, role=Role.DECODE, first_at=0.0):
    """A ledger to which these (length, slo) were handed over."""
    instance = Instance("d", role, LIMITS)
    for index, (length, slo) in enumerate(requests):
        instance.add(Request(str(index), 0.0, range(length - 1), 200, slo), 1, first_at)
    return instance


def load(instance, now=0.0, **options):
    return routing.outline(instance, COST, now, **options).load


def routed(summaries, count, slo=NORMAL):
    """How many of `count` sequences of 500 tokens each instance gets."""
    summaries, counts = list(summaries), [0] * len(summaries)
    for _ in range(count):
        which = routing.route_decode(500, slo, summaries, COST, 0.0)
        counts[which] += 1
        summaries[which] = summaries[which].with_context(500, slo, COST)
    return counts


def test_three_tight_tpots_do_not_drive_all_others_to_the_fourth_instance():
    """As found: all of the next 40 went there."""
    poisoned = [instance_of((500, POISON)) for _ in range(3)]
    instances = [*poisoned, instance_of()]
    counts = [0] * 4
    for index in range(40):
        summaries = [routing.outline(each, COST, 0.0) for each in instances]
        which = routing.route_decode(500, NORMAL, summaries, COST, 0.0)
        counts[which] += 1
        instances[which].add(Request(f"n{index}", 0.0, range(499), 200, NORMAL), 1, 0.0)
    assert all(abs(count - 10) <= 1 for count in counts), counts


def test_nor_do_those_that_were_sent_since_the_last_summary():
    idle = routing.outline(instance_of(), COST, 0.0)
    poisoned = [idle.with_context(500, POISON, COST) for _ in range(3)]
    counts = routed([*poisoned, idle], 40)
    assert all(abs(count - 10) <= 1 for count in counts), counts


@pytest.mark.parametrize("late", [False, True])
def test_a_hopeless_sequence_takes_room_and_no_load(late):
    idle = routing.outline(instance_of(), COST, 0.0)
    slo = NORMAL if late else POISON
    more = idle.with_context(500, slo, COST, late)
    assert (more.load, more.room) == (idle.load, idle.room - 500)


def test_a_sequence_goes_where_a_step_keeps_its_tpot_though_that_instance_has_more_load():
    """On the slow one it would be hopeless, as are all that are there: its load is 0."""
    busy, slow = instance_of(*[(500, NORMAL)] * 9), instance_of(*[(500, NORMAL)] * 9)
    slow.pace = 4.0
    summaries = [routing.outline(each, COST, 0.0) for each in (slow, busy)]
    assert summaries[0].load == 0.0 < summaries[1].load
    assert routing.route_decode(500, NORMAL, summaries, COST, 0.0) == 1
    assert routing.route_decode(500, Slo(1.0, 0.1), summaries, COST, 0.0) == 0


def test_hopeless_sequences_alone_go_where_there_is_room():
    idle = routing.outline(instance_of(), COST, 0.0)
    assert routed([idle] * 4, 40, POISON) == [10, 10, 10, 10]


def test_a_sequence_that_missed_its_ttft_counts_only_where_the_policy_takes_it_in_turn():
    instance = instance_of((500, NORMAL), first_at=1.5)
    assert load(instance) == 0.0
    assert load(instance, demotes_late=False) == load(instance_of((500, NORMAL))) > 0.25
    assert {name for name in decode.POLICIES if name in decode.DEMOTING} == {"kairos_plus"}


def test_a_prompt_counts_on_a_colocated_instance_until_its_first_token_is_late():
    instance = Instance("c", Role.BOTH, LIMITS)
    instance.add(Request("a", 0.0, range(499), 200, NORMAL))
    assert load(instance, now=0.9) > 0.25
    assert load(instance, now=1.1) == 0.0


def test_the_first_sequence_sent_to_an_idle_instance_brings_the_base_of_a_step():
    idle = routing.outline(instance_of(), COST, 0.0)
    sent = idle.with_context(500, NORMAL, COST).with_context(800, NORMAL, COST)
    seen = load(instance_of((500, NORMAL), (800, NORMAL)))
    assert sent.load == pytest.approx(seen)


def test_a_prompt_that_is_late_in_any_case_delays_no_other():
    idle = routing.outline(Instance("p", Role.PREFILL, LIMITS), COST, 0.0)
    own_s = COST.prefill_s(1000)
    more = idle.with_prompt(5.0 + 1e-6, own_s, 5.0)
    assert more.finish_s(6.0, own_s, 5.0) == idle.finish_s(6.0, own_s, 5.0)
    assert more.work_s(5.0) == own_s, "it is work nevertheless"
    assert idle.with_prompt(6.0, own_s, 5.0).finish_s(6.0, own_s, 5.0) == 2 * own_s


# The policies.


def running(*slos):
    """A decode instance that runs 500 tokens for each SLO, all on the line of their TPOTs."""
    instance = instance_of(*((500, slo) for slo in slos))
    ids = tuple(instance.waiting)
    instance.begin(Batch(fetch=ids), 0.0)
    for id in ids:
        instance.fetched(id)
    instance.begin(Batch(dict.fromkeys(ids, 1)), 0.0)
    return instance


def test_kairos_plus_gives_no_step_of_its_own_to_a_tpot_that_no_step_keeps():
    instance = running(POISON, NORMAL, NORMAL)
    policy = decode.KairosPlus(COST)
    assert policy.feasible(instance, 0.0).tolist() == [False, True, True]
    assert {"1", "2"} <= policy(instance, 0.0).work.keys()
    why = policy.verdict(instance, 0.0, "0")
    assert why == "hopeless: its TPOT is 0.001 ms, and no step is shorter than 7.0 ms"


def test_kairos_admits_others_beside_a_tpot_that_no_step_keeps():
    instance = running(POISON)
    instance.add(Request("new", 0.0, range(499), 200, NORMAL), 1, 0.0)
    policy = decode.Kairos(COST)
    batch = policy(instance, 0.0)
    assert batch.fetch == ("new",)
    assert policy.limit_s(instance, batch, 0.0) == 0.95 * NORMAL.tpot


def test_a_colocated_kairos_goes_on_with_prompts_beside_it():
    instance = Instance("c", Role.BOTH, LIMITS)
    instance.add(Request("a", 0.0, range(499), 200, POISON), 1, 0.0)
    instance.begin(Batch(fetch=("a",)), 0.0)
    instance.fetched("a")
    instance.add(Request("prompt", 0.0, range(100), 200, NORMAL))
    assert "prompt" in Colocated(COST, "kairos", "kairos")(instance, 1.0).work


# Laws.

SLOS = st.builds(
    Slo, st.floats(1e-6, 1e6), st.floats(1e-9, 1e6) | st.sampled_from([1e-310, 0.007, 1e300])
)
SEQUENCES = st.lists(st.tuples(st.integers(2, 4000), SLOS), max_size=12)
SECONDS = st.floats(0, 1) | st.just(0.0)
COSTS = st.builds(
    CostModel,
    st.just(COST.prefill),
    st.builds(decodes, SECONDS, SECONDS, SECONDS),
    st.just(COST.transfer),
    st.just(400_000),
)


@given(COSTS, SEQUENCES, st.sampled_from([0.25, 1.0, 8.0]), st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_load_is_finite_and_each_sequence_adds_one_at_most(cost, sequences, pace, demotes):
    loads = []
    for count in range(len(sequences) + 1):
        instance = instance_of(*sequences[:count], first_at=0.5)
        instance.pace = pace
        loads.append(routing.outline(instance, cost, 0.0, demotes_late=demotes).load)
    assert loads[0] == 0.0
    assert all(math.isfinite(load) for load in loads)
    for before, after in itertools.pairwise(loads):
        assert before <= after + 1e-9
        assert after <= before + 1 + 1e-9
    assert loads[-1] <= len(sequences)


@given(COSTS, SEQUENCES, SEQUENCES, st.booleans())
@settings(max_examples=200, deadline=None)
def test_so_it_is_with_what_was_sent_since(cost, sequences, sent, late):
    summary = routing.outline(instance_of(*sequences), cost, 0.0)
    for length, slo in sent:
        more = summary.with_context(length, slo, cost, late)
        assert summary.load <= more.load <= summary.load + 1
        assert math.isfinite(more.load)
        assert more.room == summary.room - length
        summary = more
    assert summary.load <= len(sequences) + len(sent)
