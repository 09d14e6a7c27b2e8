"""Timelines and traces of runs: one worked out by hand, and simulated overloads."""

import itertools
import json
import random
from collections import Counter, defaultdict

import pytest
from costs import decodes, prefills

from kairos_jax.observe.explain import explain
from kairos_jax.observe.perfetto import trace_events
from schedulers.cost import CostModel, TransferCost
from schedulers.ledger.instance import Batch, Instance, Limits, Role
from schedulers.ledger.journal import Journal, from_lines, replay, to_lines
from schedulers.ledger.request import Request, Slo
from schedulers.policies import decode, prefill
from schedulers.simulation.simulator import Fleet, Simulation

LIMITS = Limits(max_batch=8, max_chunk=20, max_context=60, page_size=4, num_pages=30)
COST = CostModel(
    prefills(5e-3, 2e-4, 2e-9), decodes(7e-3, 5e-4, 55e-9), TransferCost(2e-3, 5e-6), 9999
)


class Run:
    """Ledgers led by hand, under a journal."""

    def __init__(self):
        self.now = 100.0
        self.journal = Journal(lambda: self.now)
        self.front, self.back = (
            Instance("p", Role.PREFILL, LIMITS),
            Instance("d", Role.DECODE, LIMITS),
        )
        for instance in (self.front, self.back):
            instance.journal = self.journal.recorder(instance)

    def add(self, id, num_prompt=12, slo=None, max_tokens=4):
        slo = slo or Slo(1.0, 0.1)
        self.front.add(Request(id, self.now, range(num_prompt), max_tokens, slo))

    def step(self, instance, took=0.5, predicted_s=0.5, fetch=(), evict=(), stopped=(), **work):
        instance.begin(batch := Batch(work, fetch, evict, predicted_s if work else 0.0), self.now)
        for id in evict:
            instance.copied(id)
        self.now += took if work else 0
        for seq in instance.end(batch, self.now, stopped) if work else ():
            if not seq.finish_reason:
                self.back.add(seq.request, 1, self.now)
                self.front.copied(seq.request.id)

    def fetch(self, *ids, took=0.25):
        self.step(self.back, fetch=ids)
        self.now += took
        for id in ids:
            self.back.fetched(id)
            self.front.release(id)


@pytest.fixture
def run():
    """`a` waits for `b`, is preempted, evicted, held back, and misses its TPOT by half a second."""
    run = Run()
    run.add("a", 30, max_tokens=6)
    run.add("b")
    run.step(run.front, b=12)
    run.step(run.front, took=0.25, predicted_s=0.25, a=20)
    run.add("c")
    run.step(run.front, c=12)
    run.step(run.front, a=10)
    run.fetch("b", "c")
    run.step(run.back, b=1)
    run.step(run.back, b=1)
    run.fetch("a")
    run.step(run.back, a=1, b=1)
    run.step(run.back, took=1.0, c=1)
    run.step(run.back, evict=("a",), c=1)
    run.fetch("a")
    run.step(run.back, stopped=("a",), a=1)
    return run


def told(lines):
    """Without what is only how the lines are laid out."""
    return [" ".join(line.split()) for line in lines]


