"""Runs under a journal, written out, read back and decided again."""

import dataclasses
import itertools
import json
import math
import random

import pytest
from costs import decodes, prefills

from schedulers.cost import CostModel, TransferCost
from schedulers.ledger.instance import Batch, Instance, Limits, Role
from schedulers.ledger.journal import Journal, check, from_lines, replay, to_lines
from schedulers.ledger.request import Request, Slo
from schedulers.policies import decode, prefill
from schedulers.policies.colocated import policy_for
from schedulers.simulation.simulator import Fleet, Simulation

COST = CostModel(
    prefills(5e-3, 150e-6, 2e-9),
    decodes(7e-3, 20e-6, 55e-9),
    TransferCost(2e-3, 5e-6),
    4000,
)
# Few pages: there are evictions, and prompts that wait for others to be released.
LIMITS = Limits(
    max_batch=12,
    max_chunk=256,
    max_context=1600,
    page_size=16,
    num_pages=120,
    parked_tokens=3000,
)


def page_keys(num_prompt, prefix, serial):
    """Of a prompt whose first `prefix` tokens others have too."""
    ends = range(LIMITS.page_size, num_prompt + 1, LIMITS.page_size)
    return tuple(end if end <= prefix else -(10_000 * serial + end) for end in ends)


def simulate(prefill_policy, decode_policy, count=40, seed=1, prefix=0):
    """A journaled overload on two prefill and two decode instances: (lines, policies by id).
    prefix: tokens with which all prompts begin.
    """
    rng = random.Random(seed)
    requests, outputs, at = [], [], 0.0
    for serial in range(count):
        at += rng.expovariate(60.0)
        num_prompt = min(int(rng.lognormvariate(5, 1)) + 1, 1200)
        slo = Slo(rng.choice([0.2, 2.0]), rng.choice([0.01, 0.04]))
        keys = page_keys(num_prompt, prefix, serial) if prefix else ()
        requests.append(
            Request(f"r{serial}", at, range(num_prompt), 400, slo, serial=serial, page_keys=keys)
        )
        outputs.append(min(int(rng.lognormvariate(4, 1)) + 1, 400))
    fleet = Fleet(
        [(Instance(f"p{i}", Role.PREFILL, LIMITS), prefill_policy) for i in range(2)],
        [(Instance(f"d{i}", Role.DECODE, LIMITS), decode_policy) for i in range(2)],
    )

    def least_busy(_, instances, now):
        return min(range(2), key=lambda i: len(instances[i].waiting) + len(instances[i].running))

    simulation = Simulation(requests, outputs, fleet, COST, least_busy, least_busy, noise=0.1)
    journal = Journal(lambda: simulation.now)
    pairs = [*fleet.prefill, *fleet.decode]
    for instance, _ in pairs:
        instance.journal = journal.recorder(instance)
    simulation.run()
    lines = list(to_lines(journal.take()))
    assert not list(journal.take())
    return lines, {instance.id: policy for instance, policy in pairs}


@pytest.fixture(scope="module")
def lines():
    return simulate(prefill.KairosPlus(COST), decode.KairosPlus(COST))[0]


@pytest.mark.parametrize(("front", "back"), [*itertools.product(prefill.POLICIES, decode.POLICIES)])
def test_every_decision_replays_equal(front, back):
    lines, policies = simulate(prefill.POLICIES[front](COST), decode.POLICIES[back](COST))
    begun = [record for line in lines if (record := json.loads(line))[1] == "begin"]
    assert any(record[5] for record in begun), "nothing was fetched"
    assert check(from_lines(lines), policies) == len(begun)


@pytest.mark.parametrize("front", prefill.POLICIES)
def test_decisions_on_what_is_cached_replay_equal(front):
    policy = prefill.POLICIES[front](COST)
    lines, policies = simulate(policy, decode.KairosPlus(COST), prefix=160)
    first, cached = set(), 0
    for decision in replay(from_lines(lines)):
        for id in decision.batch.work.keys() & decision.instance.waiting.ids:
            if id not in first:
                first.add(id)
                cached += decision.instance.waiting[id].computed
    assert cached > 16 * LIMITS.page_size
    assert check(from_lines(lines), policies) > len(first) == 40


