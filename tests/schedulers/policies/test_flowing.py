"""Where prompts are computed and where sequences go on, where roles flow."""

import math
from dataclasses import replace

import pytest
from costs import decodes, prefills

from schedulers.cost import CostModel, TransferCost
from schedulers.ledger.instance import Batch, Instance, Limits, Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies import flowing
from schedulers.policies.routing import Summary, outline

# A prompt takes 1 ms a token; a decode step 10 ms and 1 ms a sequence.
COST = CostModel(prefills(0, 1e-3, 0), decodes(0.01, 1e-3, 0), TransferCost(0, 0), 10_000)
SLO = Slo(1.0, 0.1)
LIMITS = Limits(max_batch=64, max_chunk=100, max_context=200, page_size=1, num_pages=400)
IDLE = Summary("", Role.BOTH, 0.0, [], [], 1.0, 0.0, room=400.0, flows=True)


def fleet(*decoding, room=400.0):
    """Summaries of two that prefill and one that receives, of these shares of decode."""
    ids = "prefill-0", "prefill-1", "decode-0"
    each = [replace(IDLE, id=id, load=x) for id, x in zip(ids, decoding, strict=True)]
    return [*each[:2], replace(each[2], receives=True, room=room)]


def batch(id, count):
    return Batch({id: count}, predicted_s=0.01)


def place(summaries, home=0, late=False, length=50):
    return flowing.place(length, SLO, late, summaries, home, COST, 0.0)


@pytest.mark.parametrize(
    ("decoding", "room", "late", "index"),
    [
        ((0, 0, 0), 400, False, 2),  # the receiving one has time
        ((0, 0, 0.85), 400, False, 2),
        ((0, 0, 0.875), 400, False, 0),  # it has not: where the KV is
        ((0, 0.5, 0.875), 400, False, 1),  # where the base of a step is paid for
        ((0.5, 0.5, 0.875), 400, False, 0),
        ((0.5, 0.95, 0.875), 400, False, 0),
        ((0.95, 0.95, 0.875), 400, False, 2),  # nobody has time
        ((0, 0, 0.1), 40, False, 0),  # it has no room
        ((0, 0, 0.875), 400, True, 2),  # late ones cost those that prefill nothing
    ],
)
def test_a_sequence_goes_where_it_costs_others_least(decoding, room, late, index):
    placed = place(fleet(*decoding, room=room), late=late)
    assert placed.index == index
    assert late or placed.why.startswith(f"decode-0 decodes {decoding[2]:.0%} of its time")
    assert ("room for 40 tokens" in placed.why) == (room == 40)


def test_kv_moves_only_to_where_there_is_room_for_it():
    summaries = fleet(0.0, 0.5, 0.9)
    summaries[1] = replace(summaries[1], room=49.0)
    assert place(summaries).index == 0
    assert place(summaries, home=1).index == 1, "it is there already"


@pytest.mark.parametrize(
    ("decoding", "busy_s", "index"),
    [
        ((0, 0, 0), (0, 0, 0), 0),
        ((0, 0, 0), (0.2, 0.1, 0), 2),
        ((0, 0, 0.5), (0.2, 0.1, 0), 1),  # spared, for the first token comes early elsewhere
        ((0.3, 0, 0.5), (0.0, 0.6, 0), 1),
        ((0.3, 0, 0.5), (0.0, 0.75, 0), 0),  # too late for that
        ((0, 0, 0.33), (2, 2, 0), 0),  # it is left to sequences that others hand over
        ((0, 0, 0.32), (2, 2, 0), 2),
    ],
)
def test_a_prompt_goes_where_nothing_decodes_as_long_as_it_is_early_there(decoding, busy_s, index):
    summaries = [
        replace(each, free_at=at) for each, at in zip(fleet(*decoding), busy_s, strict=True)
    ]
    request = Request("a", 0.0, range(100), 5, SLO)
    assert flowing.route_prompt(request, summaries, COST, 0.0) == index