def test_a_timeline_by_hand(run):
    assert told(explain(run.journal.take(), {}, "a")) == [
        "0.0000 s arrived: 30 prompt tokens, max_tokens 6, SLO TTFT 1 s and TPOT 0.1 s",
        "0.0000 s queued on p, beside 0 waiting and 0 running",
        "0.0000 s in the queue of p, passed over 1 time in 0.5000 s for b; "
        "first token due in 1.0000 s",
        "0.5000 s computed 20 prompt tokens in 1 step on p, of a batch of 1: took 0.2500 s, "
        "predicted 0.2500 s; first token due in 0.5000 s",
        "0.7500 s preempted on p, passed over 1 time in 0.5000 s for c; "
        "first token due in 0.2500 s",
        "1.2500 s computed 10 prompt tokens in 1 step on p, of a batch of 1: took 0.5000 s, "
        "predicted 0.5000 s; first token overdue by 0.2500 s",
        "1.7500 s first token: TTFT 1.7500 s, 0.7500 s over the 1 s of its SLO",
        "1.7500 s parked on p, until its KV is fetched",
        "1.7500 s handed over to d, beside 2 waiting and 0 running",
        "1.7500 s its KV not yet fetched by d, passed over 1 time in 0.2500 s for b, c; "
        "next token due in 0.1000 s",
        "2.0000 s its KV not yet fetched by d, passed over 2 times in 1.0000 s for b; "
        "next token overdue by 0.1500 s -> next token overdue by 0.6500 s",
        "3.0000 s d fetches its KV of 30 tokens; next token overdue by 1.1500 s",
        "3.2500 s its KV is on d: the transfer took 0.2500 s",
        "3.2500 s admitted to a batch of 2 on d, whose step is predicted to take 0.5000 s; "
        "next token overdue by 1.4000 s",
        "3.2500 s 1 step on d, of a batch of 2: took 0.5000 s, predicted 0.5000 s; "
        "left out of 1 more, for c; "
        "next token overdue by 1.4000 s -> next token overdue by 1.8000 s",
        "4.7500 s evicted from d, which copies its KV out; next token overdue by 2.8000 s",
        "4.7500 s its KV is copied out; d takes back 8 pages",
        "5.2500 s d fetches its KV of 31 tokens; next token overdue by 3.3000 s",
        "5.5000 s its KV is on d: the transfer took 0.2500 s",
        "5.5000 s admitted to a batch of 1 on d, whose step is predicted to take 0.5333 s; "
        "next token overdue by 3.5500 s",
        "5.5000 s 1 step on d, of a batch of 1: took 0.5000 s, predicted 0.5333 s; "
        "next token overdue by 3.5500 s",
        "6.0000 s finished (stop) with 3 tokens: TPOT 2.1250 s, 2.0250 s over the 0.1 s of its SLO",
        "6.0000 s SLO missed: TTFT and TPOT",
    ]


def test_the_policy_is_asked_why(run):
    class Says:
        def verdict(self, instance, now, id):
            if id in instance.waiting and instance.role is Role.PREFILL:
                return f"live, laxity {101 - now} s"
            return "hopeless" if now > 101 else "live"

    records = list(run.journal.take())
    lines = told(explain(records, {"p": Says(), "d": object()}, "a"))
    assert lines[2].endswith("for b; live, laxity 1.0 s")
    assert lines[4].endswith("for c; live")
    assert lines[5].endswith("; hopeless")
    assert lines[9].endswith("; next token due in 0.1000 s"), "d has no opinion"


def test_what_a_policy_thinks_otherwise_begins_a_line(run):
    """And figures alone do not."""
    for number in range(6):
        run.add(f"n{number}")
    for number in range(5):
        run.step(run.front, **{f"n{number}": 12})

    class Says:
        def verdict(self, instance, now, id):
            slack = 107.1 - now
            return f"live, laxity {slack:.1f} s" if slack > 0 else f"hopeless by {-slack:.1e} s"

    first, second, last = told(explain(run.journal.take(), {"p": Says()}, "n5"))[2:]
    assert first.endswith(
        "passed over 3 times in 1.5000 s for n0, n1, n2; live, laxity 1.1 s -> live, laxity 0.1 s"
    )
    assert second.endswith(
        "2 times in 1.0000 s for n3, n4; hopeless by 4.0e-01 s -> hopeless by 9.0e-01 s"
    )
    assert last.endswith("the journal ends here, with the request on p")


def test_many_rivals_are_counted():
    run = Run()
    for number in range(7):
        run.add(f"n{number}")
    for number in range(6):
        run.step(run.front, took=0.01, **{f"n{number}": 12})
    lines = told(explain(run.journal.take(), {}, "n6"))
    assert "passed over 6 times in 0.0600 s for n0, n1, n2, n3 and 2 more;" in lines[2]


def test_a_request_that_attains_its_slo_and_one_cancelled():
    run = Run()
    run.add("a", slo=Slo(1.0, 1.0))
    run.add("b")
    run.step(run.front, a=12)
    run.fetch("a")
    run.front.cancel("b")
    run.step(run.back, stopped=("a",), a=1)
    records = list(run.journal.take())
    assert told(explain(records, {}, "a"))[-2:] == [
        "1.2500 s finished (stop) with 2 tokens: TPOT 0.7500 s, 0.2500 s within the 1 s of its SLO",
        "1.2500 s SLO attained",
    ]
    assert told(explain(records, {}, "b"))[-1] == "0.7500 s cancelled on p"