@pytest.mark.parametrize(
    ("front", "back"),
    [("fcfs", "continuous"), ("sjf", "kairos"), ("kairos_plus", "kairos_plus")],
)
def test_decisions_ahead_of_a_result_replay_equal(front, back):
    """Where each step is decided so, save where a decision needs the result."""
    rng, now = random.Random(2), 0.0
    policy = policy_for(Role.BOTH, COST, front, back, 1.0)
    instance = Instance("b", Role.BOTH, dataclasses.replace(LIMITS, parked_tokens=math.inf))
    journal = Journal(lambda: now)
    instance.journal = journal.recorder(instance)
    for serial in range(40):
        num_prompt = rng.randint(1, 400)
        keys = page_keys(num_prompt, 64, serial)
        slo = Slo(rng.choice([0.2, 2.0]), rng.choice([0.01, 0.04]))
        asked = Request(f"r{serial}", 0.0, range(num_prompt), 60, slo, page_keys=keys)
        instance.add(asked)
    under_way, num_ahead = [], 0
    while instance.waiting or instance.running or under_way:
        now += rng.uniform(0.001, 0.01)
        batch = Batch()
        if not (under_way and instance.awaits_result):
            batch = policy(instance, now)
        if batch and not (under_way and batch.evict):
            instance.begin(batch, now)
            for id in batch.evict:
                instance.copied(id)
            for id in batch.fetch:
                instance.fetched(id)
        if batch.work and not (under_way and batch.evict):
            num_ahead += len(under_way)
            under_way.append(batch)
        if under_way and (len(under_way) == 2 or not batch.work or batch.evict):
            stopped = [id for id in under_way[0].work if rng.random() < 0.05]
            instance.end(under_way.pop(0), now, [id for id in stopped if tokens(instance, id)])
        if under_way:
            now += 0.001
            instance.expect(now)
        instance.check()
    lines = list(to_lines(journal.take()))
    assert num_ahead > 50
    assert check(from_lines(lines), {"b": policy}) > num_ahead


def tokens(instance, id):
    """How many tokens there are of an output, if any."""
    seq = instance.get(id)
    return seq.num_tokens if seq else 0


def test_another_policy_is_noticed(lines):
    policies = dict.fromkeys(("p0", "p1"), prefill.KairosPlus(COST))
    policies |= dict.fromkeys(("d0", "d1"), decode.Kairos(COST, target=0.5))
    with pytest.raises(ValueError, match=r"record \d+: instance 'd\d' decided otherwise at .* s: "):
        check(from_lines(lines), policies)
    del policies["d1"]
    with pytest.raises(ValueError, match="no policy for instance 'd1'"):
        check(from_lines(line for line in lines if '"d1"' in line or '"p' in line), policies)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (3, False, r"work only replayed r\d+: 1"),
        (5, ["r0"], "fetch r0 recorded, none replayed"),
        (7, 1.0, "predicted_s 1.0 recorded, 0.0"),
    ],
)
def test_a_planted_change_is_found(lines, position, value, message):
    records = list(from_lines(lines))
    number, planted = next(
        (number, record)
        for number, record in enumerate(records, 1)
        if record[:2] == ["d0", "begin"] and record[3] and not record[5]
    )
    planted[position] = value
    policies = dict.fromkeys(("p0", "p1"), prefill.KairosPlus(COST))
    policies |= dict.fromkeys(("d0", "d1"), decode.KairosPlus(COST))
    with pytest.raises(ValueError, match=f"record {number}: .*{message}"):
        check(records, policies)


