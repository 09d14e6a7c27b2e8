"""One instance that does both jobs, on small ledgers whose answer can be worked out by hand."""

import math

import pytest
from costs import decodes, prefills

from schedulers.cost import CostModel, TransferCost
from schedulers.ledger.instance import Batch, Instance, Limits, Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies import decode
from schedulers.policies.colocated import Colocated
from schedulers.simulation.scenario import Scenario, simulate
from schedulers.simulation.workload import SloClass, fit_lengths, rescale, synthetic

# A prompt's step takes 0.1 s and 10 ms a token, a decode step 0.1 s.
COST = CostModel(prefills(0.1, 0.01, 0), decodes(0.1, 0.0, 0.0), TransferCost(0, 0), 10_000)
LIMITS = Limits(max_batch=4, max_chunk=100, max_context=1000, page_size=10, num_pages=400)
SLO = Slo(2.0, 0.2)
# Of a time like this, no share goes to the late.
NOW = 101.0


def ledger(decoding=(), prompts=(), now=NOW, limits=LIMITS):
    """decoding: (id, tokens so far, seconds since its first); of 99 tokens each, at most. prompts:
    (id, tokens, seconds since it arrived).
    """
    instance = Instance("b", Role.BOTH, limits)
    for id, count, age in decoding:
        first_at = now - age
        instance.add(Request(id, first_at, range(10), 99, SLO), count, first_at)
    instance.begin(Batch(fetch=tuple(id for id, *_ in decoding)), now)
    for id, *_ in decoding:
        instance.fetched(id)
    for id, count, age in prompts:
        instance.add(Request(id, now - age, range(count), 99, SLO))
    return instance


def decide(instance, names=("kairos_plus", "kairos_plus"), now=NOW, **options):
    return dict(Colocated(COST, *names, **options)(instance, now).work)


# In time: it has 10 tokens after 1 s, of which 5 are due. Late: 10 after 9 s, when 45 were.
IN_TIME, LATE = ("d", 10, 1.0), ("e", 10, 9.0)
LIVE, HOPELESS = ("p", 50, 0.5), ("q", 50, 1.9)


def test_a_late_prompt_stands_back_while_a_sequence_can_keep_its_tpot():
    assert decide(ledger([IN_TIME], [HOPELESS])) == {"d": 1}
    assert decide(ledger([IN_TIME], [LIVE])) == {"d": 1, "p": 50}
    assert decide(ledger([IN_TIME], [HOPELESS, LIVE])) == {"d": 1, "p": 50}


def test_an_overdue_prompt_stands_back_no_longer():
    """It has waited for 20 of its TTFTs, of 2 s, and late prompts take a tenth of 80 at most."""
    waited = ("q", 39, 40.0)
    assert decide(ledger([IN_TIME], [("q", 39, 39.9)])) == {"d": 1}
    assert decide(ledger([IN_TIME], [waited])) == {"d": 1, "q": 39}
    assert decide(ledger([IN_TIME], [("q", 41, 40.0)])) == {"d": 1}, "it takes more than 0.5 s"
    assert decide(ledger([IN_TIME], [waited, LIVE])) == {"d": 1, "p": 50}
    assert decide(ledger([("d", 10, 1.9)], [waited])) == {"d": 1}, "its TPOT is first"
    more = [(str(i), 50, 9.0) for i in range(25)]  # of 0.6 s each
    assert decide(ledger([IN_TIME], [waited, *more])) == {"d": 1, "q": 39}
    assert decide(ledger([IN_TIME], [waited, *more, ("25", 50, 9.0)])) == {"d": 1}


def test_a_late_sequence_stands_back_while_a_prompt_can_keep_its_ttft():
    assert decide(ledger([LATE], [LIVE])) == {"p": 50}
    assert decide(ledger([LATE, IN_TIME], [LIVE])) == {"d": 1, "p": 50}
    assert decide(ledger([LATE, IN_TIME])) == {"d": 1, "e": 1}


def test_the_late_run_when_nobody_else_does():
    assert decide(ledger([LATE], [HOPELESS])) == {"e": 1, "q": 50}
    full = [(str(i), 10, 9.0) for i in range(LIMITS.max_batch)]
    assert decide(ledger(full, [LIVE])) == dict.fromkeys("0123", 1), "no place for the prompt"


def test_the_late_have_their_share_of_the_time():
    now = 100.0
    assert decide(ledger([IN_TIME], [HOPELESS], now), now=now) == {"d": 1, "q": 50}
    assert decide(ledger([IN_TIME], [HOPELESS], now), now=now, late_share=0.0) == {"d": 1}
    assert decide(ledger([LATE], [LIVE], now), now=now) == {"e": 1, "p": 50}
    assert decide(ledger([LATE], [LIVE], now), now=now, late_share=0.0) == {"p": 50}


@pytest.mark.parametrize("names", [("fcfs", "kairos_plus"), ("kairos_plus", "continuous")])
def test_nobody_stands_back_where_a_policy_does_not_know_who_is_late(names):
    assert decide(ledger([IN_TIME], [HOPELESS]), names) == {"d": 1, "q": 50}


def test_its_verdict_is_that_of_the_policy_of_the_job():
    instance = ledger([LATE], [HOPELESS, LIVE])
    plus = Colocated(COST, "kairos_plus", "kairos_plus")
    told = [plus.verdict(instance, NOW, id) for id in ("e", "q", "p", "gone")]
    assert [text.partition(":")[0] for text in told] == ["hopeless", "hopeless", "live", ""]
    assert not Colocated(COST, "fcfs", "continuous").verdict(instance, NOW, "p")