def test_an_id_may_come_again():
    run = Run()
    for _ in range(2):
        run.add("a", max_tokens=1)
        run.step(run.front, a=12)
    lines = told(explain(run.journal.take(), {}, "a"))
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    assert lines[-2].endswith("finished (length) with 1 token")


def test_a_wrong_id_names_some_that_there_are(run):
    with pytest.raises(ValueError, match="no request 'x' in the journal; it has a, b, c"):
        explain(run.journal.take(), {}, "x")
    with pytest.raises(ValueError, match="no request 'x' in the journal; it has none"):
        explain([], {}, "x")


def simulate(colocated=False, count=60):
    """An overload; colocated instances are led by a policy that steps all that it can."""
    rng, at, requests, outputs = random.Random(1), 0.0, [], []
    for serial in range(count):
        at += rng.expovariate(60.0)
        prompt, slo = range(rng.randint(1, 40)), Slo(rng.choice([0.1, 2.0]), 0.02)
        requests.append(Request(f"r{serial}", at, prompt, 20, slo, serial=serial))
        outputs.append(rng.randint(1, 20))
    if colocated:
        fleet = Fleet([(Instance("b", Role.BOTH, LIMITS), all_that_fit)], [])
    else:
        fleet = Fleet(
            [(Instance("p", Role.PREFILL, LIMITS), prefill.KairosPlus(COST))],
            [(Instance(f"d{i}", Role.DECODE, LIMITS), decode.Continuous(COST)) for i in range(2)],
        )
    turn = itertools.cycle([0, 1])
    simulation = Simulation(requests, outputs, fleet, COST, lambda *_: 0, lambda *_: next(turn))
    journal = Journal(lambda: simulation.now)
    for instance, _ in (*fleet.prefill, *fleet.decode):
        instance.journal = journal.recorder(instance)
    outcomes = simulation.run()
    return list(from_lines(to_lines(journal.take()))), outcomes


def all_that_fit(instance, now):
    """First come, first served, with all the pages that each will ever need set aside."""
    limits, waiting, running = instance.limits, instance.waiting, instance.running

    def pages(seq):
        return limits.pages_for(seq.request.max_length)

    work = {id: running[id].remaining for id in running}
    free = limits.num_pages - sum(map(pages, running.values()))
    for seq in sorted(waiting.values(), key=lambda seq: seq.request.arrival):
        free -= pages(seq)
        if free < 0 or len(work) == limits.max_batch:
            break
        work[seq.request.id] = seq.remaining
    return Batch(work, predicted_s=0.01) if work else Batch()


@pytest.fixture(scope="module", params=[False, True], ids=["disaggregated", "colocated"])
def simulated(request):
    return simulate(request.param)


def test_timelines_tell_the_outcome(simulated):
    records, outcomes = simulated
    for serial, outcome in [*enumerate(outcomes)][::5]:
        lines = told(explain(records, {}, f"r{serial}"))
        attained = outcome.met_ttft and outcome.met_tpot
        assert ("SLO attained" in lines[-1]) == attained
        assert f"with {outcome.num_output} token" in lines[-2]
        assert any(f"TTFT {outcome.ttft_s:.4f} s" in line for line in lines)
        at = [float(line.split()[0]) for line in lines]
        assert at == sorted(at)
        assert len(lines) < 40, "decisions that mean the same are one line"


