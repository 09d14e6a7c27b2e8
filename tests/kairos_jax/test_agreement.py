"""The simulator against live fake engines, whose steps take next to no time."""

import io
import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import fakes
import pytest
from rich.console import Console

from kairos_jax.agreement import Agreement, compare_loads, make_workload, print_table
from kairos_jax.lab import open_loop
from kairos_jax.lab.simulated import KINDS, drifted_by, find_knee, scenario_of
from kairos_jax.lab.step_ratios import Steps, measure_steps
from kairos_jax.process.command import UsageError
from kairos_jax.worker.build import build_policy
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role
from schedulers.ledger.journal import from_lines
from schedulers.ledger.request import Slo
from schedulers.simulation.scenario import build
from schedulers.simulation.workload import Arrival, rescale, synthetic

COST = CostModel.from_profile(fakes.PROFILE)
# Prompts of 20 ms and tokens of 1 ms, of which the fakes take nothing.
SLOW = CostModel.from_profile(
    fakes.PROFILE
    | {
        "prefill": {"base_s": 0.02, "per_token_s": 0.0, "per_token_sq_s": 0.0},
        "decode": {"base_s": 0.001, "per_seq_s": 0.0, "per_context_token_s": 0.0},
    }
)
CONFIGS = [fakes.CONFIG, fakes.altered(colocated=True)]


def workload(count: int, rate: float) -> list[Arrival]:
    made = synthetic(count, 1.0, 0, max_prompt=60, max_output=30)
    return rescale(made, rate)


def quiet(*args) -> None:
    pass


@pytest.mark.parametrize("config", CONFIGS)
def test_outputs_end_where_the_workload_says_and_no_policy_can_tell(config):
    arrivals = workload(40, 400.0)
    seen = []
    live = open_loop.Live(config, fakes.fake_engines(config), COST, fakes.VOCAB, seen.extend)
    served = open_loop.serve(live, arrivals, [Slo(30.0, 30.0)] * 40, 0, quiet)
    assert [each.num_output for each in served.outcomes] == [a.num_output for a in arrivals]
    assert [each.arrival for each in served.outcomes] == [a.at for a in arrivals]
    assert all(each.met_ttft and each.met_tpot for each in served.outcomes)
    assert [instance.role for instance in seen] == list(config.roles)


def test_all_requests_ask_for_as_much():
    live = open_loop.Live(fakes.CONFIG, [], COST, fakes.VOCAB)
    requests = open_loop._requests(live, workload(40, 1.0), [Slo(1.0, 1.0)] * 40, 0)
    assert {each.max_tokens for each in requests} == {30}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_live_run_agrees_where_nothing_is_late(config, tmp_path):
    live = open_loop.Live(config, fakes.fake_engines(config), SLOW, fakes.VOCAB)
    knee, rows = compare_loads(live, workload(50, 1.0), [0.2, 0.5], 1.0, tmp_path, quiet)
    assert knee > 1
    for row, load in zip(rows, (0.2, 0.5), strict=True):
        assert (row.load, row.rate) == (load, pytest.approx(load * knee))
        assert row.live == row.simulated == dict.fromkeys(KINDS, 100.0)
        lines = (tmp_path / f"journal-{load:g}.jsonl").read_text().splitlines()
        records = list(from_lines(lines))
        assert row.decisions == sum(verb == "begin" for _, verb, *_ in records)
        assert row.steps == measure_steps(records)
        assert 0 < row.steps.ratio < 1
    json.dumps([asdict(row) for row in rows])


def test_the_knee_is_the_highest_rate_that_holds():
    """Prompts of 20 ms each, in steps of their own, in good time as long as there are few."""
    config = fakes.altered(
        colocated=True, prefill__pack=0.0, slo=fakes.SloConfig(ttft=0.3, tpot=1.0)
    )
    arrivals = [Arrival(at * 1.0, 20, 1) for at in range(200)]
    knee = find_knee(scenario_of(config, SLOW), arrivals)
    # A queue of 15 prompts is what the SLO has room for.
    assert 50 * 0.98 < knee < 50 * 1.15


def test_no_rate_holds_an_slo_below_the_time_of_one_prompt():
    config = fakes.altered(slo=fakes.SloConfig(ttft=0.01, tpot=1.0))
    with pytest.raises(UsageError, match="too tight"):
        find_knee(scenario_of(config, SLOW), workload(50, 1.0))


def test_a_scenario_has_the_limits_and_policies_of_the_config():
    config = fakes.altered(
        prefill__instances=2, decode__instances=3, prefill__policy="edf", prefill__pack=0.5
    )
    scenario = scenario_of(config, COST)
    assert scenario.layout == "2 prefill + 3 decode"
    assert (scenario.prefill_policy, scenario.decode_policy) == ("edf", "kairos_plus")
    assert (scenario.pack, scenario.limits) == (0.5, {role: config.limits(role) for role in Role})
    assert scenario_of(CONFIGS[1], COST).layout == "1 colocated"


def test_steps_are_held_against_their_prediction():
    limits = asdict(fakes.CONFIG.limits(Role.BOTH)) | {"parked_tokens": None}
    add = [["0", 0.0, 10, 3, 1.0, 1.0, 0], 0, None]
    records = [
        ("a", "instance", 0.0, "both", limits, True),
        ("a", "add", 0.0, *add),
        ("a", "begin", 1.0, False, {"0": 10}, [], [], 2.0),
        ("a", "end", 4.0, []),
        ("a", "begin", 4.5, True, {}, [], [], 1.0),
        ("a", "end", 6.0, []),
        ("a", "begin", 6.25, True, {}, [], [], 1.0),
        ("a", "end", 7.75, ["0"]),
    ]
    steps = measure_steps(records)
    assert steps == Steps(6.0 / 4.0, pytest.approx(0.0), 0.375)


