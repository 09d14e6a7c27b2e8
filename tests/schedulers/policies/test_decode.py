"""Decode policies on small ledgers whose answer can be worked out by hand.

Of kairos_plus, whose admissions depend on how it is tuned, what must hold however that is.
"""

import pytest
from costs import decodes, prefills

from schedulers.cost import CostModel, TransferCost
from schedulers.ledger.instance import Batch, Instance, Limits, Role
from schedulers.ledger.request import Request, Slo
from schedulers.ledger.rows import Column
from schedulers.policies import decode
from schedulers.policies.view import View

# A step takes 1 s and 1 ms a token of context.
COST = CostModel(prefills(0, 1, 0), decodes(1.0, 0.0, 0.001), TransferCost(0, 0), 10_000)
PADDED = CostModel(COST.prefill, decodes(1.0, 0.0, 0.001, "padded"), COST.transfer, 10_000)
LIMITS = Limits(max_batch=4, max_chunk=10, max_context=2000, page_size=1, num_pages=10_000)
SMALL = Limits(max_batch=4, max_chunk=10, max_context=400, page_size=1, num_pages=400)
SLO = Slo(10.0, 2.0)


def ledger(running=(), ready=(), remote=(), limits=LIMITS, **by_id):
    """Each entry is (id, context length). All arrived in that order, just before 0. by_id: `slos`
    other than SLO, `first_at` for a first token at another time than 0, `tokens` for more than one.
    """
    slos, first_at, tokens = (by_id.get(name, {}) for name in ("slos", "first_at", "tokens"))
    instance = Instance("d", Role.DECODE, limits)
    arrival = -1.0
    for id, context in (*running, *ready, *remote):
        arrival += 0.001
        count = tokens.get(id, 1)
        request = Request(id, arrival, range(context - count), 101, slos.get(id, SLO))
        instance.add(request, count, first_at.get(id, 0.0))
    here = [id for id, _ in (*running, *ready)]
    instance.begin(Batch(fetch=tuple(here)), 0.0)
    for id in here:
        instance.fetched(id)
    if running:
        instance.begin(Batch({id: 1 for id, _ in running}), 0.0)
    return instance


def policy(name, cost=COST, **options):
    return decode.POLICIES[name](cost, **options)


def decide(name, instance, now=0.5, **options):
    batch = policy(name, **options)(instance, now)
    return set(batch.work), list(batch.fetch)


def step(policy, instance, now):
    """One decision, run as predicted, its moves of KV at once. Returns (who left, end)."""
    batch = policy(instance, now)
    instance.begin(batch, now)
    for id in batch.evict:
        instance.copied(id)
    for id in batch.fetch:
        instance.fetched(id)
    if not batch.work:
        return [], now + 0.001
    now += batch.predicted_s
    return [seq.request.id for seq in instance.end(batch, now)], now


def test_continuous_admits_in_order_up_to_its_cap():
    instance = ledger([("a", 9)], [("b", 500), ("c", 5)], [("d", 5)])
    assert decide("continuous", instance) == ({"a", "b", "c"}, ["d"])
    assert decide("continuous", instance, cap=2) == ({"a", "b"}, ["d"])
    assert decide("continuous", instance, cap=99) == ({"a", "b", "c"}, ["d"])


def test_continuous_fetches_in_order_and_waits_for_room():
    instance = ledger([("a", 260)], remote=[("b", 150), ("c", 10)], limits=SMALL)
    assert decide("continuous", instance) == ({"a"}, []), "b needs 150 of 140, c does not pass it"
    instance.cancel("b")
    assert decide("continuous", instance) == ({"a"}, ["c"])


def test_kairos_admits_the_shortest_within_the_tpot():
    # 0.95 * 2 s leaves 900 tokens of context.
    instance = ledger([("a", 300)], [("b", 400), ("c", 100)], [("d", 300)])
    assert decide("kairos", instance) == ({"a", "c"}, ["d"]), "d holds the place that b would take"
    instance.pace = 1.8
    assert decide("kairos", instance) == ({"a"}, [])


def test_kairos_keeps_to_the_least_tpot():
    instance = ledger([("a", 300)], [("b", 100)], slos={"b": Slo(10.0, 1.3)})
    assert decide("kairos", instance) == ({"a"}, []), "1.4 s are too long for b"


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
    assert not policy(name)(ledger(), 0.5)


@pytest.mark.parametrize("name", decode.POLICIES)
def test_a_step_without_a_need_evicts_nobody(name):
    instance = ledger([("a", 199), ("b", 199)], remote=[("c", 5)], limits=SMALL)
    batch = policy(name)(instance, 0.5)
    assert not batch.evict
    assert not batch.fetch, "both of the free pages are needed for the next two tokens"


