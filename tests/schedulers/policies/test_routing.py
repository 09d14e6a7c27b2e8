"""Routing on summaries whose answer can be worked out by hand."""

import math
from dataclasses import replace

import pytest
from costs import decodes, prefills

from schedulers.cost import CostModel, TransferCost
from schedulers.ledger.instance import Batch, Instance, Limits, Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies import routing

# A prompt takes 1 s a token; a step 1 s, and 0.01 s a token of context.
COST = CostModel(prefills(0, 1, 0), decodes(1, 0, 0.01), TransferCost(0, 0), 1000)
LIMITS = Limits(max_batch=8, max_chunk=10, max_context=200, page_size=1, num_pages=200)


def prompt(id, length, arrival=0.0, ttft=100.0):
    return Request(id, arrival, range(length), 5, Slo(ttft, 2.0))


def prefill(*requests, limits=LIMITS):
    instance = Instance("p", Role.PREFILL, limits)
    for request in requests:
        instance.add(request)
    return instance


def decode(*lengths):
    instance = Instance("d", Role.DECODE, LIMITS)
    for index, length in enumerate(lengths):
        instance.add(prompt(str(index), length - 1), 1, 0.0)
    return instance


def route(request, *instances, now=0.0, demotes=True):
    summaries = [routing.outline(instance, COST, now, demotes) for instance in instances]
    return routing.route_prefill(request, summaries, COST, now)


def test_a_prompt_goes_where_its_first_token_comes_soonest():
    busy, idle = prefill(prompt("a", 20)), prefill(prompt("b", 10))
    assert route(prompt("new", 5), busy, idle) == 1
    assert route(prompt("new", 5), idle, busy) == 0


def test_what_one_has_cached_counts_for_it_as_far_as_it_shortens_the_prefill():
    busy, idle = prefill(prompt("a", 20)), prefill()
    summaries = [routing.outline(instance, COST, 0.0) for instance in (busy, idle)]
    asked = prompt("new", 50)
    route = lambda *cached: routing.route_prefill(asked, summaries, COST, 0.0, cached)  # noqa: E731
    assert (route(0, 0), route(19, 0), route(21, 0), route(40, 30)) == (1, 1, 0, 1)
    late = prompt("late", 50, ttft=10)
    assert routing.route_prefill(late, summaries, COST, 0.0, (21, 0)) == 0


def test_only_prompts_due_before_are_in_its_way():
    later, sooner = prefill(prompt("a", 30, ttft=900)), prefill(prompt("b", 10, ttft=50))
    assert route(prompt("new", 5, ttft=60), later, sooner) == 0


def test_hopeless_prompts_are_in_nobodys_way_unless_the_policy_takes_them_in_turn():
    hopeless, live = prefill(prompt("a", 50, ttft=9)), prefill(prompt("b", 10))
    assert route(prompt("new", 5), hopeless, live) == 0
    assert route(prompt("new", 5), hopeless, live, demotes=False) == 1


def test_one_that_is_late_everywhere_goes_where_least_is_to_be_done():
    first, second = prefill(prompt("a", 20, ttft=30)), prefill(prompt("b", 10, ttft=90))
    assert route(prompt("new", 40, ttft=10), first, second) == 1


def test_the_oldest_late_prompts_that_have_not_begun_are_named():
    asked = [prompt(str(i), 5, arrival=float(-i), ttft=2.0 + i) for i in range(9)]
    instance = prefill(*asked)
    assert routing.outline(instance, COST, 2.0).late == (), "they are due now"
    summary = routing.outline(instance, COST, 3.0)
    assert (summary.num_late, summary.late) == (9, ("8", "7", "6", "5"))
    assert routing.outline(instance, COST, 3.0, demotes=False).num_late == 0
    instance.begin(Batch({"8": 5}, predicted_s=5.0), 3.0)
    summary = routing.outline(instance, COST, 3.0)
    assert (summary.num_late, summary.late) == (8, ("7", "6", "5", "4"))


def test_an_instance_has_time_for_what_it_could_begin_at_once():
    def spare(instance):
        return routing.outline(instance, COST, 0.0).spare

    assert spare(prefill()) == 200
    assert spare(decode()) == 0
    hopeless = prefill(prompt("a", 50, ttft=9))
    assert spare(hopeless) == 0, "it waits, and is not late yet"
    hopeless.begin(Batch({"a": 10}, predicted_s=10.0), 0.0)
    assert spare(hopeless) == 0, "40 tokens are left after this step"
    short = prefill(prompt("a", 10))
    short.begin(Batch({"a": 10}, predicted_s=10.0), 0.0)
    assert spare(short) == 190, "this step ends it"
    parks = prefill(limits=replace(LIMITS, max_context=30, parked_tokens=30))
    assert spare(parks) == 30
    full = prefill(prompt("a", 10), limits=replace(LIMITS, max_batch=1))
    full.begin(Batch({"a": 10}, predicted_s=10.0), 0.0)
    assert spare(full) == 0


def test_late_prompts_come_from_where_most_wait():
    idle, some, most = (routing.outline(prefill(), COST, 0.0) for _ in range(3))
    some = replace(some, spare=0.0, num_late=3, late=("a", "b", "c"))
    most = replace(most, spare=0.0, num_late=90, late=("d", "e", "f", "g"))
    assert routing.recall([some, idle, most], 1) == (2, ("d", "e", "f", "g"))
    assert routing.recall([some, idle], 1) == (0, ("a", "b"))
    assert routing.recall([some, most], 0) is None
    assert routing.recall([idle, idle], 0) is None
    others = replace(most, late=())
    assert routing.recall([some, idle, others], 1) == (0, ("a", "b")), "those are another router's"


