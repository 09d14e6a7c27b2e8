"""Decode policies on small ledgers whose answer can be worked out by hand."""

import pytest

from schedulers import decode
from schedulers.core import Batch, Instance, Limits, Request, Role, Slo
from schedulers.cost import CostModel, DecodeCost, PrefillCost, TransferCost

# A step takes 1 s and 1 ms a token of context.
COST = CostModel(PrefillCost(0, 1, 0), DecodeCost(1.0, 0.0, 0.001), TransferCost(0, 0), 10_000)
LIMITS = Limits(max_batch=4, max_chunk=10, max_context=2000, page_size=1, num_pages=10_000)
SLO = Slo(10.0, 2.0)


def ledger(running=(), ready=(), remote=(), limits=LIMITS, slo=SLO, max_tokens=101):
    """Each entry is (id, context length). All arrived in order and had their first token at 0."""
    instance = Instance("d", Role.DECODE, limits)
    arrival = -1.0
    for id, context in (*running, *ready, *remote):
        arrival += 0.001
        request = Request(id, arrival, range(context - 1), max_tokens, slo)
        instance.add(request, [7], 0.0)
    here = [id for id, _ in (*running, *ready)]
    instance.begin(Batch(fetch=tuple(here)), 0.0)
    for id in here:
        instance.fetched(id)
    instance.begin(Batch({id: 1 for id, _ in running}), 0.0)
    return instance


def decide(name, instance, now=0.5, **options):
    policies = {"continuous": decode.Continuous, "kairos": decode.Kairos}
    batch = policies.get(name, decode.KairosPlus)(COST, **options)(instance, now)
    return set(batch.work), list(batch.fetch)


def test_continuous_admits_in_order_up_to_its_cap():
    instance = ledger([("a", 9)], [("b", 500), ("c", 5)], [("d", 5)])
    assert decide("continuous", instance) == ({"a", "b", "c"}, ["d"])
    assert decide("continuous", instance, cap=2) == ({"a", "b"}, ["d"])
    assert decide("continuous", instance, cap=99) == ({"a", "b", "c"}, ["d"])


def test_continuous_fetches_in_order_and_waits_for_room():
    limits = Limits(max_batch=4, max_chunk=10, max_context=400, page_size=1, num_pages=400)
    instance = ledger([("a", 100)], remote=[("b", 150), ("c", 10)], limits=limits)
    assert decide("continuous", instance) == ({"a"}, []), "b needs 250 of 200, c does not pass it"


def test_kairos_admits_the_shortest_within_the_tpot():
    # 0.95 * 2 s leaves 900 tokens of context.
    instance = ledger([("a", 300)], [("b", 400), ("c", 100)], [("d", 300)])
    assert decide("kairos", instance) == ({"a", "c"}, ["d"]), "d holds the place that b would take"
    instance.pace = 1.8
    assert decide("kairos", instance) == ({"a"}, [])


@pytest.mark.parametrize("name", decode.POLICIES)
def test_an_empty_instance_admits_a_head_that_breaks_its_tpot(name):
    assert decide(name, ledger(ready=[("a", 1500)])) == ({"a"}, [])
    assert decide(name, ledger(remote=[("a", 1500)])) == (set(), ["a"])


@pytest.mark.parametrize("name", decode.POLICIES)
def test_a_fetch_under_way_is_not_begun_again_nor_stepped(name):
    instance = ledger(remote=[("a", 50)])
    instance.begin(Batch(fetch=("a",)), 0.0)
    assert decide(name, instance) == (set(), [])


@pytest.mark.parametrize("name", decode.POLICIES)
def test_nothing_to_do(name):
    assert decide(name, ledger()) == (set(), [])


def test_kairos_plus_admits_while_the_load_allows():
    # The base cost is half of the load and each token of context 0.0005 of it: 900 fit in 0.95.
    instance = ledger([("a", 300)], [("b", 400), ("c", 100)], [("d", 300)])
    assert decide("kairos_plus", instance) == ({"a", "c"}, ["d"])


def test_kairos_plus_steps_the_least_slack_when_not_all_fit():
    instance = ledger([("ahead", 500), ("behind", 500)])
    instance.running["ahead"].tokens += [7] * 5
    assert decide("kairos_plus", instance, now=2.5) == ({"behind"}, [])