def test_a_step_that_was_dispatched_ahead_begins_with_the_end_of_the_one_before():
    limits = asdict(fakes.CONFIG.limits(Role.BOTH)) | {"parked_tokens": None}
    records = [
        ("a", "instance", 0.0, "both", limits, True),
        ("a", "add", 0.0, ["0", 0.0, 10, 3, 1.0, 1.0, 0], 0, None),
        ("a", "begin", 1.0, False, {"0": 10}, [], [], 2.0),
        ("a", "expect", 2.0),
        ("a", "begin", 2.5, True, {}, [], [], 1.0),
        ("a", "end", 4.0, []),
        ("a", "end", 5.5, ["0"]),
    ]
    steps = measure_steps(records)
    assert steps == Steps(4.5 / 3.0, pytest.approx(0.0), 0.0)


def test_steps_of_mixed_contexts_have_a_ratio_of_their_own():
    limits = asdict(fakes.CONFIG.limits(Role.DECODE)) | {"parked_tokens": None}

    def add(id, at, prompt):
        return ("a", "add", at, [id, 0.0, prompt, 9, 1.0, 1.0, 0], 1, at)

    def step(at, took_s, ids, **first):
        batch = [dict.fromkeys(ids, 1), list(first.get("fetch", ())), [], 1.0]
        return [("a", "begin", at, False, *batch), ("a", "end", at + took_s, [])]

    here = [("a", "fetched", 0.0, id) for id in ("0", "1", "2")]
    records = [
        ("a", "instance", 0.0, "decode", limits, True),
        *(add(id, 0.0, prompt) for id, prompt in (("0", 10), ("1", 10), ("2", 90))),
        ("a", "begin", 0.0, False, {}, ["0", "1", "2"], [], 0.0),
        *here,
        *step(1.0, 1.0, ["0", "1"]),
        *step(3.0, 0.5, ["0", "1", "2"]),
    ]
    steps = measure_steps(records)
    assert steps.ratio == 1.5 / 2.0
    assert (steps.num_mixed, steps.mixed_ratio) == (1, 0.5), "10, 10 and 90 tokens of context"


def test_the_form_of_the_profile_is_that_of_policies_and_simulator():
    """Beside one long request, a padded step takes each short one to be as long."""
    slow = fakes.PROFILE["decode"] | {"per_context_token_s": 1e-4, "form": "padded"}
    arrivals = [Arrival(0.001 * at, 100 if at == 4 else 5, 20) for at in range(8)]
    took_s = {}
    for form in ("ragged", "padded"):
        cost = CostModel.from_profile(fakes.PROFILE | {"decode": slow | {"form": form}})
        assert build_policy(fakes.CONFIG, Role.DECODE, cost).cost.decode.form == form
        scenario = scenario_of(fakes.CONFIG, cost)
        assert scenario.cost.decode.form == form
        took_s[form] = max(each.last_token_at for each in build(scenario, arrivals).run())
    assert took_s["padded"] > 2 * took_s["ragged"]


def flags_of(**changes):
    given = {"seed": 0, "max_prompt": 1024, "max_output": 128, "prompt_sigma": 1.0}
    return SimpleNamespace(**given | changes)


@pytest.mark.parametrize("changes", [{}, {"max_prompt": 256, "max_output": 48}])
def test_the_contexts_of_the_workload_differ(changes):
    config = fakes.altered(max_context=2048, max_tokens=1024)
    arrivals = make_workload(config, flags_of(**changes))
    contexts = sorted(each.num_prompt + each.num_output for each in arrivals)
    assert contexts[-len(contexts) // 100] > 5 * contexts[len(contexts) // 2]


@pytest.mark.parametrize("changes", [{"prompt_sigma": 0.1}, {"max_prompt": 1, "max_output": 1}])
def test_contexts_that_are_alike_are_refused(changes):
    config = fakes.altered(max_context=2048, max_tokens=1024)
    with pytest.raises(UsageError, match="too alike: median"):
        make_workload(config, flags_of(**changes))


def test_the_table_shows_each_load():
    attained = {"ttft": 98.0, "tpot": 97.0, "e2e": 95.5}
    simulated = {"ttft": 97.0, "tpot": 99.0, "e2e": 96.0}
    chance = dict.fromkeys(KINDS, 0.7)
    drifted = {"ttft": 96.5, "tpot": 98.0, "e2e": 95.0}
    steps = Steps(1.01, 0.1, 2e-4, 33, 0.987)
    row = Agreement(1.15, 2.5, 200, attained, simulated, drifted, chance, 4321, steps)
    out = io.StringIO()
    print_table([row], Console(file=out, width=110))
    text = out.getvalue()
    for part in (
        "1.15",
        "98.0  97.0  96.5",
        "97.0  99.0  98.0",
        "95.5  96.0  95.0",
        "4321",
        "1.010",
        "0.987",
    ):
        assert part in text
    assert math.isclose(row.largest(row.simulated), 2.0)
    assert math.isclose(row.largest(row.drifted), -1.5)


def test_drift_is_in_the_steps_and_not_in_what_the_policies_believe():
    scenario = scenario_of(fakes.CONFIG, COST)
    late = drifted_by(scenario, 1.25)
    assert math.isclose(late.cost.prefill_s(100), 1.25 * COST.prefill_s(100))
    assert math.isclose(late.cost.scaled(1 + late.bias).prefill_s(100), COST.prefill_s(100))