@pytest.mark.parametrize(
    ("name", "victim"), [("continuous", "young"), ("kairos", "long"), ("kairos_plus", "lost")]
)
def test_whose_pages_are_taken_when_there_are_too_few(name, victim):
    """401 tokens in 400 pages. `lost` missed its TTFT; the others are in time."""
    running = [("lost", 99), ("long", 200), ("young", 100)]
    # `lost` is the oldest and the shortest.
    instance = ledger(running, limits=SMALL, first_at={"lost": 20.0})
    instance.end(Batch(dict.fromkeys(instance.running, 1)), 1.4)
    batch = policy(name)(instance, 1.4)
    assert batch.evict == (victim,)
    assert not batch.fetch, "nobody comes in while somebody must go"
    assert len(batch.work) <= 1, "there is a page for one"
    instance.begin(batch, 1.4)
    instance.check()
    assert not instance.waiting[victim].ready
    assert instance.pages.num_free <= 1, "its pages are still to be copied"
    assert not policy(name)(instance, 1.5).evict, "until then no other one is evicted"
    if batch.work:
        instance.end(batch, 2.0)
    instance.copied(victim)
    others = {"lost", "long", "young"} - {victim}
    assert set(policy(name)(instance, 2.0).work) == others or name == "kairos_plus"


@pytest.mark.parametrize("name", decode.POLICIES)
def test_the_evicted_come_back_and_end(name):
    running = [("a", 130), ("b", 130), ("c", 130)]
    instance, now, ended, evicted = ledger(running, limits=SMALL), 1.39, [], 0
    instance.end(Batch(dict.fromkeys(instance.running, 1)), now)
    for _ in range(1000):
        evicted += len(policy(name)(instance, now).evict)
        left, now = step(policy(name), instance, now)
        ended += left
        instance.check()
        if len(ended) == 3:
            break
    assert sorted(ended) == ["a", "b", "c"]
    assert 1 <= evicted <= 6, "they do not take turns in evicting each other"


@pytest.mark.parametrize("name", ["kairos", "kairos_plus"])
def test_a_batch_grows_while_the_tpot_allows(name):
    ready = [("a", 100), ("b", 100), ("c", 100)]
    assert decide(name, ledger(ready=ready))[0] == {"a", "b", "c"}
    ready = [("a", 1200), ("b", 1200), ("c", 1200)]
    assert len(decide(name, ledger(ready=ready))[0]) == 1


@pytest.mark.parametrize("name", ["kairos", "kairos_plus"])
def test_a_padded_step_pays_for_its_longest_context(name):
    instance = ledger(ready=[("a", 100), ("b", 100), ("long", 500)])
    assert set(policy(name, PADDED)(instance, 0.0).work) == {"a", "b"}, "3 * 500 is more than 900"
    assert set(policy(name)(instance, 0.0).work) == {"a", "b", "long"}


@pytest.mark.parametrize("name", ["kairos", "kairos_plus"])
def test_a_ragged_step_pays_for_the_padding_of_its_batch(name):
    """Three sequences take 1 + 3 * 0.2 + 0.27 s; as a batch of four, 0.2 s more than there is."""
    ready = [("a", 90), ("b", 90), ("c", 90)]
    for buckets, count in (((), 3), ((1, 2, 4), 2), ((1, 2, 3, 4), 3)):
        step = decodes(1.0, 0.2, 0.001, "ragged", buckets, (1.0,) * len(buckets))
        cost = CostModel(COST.prefill, step, COST.transfer, 10_000)
        instance = ledger(ready=ready)
        assert len(policy(name, cost)(instance, 0.0).work) == count
        served, _ = View(cost, instance, 0.0, 0.9).serve(target=0.96, newcomers=0.92)
        assert served.size == count, "the load has the padding too"


@pytest.mark.parametrize("lost", ["ttft", "tpot"])
def test_kairos_plus_keeps_the_hopeless_out_of_the_minimum(lost):
    """A TPOT of 1.1 s alone would allow 45 tokens of context."""
    slos = {"lost": Slo(10.0, 1.1)}
    first_at = {"lost": 9.5 if lost == "ttft" else -150.0}  # due at 9; or 140 tokens behind
    now = 10.5 if lost == "ttft" else 0.5
    first_at |= {"a": now, "b": now}
    slos |= {"a": Slo(20.0, 2.0), "b": Slo(20.0, 2.0)}
    running = [("lost", 100), ("a", 300), ("b", 300)]
    instance = ledger(running, slos=slos, first_at=first_at)
    assert decide("kairos_plus", instance, now)[0] >= {"a", "b"}