def test_a_chunk_waits_until_it_is_worth_its_base_cost():
    # Slack of 1 s, of which 0.96 count, less 0.1 for the decode step. Its base is the chunk's too.
    long = ("p", 100, 0.1)
    assert decide(ledger([IN_TIME], [long]), worth=8.0) == {"d": 1, "p": 86}
    assert decide(ledger([IN_TIME], [long]), worth=9.0) == {"d": 1}
    # Kairos gives it 0.19 s of each step and no more, however long it waits.
    some = CostModel(prefills(0.02, 0.001, 0), COST.decode, COST.transfer, 10_000)
    work = Colocated(some, "kairos", "kairos", worth=8.0)(ledger([IN_TIME], [long]), NOW).work
    assert dict(work) == {"d": 1, "p": 90}


def test_a_step_that_decodes_and_prefills_has_one_base():
    batch = Colocated(COST, "fcfs", "continuous")(ledger([IN_TIME], [("p", 50, 9.0)]), NOW)
    assert dict(batch.work) == {"d": 1, "p": 50}
    assert batch.predicted_s == pytest.approx(0.1 + 50 * 0.01)


def test_what_decode_leaves_of_a_step_is_filled():
    prompts = [("p", 20, 0.5), ("q", 90, 0.4)]
    # The slack of 1 s leaves 0.96 s: 0.1 s of base, and 86 tokens.
    packed = decide(ledger([IN_TIME], prompts), pack=math.inf)
    assert packed == {"d": 1, "p": 20, "q": 66}
    packed = decide(ledger([], prompts), pack=math.inf)
    assert packed == {"p": 20}, "a step of prompts alone would only end later"


@pytest.mark.parametrize(
    ("count", "age", "chunk"),
    [
        (10, 1.0, 86),  # 0.96 of the second that it has, without a base of 0.1 s
        (10, 1.8, 9),  # 0.96 of a TPOT
        (2, 0.3, 6),  # half a TPOT behind: it makes up for a quarter of that
        (4, 0.7, 4),  # for half of that
        (5, 0.9, 0),  # for all of it
        (10, 1.9, 0),
    ],
)
def test_one_that_was_handed_over_catches_up_by_its_sixth_token(count, age, chunk):
    instance = ledger([("d", count, age)], [("p", 90, 0.5)])
    instance.receives = True
    work = decide(instance)
    assert (work["d"], work.get("p", 0)) == (1, chunk)


def test_under_overload_more_keep_both_slos_than_by_coming_first():
    # A small machine: prompts keep it busy for three quarters of the time.
    cost = CostModel(
        prefills(0.04, 0.0019, 3e-7),
        decodes(0.022, 0.0028, 4e-6),
        TransferCost(0, 0),
        90_000,
    )
    arrivals = rescale(fit_lengths(synthetic(300, 1.0, 0), 860, 136), 2.0)

    def attained(**policies):
        classes = (SloClass(1.0, Slo(1.0, 0.1)),)
        scenario = Scenario(cost, classes, colocated=1, chunk=256, max_batch=64, **policies)
        return simulate(scenario, arrivals)["e2e_attainment"]

    assert attained() > 65
    assert attained(prefill_policy="fcfs", decode_policy="continuous") < 10


def test_a_step_that_is_decided_ahead_is_judged_from_when_it_begins():
    """A prompt of 50 tokens takes 0.6 s, and is due in as much once the step under way is over."""
    instance = ledger([IN_TIME])
    policy = Colocated(COST, "kairos_plus", "kairos_plus")
    batch = policy(instance, NOW)
    instance.begin(batch, NOW)
    assert instance.begins_at(NOW) == NOW, "nothing is decided but fetches"
    instance.expect(NOW)
    begins = instance.begins_at(NOW)
    assert begins == instance.busy_until == NOW + batch.predicted_s
    assert instance.begins_at(begins + 1.0) == begins + 1.0, "the step under way is late"
    instance.add(Request("p", NOW - 1.35, range(50), 99, SLO))
    late = dict(policy(instance, NOW).work)
    assert "p" not in late, "0.65 s are left, and 0.55 s from when it could begin"
    instance.end(batch, NOW)
    assert "p" in policy(instance, NOW).work


def test_a_step_leaves_room_for_as_much_as_steps_of_late_differ_from_their_predictions():
    """`d` has a slack of 1 s, and needs a token every 0.2 s in the long run."""
    instance, policy = ledger([IN_TIME]), decode.KairosPlus(COST)
    limit_s = policy.limit_s(instance, Batch(), NOW)
    assert limit_s == pytest.approx(0.96)
    instance.spread = 0.25
    assert policy.limit_s(instance, Batch(), NOW) == pytest.approx(limit_s / 1.25)
    behind = ledger([("d", 6, 1.1)])
    limit_s = policy.limit_s(behind, Batch(), NOW)
    assert limit_s == pytest.approx(0.96 * 0.2, rel=0.05)
    behind.spread = 0.25
    share = policy.limit_s(behind, Batch(), NOW) / limit_s
    assert 1 / 1.25 < share < 0.99, "over as many steps as it has tokens left, they even out"