@pytest.mark.parametrize("lost", ["ttft", "tpot"])
def test_kairos_plus_keeps_the_hopeless_out_of_the_minimum(lost):
    instance = ledger([("good", 600), ("lost", 100), ("worse", 500)])
    for id in ("lost", "worse"):
        seq = instance.running[id]
        if lost == "ttft":
            seq.first_token_at = 9.5  # due at 9
        else:
            seq.first_token_at = -150.0  # 75 tokens behind, with 100 to go
    now = 0.5 if lost == "tpot" else 10.5
    instance.running["good"].first_token_at = now - 0.5
    instance.running["good"].request = Request("good", now - 1, range(599), 101, SLO)
    assert decide("kairos_plus", instance, now) == ({"good", "lost"}, [])


def test_kairos_plus_fills_up_with_the_hopeless_where_no_feasible_one_is_left_out():
    instance = ledger([("a", 600)], [("b", 400), ("late", 100)])
    instance.waiting["late"].first_token_at = 20.0
    assert decide("kairos_plus", instance) == ({"a"}, []), "b waits, and would not fit"
    instance.cancel("b")
    assert decide("kairos_plus", instance) == ({"a", "late"}, [])


def test_kairos_plus_gives_the_hopeless_their_share_of_the_clock():
    instance = ledger([("a", 600)], [("late1", 300), ("late2", 200)])
    for id in ("late1", "late2"):
        instance.waiting[id].first_token_at = 20.0
    share = {"hopeless_share": 0.1, "period_s": 10.0}
    assert decide("kairos_plus", instance, 0.5, **share)[0] == {"late1", "late2"}, "oldest first"
    assert decide("kairos_plus", instance, 1.5, **share)[0] == {"a", "late2"}, "shortest last"


def test_kairos_plus_keeps_pages_from_the_hopeless():
    limits = Limits(max_batch=4, max_chunk=10, max_context=400, page_size=1, num_pages=1000)
    late = [("late1", 100), ("late2", 100), ("late3", 100)]
    instance = ledger([("a", 100)], remote=late, limits=limits)
    for seq in instance.waiting.values():
        seq.first_token_at = 20.0
    assert decide("kairos_plus", instance, hopeless_pages=0.4)[1] == ["late1", "late2"]
    assert decide("kairos_plus", instance, hopeless_pages=0.0)[1] == ["late1"], "one at least"
    instance.cancel("a")
    assert decide("kairos_plus", instance, hopeless_pages=0.0)[1] == ["late1", "late2", "late3"]


def test_an_overdue_request_is_not_passed_for_ever():
    limits = Limits(max_batch=4, max_chunk=10, max_context=400, page_size=1, num_pages=400)
    instance = ledger([("a", 100)], remote=[("old", 200), ("new", 10)], limits=limits)
    instance.waiting["new"].request = Request("new", 99, range(9), 101, SLO)
    instance.waiting["new"].first_token_at = 99.5
    assert decide("kairos_plus", instance, 100.0, patience_s=95.0)[1] == ["new"]
    assert decide("kairos_plus", instance, 100.0, patience_s=85.0)[1] == []
    instance.cancel("a")
    assert decide("kairos_plus", instance, 100.0, patience_s=85.0)[1][0] == "old"


def test_a_padded_step_pays_for_its_longest_context():
    padded = CostModel(
        COST.prefill, DecodeCost(1.0, 0.0, 0.001, "padded"), COST.transfer, COST.kv_capacity_tokens
    )
    instance = ledger(ready=[("a", 100), ("b", 100), ("long", 500)])
    for policy in (decode.Kairos(padded), decode.KairosPlus(padded)):
        assert set(policy(instance, 0.5).work) == {"a", "b"}, "3 * 500 is more than 900"
    for policy in (decode.Kairos(COST), decode.KairosPlus(COST)):
        assert set(policy(instance, 0.5).work) == {"a", "b", "long"}


@pytest.mark.parametrize("name", decode.POLICIES)
def test_one_that_is_here_steps_though_an_older_one_waits_for_its_pages(name):
    """Neither would ever end: the pages that the older waits for are the other's."""
    limits = Limits(max_batch=4, max_chunk=1, max_context=32, page_size=8, num_pages=4)
    instance, policy = Instance("d", Role.DECODE, limits), decode.POLICIES[name](COST)
    slo = Slo(100.0, 100.0)
    instance.add(Request("younger", 1.0, range(8), 8, slo), [0], 2.0)
    instance.begin(policy(instance, 2.0), 2.0)
    instance.add(Request("older", 0.0, range(16), 8, slo), [0], 3.0)
    instance.fetched("younger")
    assert dict(policy(instance, 3.0).work) == {"younger": 1}