@pytest.mark.parametrize(
    ("first_at", "count", "steps"),
    [(0.0, 20, {"a", "b", "c"}), (-1.9, 20, {"a", "c"}), (-1.9, 1, {"a", "b", "c"})],
)
def test_one_that_is_behind_makes_up_for_it_soon(first_at, count, steps):
    """A step of all takes 1.8 s, which keeps each TPOT over the 32 tokens expected. `a` is 0.5 s
    or 2.4 s behind: in eight tokens it makes up for that by steps of 1.94 s or 1.7 s. `b` and `c`
    can wait if they have 20 tokens in time; else the load leaves no time for shorter steps.
    """
    running = [("a", 300), ("b", 300), ("c", 200)]
    tokens = {"b": count, "c": count}
    instance = ledger(running, first_at={"a": first_at}, tokens=tokens)
    assert decide("kairos_plus", instance) == (steps, [])


def test_kairos_plus_takes_no_place_of_the_feasible_for_the_hopeless():
    late = [(f"late{i}", 10) for i in range(9)]
    # The tenth token of the feasible has come just now, when it was due.
    by_id = {
        "first_at": dict.fromkeys(("a", "b"), -17.5) | {id: 20.0 for id, _ in late},
        "tokens": dict.fromkeys(("a", "b"), 10),
    }
    instance = ledger(ready=[*late, ("a", 300), ("b", 300)], **by_id)
    assert decide("kairos_plus", instance)[0] >= {"a", "b"}, "though later, and longer"
    late = [(id, 100) for id, _ in late]
    instance = ledger(remote=[*late, ("a", 300)], limits=SMALL, **by_id)
    assert decide("kairos_plus", instance)[1][0] == "a"


def stream(policy, instance, until, limit_s, slo, context=100):
    """A feasible request as soon as there are fewer than two here. Returns when `until` ended."""
    now, number = 0.5, 0
    while now < limit_s:
        while len(instance.waiting) + len(instance.running) < 3 + (until not in instance.running):
            request = Request(f"new{number}", now - 0.1, range(context - 1), 20, slo)
            instance.add(request, 1, now)
            number += 1
        left, now = step(policy, instance, now)
        instance.check()
        if until in left:
            return now
    raise AssertionError(f"{until!r} has not ended by {limit_s} s, after {number} others came")


def test_kairos_plus_brings_the_hopeless_to_their_end():
    """Beside a stream of feasible requests that would fill every step."""
    slo = Slo(10.0, 0.0125)
    cost = CostModel(COST.prefill, decodes(0.01, 0.0, 1e-5), COST.transfer, 10_000)
    late = {"slos": {"late": slo}, "first_at": {"late": 20.0}, "tokens": {"late": 90}}
    instance = ledger(ready=[("late", 300)], **late)
    stream(decode.KairosPlus(cost), instance, "late", 600.0, slo)


def test_kairos_plus_fetches_a_large_request_in_the_end():
    """Its pages are never free by themselves: small ones come all the time."""
    cost = CostModel(COST.prefill, decodes(0.1, 0.0, 0.0), COST.transfer, 10_000)
    instance = ledger(remote=[("large", 290)], limits=SMALL)
    stream(decode.KairosPlus(cost), instance, "large", 600.0, SLO, context=80)


@pytest.mark.parametrize("name", decode.POLICIES)
def test_one_that_is_here_steps_though_an_older_one_waits_for_its_pages(name):
    """Neither would ever end: the pages that the older waits for are the other's."""
    limits = Limits(max_batch=4, max_chunk=1, max_context=32, page_size=8, num_pages=4)
    instance = Instance("d", Role.DECODE, limits)
    slo = Slo(100.0, 100.0)
    instance.add(Request("younger", 1.0, range(8), 8, slo), 1, 2.0)
    instance.begin(policy(name)(instance, 2.0), 2.0)
    instance.add(Request("older", 0.0, range(24), 8, slo), 1, 3.0)
    instance.fetched("younger")
    assert dict(policy(name)(instance, 3.0).work) == {"younger": 1}


def test_one_hopeless_sequence_with_a_tight_tpot_does_not_hold_up_the_others():
    instance = ledger([("a", 100), ("b", 100), ("tight", 100)])
    for id, tpot in (("a", 2.0), ("b", 2.0), ("tight", 0.001)):
        cells = instance.running[id].cells
        cells[Column.TPOT], cells[Column.FIRST_AT] = tpot, 20.0  # due at 9
    assert decide("kairos_plus", instance)[0] == {"a", "b", "tight"}


def test_none_is_evicted_in_vain():
    """B's pages do not make room for C, so they stay B's."""
    limits = Limits(max_batch=4, max_chunk=1, max_context=100, page_size=1, num_pages=100)
    instance = ledger([("a", 70), ("b", 10)], remote=[("c", 41)], limits=limits)
    instance.running["b"].cells[Column.FIRST_AT] = 20.0
    instance.pace = 1.7  # not so light that everybody steps
    batch = decode.KairosPlus(COST)(instance, 0.5)
    assert batch.evict == ()
    assert batch.fetch == ()