def test_decisions_come_before_they_are_begun(lines):
    for decision in replay(from_lines(lines)):
        instance = decision.instance
        for id in decision.batch.fetch:
            assert not instance.waiting[id].pages
        for id in decision.batch.work:
            assert id in instance.waiting or id in instance.running
        instance.check()


def test_what_is_decided_during_a_step_is_only_whose_kv_is_fetched(lines):
    during = [d.batch for d in replay(from_lines(lines)) if d.instance.under_way]
    assert during
    assert all(batch == Batch(fetch=batch.fetch) for batch in during)


def test_usual_steps_take_few_bytes_and_prompts_none():
    """Also in memory: a record of a whole batch holds no part of it."""
    instance = Instance("d", Role.DECODE, LIMITS)
    journal = Journal(lambda: 0.0)
    instance.journal = journal.recorder(instance)
    ids = [f"request-{i}" for i in range(6)]
    for id in ids:
        instance.add(Request(id, 0.0, [99999] * 50, 9, Slo(1, 1)), 1, 0.5, tokens=[99999])
    instance.begin(Batch(fetch=tuple(ids)), 1.0)
    for id in ids:
        instance.fetched(id)
    for now in (2.0, 3.0):
        instance.begin(batch := Batch(dict.fromkeys(ids, 1), predicted_s=0.1), now)
        instance.end(batch, now + 0.1)
    lines = list(to_lines(journal.take()))
    assert lines[-2:] == ['["d","begin",3.0,true,{},[],[],0.1]\n', '["d","end",3.1,[]]\n']
    assert "99999" not in "".join(lines)
    assert [set(d.batch.work) for d in replay(from_lines(lines))] == [set(), set(ids), set(ids)]


def test_a_recorder_wants_a_new_ledger():
    instance = Instance("d", Role.DECODE, LIMITS)
    instance.add(Request("a", 0.0, range(3), 9, Slo(1, 1)))
    with pytest.raises(ValueError, match="instance 'd' must be new"):
        Journal(lambda: 0.0).recorder(instance)


def test_floats_survive():
    instance = Instance("p", Role.PREFILL, LIMITS)
    journal = Journal(lambda: 1 / 3)
    instance.journal = journal.recorder(instance)
    instance.add(Request("ä", 0.1 + 0.2, range(3), 9, Slo(1e-7 / 3, 2 / 3), serial=7))
    header, add = from_lines(to_lines(journal.take()))
    assert add == ["p", "add", 1 / 3, ["ä", 0.1 + 0.2, 3, 9, 1e-7 / 3, 2 / 3, 7], 0, None]
    assert header[4]["parked_tokens"] == 3000


def test_only_the_last_line_may_be_cut_short(lines):
    cut = [*lines[:20], lines[20][:-7]]
    assert len(list(from_lines(cut))) == 20
    with pytest.raises(ValueError, match="line 21 of the journal is no JSON"):
        list(from_lines([*cut, lines[21]]))
    with pytest.raises(ValueError, match="line 1 of the journal is no record: 7"):
        list(from_lines(["7\n", *lines]))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (["x", "add", 0.0, [], 0, None], r"record 2 \(.*\) is malformed: KeyError\('x'\)"),
        (["p", "sing", 0.0], "unknown verb 'sing'"),
        (["p", "add", 0.0, ["a", 0.0, 3], 0, None], "record 2 .* is malformed"),
        (["p", "fetched", 0.0, "a"], r"record 2 \(fetched on instance 'p'\) cannot follow"),
        (["p", "begin", 0.0, False, {}, ["a"], [], 0.1], r"record 2 \(begin on .*\) cannot"),
    ],
)
def test_what_cannot_have_happened_names_its_record(record, message):
    limits = {"max_batch": 1, "max_chunk": 1, "max_context": 1, "page_size": 1, "num_pages": 1}
    header = ["p", "instance", 0.0, "prefill", limits | {"parked_tokens": None}, True]
    with pytest.raises(ValueError, match=message):
        list(replay([header, record, ["p", "end", 1.0, []]]))