def test_the_trace_is_one_that_perfetto_loads(simulated):
    records, outcomes = simulated
    trace = json.loads(json.dumps(trace_events(records), allow_nan=False))
    events = trace["traceEvents"]
    for event in events:
        assert event["ph"] in "MXCbeisf"
        assert isinstance(event["pid"], int)
        if event["ph"] != "M":
            assert event["ts"] >= 0
            assert isinstance(event["tid"], int)
            assert event["name"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert len(names) == len(set(names.values())) == 1 + len({record[0] for record in records})
    steps = [event for event in events if event["ph"] == "X"]
    begun = [decision for decision in replay(records) if decision.batch.work]
    assert len(steps) == len(begun)
    assert Counter(s["args"]["tokens"] for s in steps) == Counter(
        sum(decision.batch.work.values()) for decision in begun
    )
    for pid in names:
        own = sorted((s["ts"], s["ts"] + s["dur"]) for s in steps if s["pid"] == pid)
        assert all(end <= begin + 1e-3 for (_, end), (begin, _) in itertools.pairwise(own))
    check_requests(events, outcomes)
    check_arrows(events, steps, outcomes)


def check_requests(events, outcomes):
    """Each has one row, of slices that nest: its own around its phases, one after the other."""
    rows = defaultdict(list)
    for event in events:
        if event["ph"] in "be":
            assert event["cat"] == "request"
            rows[event["id"]].append(event)
    assert len(rows) == len(outcomes)
    for number, row in sorted(rows.items()):
        open_slices, phases = [], []
        assert [event["ts"] for event in row] == sorted(event["ts"] for event in row)
        for event in row:
            if event["ph"] == "b":
                open_slices.append(event["name"])
                phases.append(event["name"])
            else:
                assert open_slices.pop() == event["name"]
            assert len(open_slices) <= 2
        assert not open_slices
        assert phases[:3] == [f"r{number - 1}", "queued", "prefill"]
        assert row[-1]["args"] == {"end": "stop"}
        assert ("decode" in phases) == (outcomes[number - 1].num_output > 1)


def check_arrows(events, steps, outcomes):
    """Each begins and ends where a step begins; one a request that was handed over."""
    begins = {(step["pid"], step["ts"]) for step in steps}
    arrows = [event for event in events if event["ph"] in "sf"]
    assert all((arrow["pid"], arrow["ts"]) in begins for arrow in arrows)
    handed_over = {event["id"] for event in events if event["name"] == "parked"}
    assert Counter((arrow["ph"], arrow["id"]) for arrow in arrows) == Counter(
        itertools.product("sf", handed_over)
    )
    colocated = len({step["pid"] for step in steps}) == 1
    assert len(handed_over) == (0 if colocated else sum(o.num_output > 1 for o in outcomes))


@pytest.fixture
def ahead():
    """Each step of `a` and `b` is dispatched before the result of the one before is there."""
    run = Run()
    run.add("a")
    run.step(run.front, a=12)
    run.fetch("a")
    run.add("b")
    run.step(run.front, b=12)
    run.fetch("b")
    batches = [Batch({"a": 1}, predicted_s=0.5), Batch({"a": 1, "b": 1}, predicted_s=0.5)]
    run.back.begin(batches[0], run.now)
    run.now += 0.25
    run.back.expect(run.now)
    run.back.begin(batches[1], run.now)
    run.now += 0.25
    run.back.end(batches[0], run.now)
    run.now += 0.75
    run.back.end(batches[1], run.now, ["a"])
    return run


def test_a_step_dispatched_ahead_is_told_from_where_it_runs(ahead):
    records = list(ahead.journal.take())
    lines = told(explain(records, {}, "a"))
    (steps,) = [line for line in lines if "steps on d" in line]
    assert "2 steps on d, of a batch of 1 to 2: took 1.2500 s, predicted" in steps
    assert any(
        "1 step on d, of a batch of 2: took 0.7500 s" in line
        for line in told(explain(records, {}, "b"))
    )
    events = trace_events(records)["traceEvents"]
    steps = [e for e in events if e["ph"] == "X" and e["name"].startswith("decode")]
    first, second = steps
    assert (first["dur"], second["dur"]) == (500_000, 750_000)
    assert second["ts"] == first["ts"] + first["dur"]
    begins = {step["ts"] for step in steps}
    assert {e["ts"] for e in events if e["ph"] == "f"} == begins


def test_a_trace_that_is_cut_short_ends_all_slices(run):
    records = list(run.journal.take())
    for length in range(len(records) + 1):
        events = trace_events(records[:length])["traceEvents"]
        kinds = Counter(event["ph"] for event in events)
        assert kinds["b"] == kinds["e"]


def test_counters(run):
    counters = defaultdict(list)
    for event in trace_events(run.journal.take())["traceEvents"]:
        if event["ph"] == "C":
            counters[event["name"]].append(tuple(event["args"].values()))
    assert counters["sequences"][:3] == [(1, 1, 0), (1, 0, 1), (2, 0, 1)]
    assert counters["pages used"][:3] == [(3,), (8,), (11,)]
    assert counters["step slack, ms"][0] == (pytest.approx(-400.0),), "100 ms, for a step of 500"
    assert counters["pace"][0] == (1.0,)