@pytest.mark.parametrize(("pace", "load", "index"), [(1, 0.62, 2), (1, 0.63, 0), (0.5, 0.62, 0)])
def test_the_base_of_steps_leaves_as_much_for_sequences_at_every_tpot(pace, load, index):
    """A step each 20 ms costs half of the time in bases, at a pace of 1."""
    busy = [replace(each, free_at=2.0) for each in fleet(0, 0, load)[:2]]
    receives = replace(fleet(0, 0, load)[2], pace=pace)
    request = Request("a", 0.0, range(100), 5, Slo(1.0, 0.02))
    assert flowing.route_prompt(request, [*busy, receives], COST, 0.0) == index


def test_roles_flow_where_somebody_receives():
    assert flowing.flows(fleet(0, 0, 0))
    assert not flowing.flows(fleet(0, 0, 0)[:2])


def test_what_decodes_counts_at_the_pace_that_keeps_it_and_the_hopeless_not_at_all():
    instance = Instance("a", Role.BOTH, LIMITS)
    for index, first_at in enumerate((0.0, 0.0, 2.0)):
        instance.add(Request(f"r{index}", 0.0, range(10), 50, SLO), 1, first_at)
    instance.add(Request("prompt", 0.0, range(10), 50, SLO))
    # Ten milliseconds of a step's base and two sequences, in a TPOT; the third was late.
    assert outline(instance, COST, 0.0, flows=True).load == pytest.approx(0.12, rel=0.01)
    assert outline(instance, COST, 9.0, flows=True).load == 0.0, "too far behind"
    assert outline(Instance("b", Role.BOTH, LIMITS), COST, 0.0, flows=True).load == 0.0


def test_a_sequence_that_is_placed_is_not_among_those_that_decode_at_home():
    instance = Instance("a", Role.BOTH, LIMITS)
    for id in ("old", "new"):
        seq = instance.add(Request(id, 0.0, range(10), 50, SLO))
        instance.begin(batch(id, 10), 0.0)
        instance.end(batch(id, 10), 0.01)
        assert seq.num_tokens == 1
    assert outline(instance, COST, 0.01, flows=True).load == pytest.approx(0.12, rel=0.02)
    assert outline(instance, COST, 0.01, flows=True, without=["new"]).load == pytest.approx(
        0.11, rel=0.02
    )


def test_what_was_placed_counts_before_a_summary_says_so():
    one = IDLE.with_context(50, SLO, COST)
    two = one.with_context(50, SLO, COST)
    assert (one.load, two.load) == (pytest.approx(0.11), pytest.approx(0.12))
    assert two.room == 300
    assert one.with_context(50, SLO, COST, late=True).load == one.load


def test_parked_kv_is_bounded_by_the_prompts_alone():
    limits = replace(LIMITS, parked_tokens=300.0)
    instance = Instance("a", Role.BOTH, limits)
    for id in ("a", "b"):
        instance.add(Request(id, 0.0, range(100), 50, SLO))
        instance.begin(batch(id, 100), 0.0)
        if id == "a":
            instance.end(batch(id, 100), 0.1)
    assert instance.parked_room == 200, "of the one that decodes nothing will be parked"
    instance.end(batch("b", 100), 0.2)
    instance.hand_over("b", "why")
    assert instance.parked_room == 200
    assert outline(instance, COST, 0.2).parked_room == math.inf


def test_only_what_has_a_first_token_is_handed_over():
    instance = Instance("a", Role.BOTH, LIMITS)
    instance.add(Request("a", 0.0, range(100), 50, SLO))
    instance.begin(batch("a", 50), 0.0)
    instance.end(batch("a", 50), 0.1)
    with pytest.raises(
        ValueError, match="'a' is to be handed over in the midst of a step or prompt"
    ):
        instance.hand_over("a", "why")
    instance.check()