def test_of_late_prompts_those_go_that_fit():
    asked = [prompt("a", 8), prompt("b", 3), prompt("c", 4), prompt("d", 1)]
    assert [each.id for each in routing.fitting(asked, 7)] == ["b", "c"]
    assert routing.fitting(asked, 0) == []


def test_the_step_under_way_counts_once():
    instance = prefill(prompt("a", 15))
    instance.begin(Batch({"a": 10}, predicted_s=10.0), 0.0)
    summary = routing.outline(instance, COST, 4.0)
    assert summary.free_at == 10.0
    assert summary.ahead_s == [5.0], "10 of the 15 tokens are computed when it is free"
    assert summary.finish_s(1000.0, 3.0, 4.0) == 14.0


def test_what_was_sent_since_is_added():
    summary = routing.outline(prefill(prompt("a", 20), prompt("b", 10, ttft=50)), COST, 0.0)
    assert summary.ahead_s == [10.0, 30.0]
    more = summary.with_prompt(70.0, 4.0)
    assert more.deadline == [50.0, 70.0, 100.0]
    assert more.ahead_s == [10.0, 14.0, 34.0]
    assert more.work_s(0.0) == 34.0


def test_a_sequence_goes_where_the_load_is_least_and_has_room():
    slo = Slo(100.0, 2.0)
    light, heavy = decode(50), decode(50, 60)
    summaries = [routing.outline(instance, COST, 0.0) for instance in (heavy, light)]
    assert routing.route_decode(20, slo, summaries, COST, 0.0) == 1
    # 1 s of base in 2 s, and 0.5 s of own.
    assert summaries[1].load == pytest.approx(0.5 + 0.25)
    assert summaries[1].room == 150
    full = summaries[1].with_context(140, slo, COST)
    assert full.room == 10
    assert routing.route_decode(20, slo, [summaries[0], full], COST, 0.0) == 0


def test_a_colocated_instance_has_less_time_for_prompts_the_more_it_decodes():
    both = [Instance(str(i), Role.BOTH, LIMITS) for i in range(2)]
    both[0].add(prompt("a", 50), 1, 0.0)
    assert route(prompt("new", 5), *both) == 1


def test_by_how_much_a_first_token_is_late_where_it_comes_soonest():
    summaries = [routing.outline(prefill(prompt("a", n)), COST, 0.0) for n in (20, 30)]
    assert routing.late_s(prompt("new", 5, ttft=100), summaries, COST, 0.0) == 0.0
    assert routing.late_s(prompt("new", 5, ttft=100), summaries, COST, 90.0) == 15.0
    assert routing.late_s(prompt("new", 15, ttft=10), summaries, COST, 0.0) == 5.0, "the first due"
    assert routing.always(prompt("new", 15, ttft=10), summaries, COST, 0.0) == 0.0


def park(instance, id):
    """The prompt of `id` is prefilled, and its KV copied out."""
    while id not in instance.parked:
        batch = Batch({id: min(instance.get(id).remaining, LIMITS.max_chunk)})
        instance.begin(batch, 0.0)
        instance.end(batch, 0.0)
    instance.copied(id)


def test_it_is_full_when_as_much_waits_as_may_be_parked_and_nothing_more_may_be():
    limits = replace(LIMITS, parked_tokens=250)
    instance = prefill(*(prompt(f"{i}", 100) for i in range(4)), limits=limits)
    assert routing.outline(instance, COST, 0.0).parked_room == math.inf, "it has only to go on"
    for id in ("0", "1"):
        park(instance, id)
    summary = routing.outline(instance, COST, 0.0)
    assert summary.parked_room == 250 - 200, "two are parked, and two wait"
    assert routing.is_full(51, [summary, summary])
    assert not routing.is_full(50, [summary])
    other = routing.outline(prefill(prompt("a", 100)), COST, 0.0)
    assert not routing.is_full(51, [summary, other])
    assert routing.route_prefill(prompt("new", 5), [summary, other], COST, 0.0) == 1
    instance.release("0")
    assert routing.outline(instance, COST, 0.0).parked_room == math.inf


def test_relief_comes_with_the_first_end():
    instance = decode(50, 60)
    assert routing.outline(instance, COST, 0.0).end_s == math.inf, "none is running"
    for id in ("0", "1"):
        instance.begin(Batch(fetch=(id,)), 0.0)
        instance.fetched(id)
    batch = Batch({"0": 1})
    instance.begin(batch, 0.0)
    summary = routing.outline(instance, COST, 0.0)
    # Of 5 tokens it has 1, and a step takes 1 + 0.01 * 50 s.
    assert summary.end_s == pytest.approx(4 * 1.5)
    idle = routing.outline(decode(), COST, 0.0)
    busy = routing.outline(prefill(prompt("a", 9)), COST, 0.0)
    assert routing.relief_s([busy], [summary, idle], 0.0) == 9.0
    assert routing.relief_s([routing.outline(prefill(), COST, 0.0)], [summary, idle], 0.0) == 6.0
    assert routing.relief_s([], [idle], 0.0) == 0.0
