"""Advice on layouts: the search for a rate against known answers, and whole runs."""

import json
import math
import signal
import subprocess
import sys

import pytest

from kairos_jax.engine.profile_file import read
from kairos_jax.lab import advise as module
from kairos_jax.lab.advise import RESOLUTION, advise, guess, layouts
from schedulers.cost import CostModel
from schedulers.ledger.request import Slo
from schedulers.simulation.scenario import Scenario
from schedulers.simulation.workload import Arrival, SloClass, synthetic

COST = CostModel.from_profile(read("llama3_8b_h100_roofline"))
SCENARIO = Scenario(COST, (SloClass(1.0, Slo(1.0, 0.025)),))
ARRIVALS = synthetic(150, 1.0, seed=0)
COMMAND = [
    *(sys.executable, "-m", "kairos_jax.simulate", "--advise", "--ttft=1", "--tpot=0.025"),
    *("--profile=llama3_8b_h100_roofline", "--trace=synthetic"),
]


def holds(monkeypatch, capacity):
    """Makes each layout hold the target up to `capacity(scenario)`; returns the rates asked for."""
    asked: dict[str, list[float]] = {}

    def attainment(scenario, num_requests, rate):
        asked.setdefault(scenario.layout, []).append(rate)
        return 100.0 if rate <= capacity(scenario) else 50.0

    monkeypatch.setattr(module, "_attainment", attainment)
    return asked


def test_layouts_are_all_colocated_and_every_split():
    assert [each.layout for each in layouts(SCENARIO, 4)] == [
        "3 prefill + 1 decode (fluid)",
        "4 colocated",
        "1 prefill + 3 decode",
        "2 prefill + 2 decode",
        "3 prefill + 1 decode",
    ]


def test_layouts_of_instances_of_several_devices():
    def named(*arguments):
        return [each.layout for each in layouts(SCENARIO, *arguments)]

    assert named(8, (1, 4)) == ["4 prefill + 1 decode"]
    fluid = "1 prefill + 1 decode (fluid)"
    assert named(8, (4, 4)) == [fluid, "2 colocated", "1 prefill + 1 decode"]
    assert named(8, (2, 4)) == ["2 prefill + 1 decode"]
    assert named(4, (1, 2)) == ["2 prefill + 1 decode"]


def test_instances_and_prices_come_from_profile_and_flag(tmp_path):
    profile = read("llama3_8b_h100_roofline") | {"devices": {"prefill": 1, "decode": 2}}
    (tmp_path / "p.json").write_text(json.dumps(profile))
    given = [f"--profile={tmp_path}/p.json", "--devices=4", "--num_requests=20", "--chip_hour=3"]
    done = subprocess.run([*COMMAND, *given, "--output=json"], capture_output=True, text=True)
    (row,) = json.loads(done.stdout)["ranking"]
    assert row["layout"] == "2 prefill + 1 decode"
    tokens = sum(each.num_output for each in synthetic(20, 1.0, 0)) / 20
    cost = 1e6 * (4 * 3 / 3600) / (row["rate"] * tokens)
    assert row["cost_of_million_tokens"] == pytest.approx(cost)
    done = subprocess.run([*COMMAND, *given[:1], "--devices=2"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --devices must be at least 3: by the profile, ")


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.02, 4.0])
def test_the_rate_is_found_however_wrong_the_guess(monkeypatch, factor):
    asked = holds(monkeypatch, lambda scenario: factor * guess(scenario, ARRIVALS))
    ranking = advise(SCENARIO, ARRIVALS, 4, workers=1)["ranking"]
    for scenario in layouts(SCENARIO, 4):
        (found,) = (each for each in ranking if each["layout"] == scenario.layout)
        true = factor * guess(scenario, ARRIVALS)
        assert (1 - RESOLUTION) * true <= found["rate"] <= true
        assert found["curve"] == sorted(found["curve"])
        assert len(asked[scenario.layout]) == len(found["curve"]) <= 12
    assert [each["rate"] for each in ranking] == sorted((r["rate"] for r in ranking), reverse=True)


@pytest.mark.parametrize("slope", [-0.3, -0.7, -1.0])
def test_few_simulations_find_where_attainment_falls_slowly(monkeypatch, slope):
    """As it does near the target: five tell the rate where bisection needs seven."""
    asked: dict[str, list[float]] = {}

    def attainment(scenario, num_requests, rate):
        asked.setdefault(scenario.layout, []).append(rate)
        return min(90.0 + slope * (rate - 1.3 * guess(scenario, ARRIVALS)), 99.5)

    monkeypatch.setattr(module, "_attainment", attainment)
    for found in advise(SCENARIO, ARRIVALS, 4, workers=1)["ranking"]:
        (scenario,) = (s for s in layouts(SCENARIO, 4) if s.layout == found["layout"])
        true = 1.3 * guess(scenario, ARRIVALS)
        assert (1 - RESOLUTION) * true <= found["rate"] <= true * (1 + 1e-9)
        assert len(asked[found["layout"]]) <= 6


def test_the_answer_names_the_best_and_its_best_rival(monkeypatch):
    holds(
        monkeypatch,
        lambda scenario: (
            10.0 * scenario.colocated + 15.0 * scenario.num_decode * (not scenario.fluid)
        ),
    )
    answer = advise(SCENARIO, ARRIVALS, 4, workers=1)["answer"]
    assert answer.startswith("1 prefill + 3 decode holds the highest rate at 90 % attainment: 4")
    assert answer.endswith("of 4 colocated.")
    holds(monkeypatch, lambda scenario: 10.0)
    assert "no difference" in advise(SCENARIO, ARRIVALS, 2, workers=1)["answer"]
    holds(monkeypatch, lambda scenario: 0.0)
    result = advise(SCENARIO, ARRIVALS, 2, workers=1)
    assert result["answer"].startswith("No layout of 2 devices holds 90 %")
    assert {each["rate"] for each in result["ranking"]} == {0.0}


def test_a_guess_by_hand():
    # Steps of 25 ms hold 223.6 sequences of 1100 tokens; the KV would hold 363.
    arrivals = [Arrival(0.0, 1000, 200)]
    one, two = (Scenario(COST, SCENARIO.classes, num_prefill=n) for n in (1, 20))
    assert guess(one, arrivals) == pytest.approx(1 / (5e-3 + 32e-3 + 0.66e-3))
    step_s = 7e-3 + 223 * (20e-6 + 55e-9 * 1100)
    assert guess(two, arrivals) == pytest.approx(223 / 200 / step_s)


def test_a_layout_is_simulated_for_as_long_as_its_load_is_to_last(monkeypatch):
    holds(monkeypatch, lambda scenario: 10.0)
    for load_s in (2.0, 1e6):
        for found in advise(SCENARIO, ARRIVALS, 2, workers=1, load_s=load_s)["ranking"]:
            (scenario,) = (s for s in layouts(SCENARIO, 2) if s.layout == found["layout"])
            load = load_s * guess(scenario, ARRIVALS)
            assert found["num_requests"] == min(math.ceil(load), len(ARRIVALS))


def test_progress_is_told_to_its_end(monkeypatch):
    holds(monkeypatch, lambda scenario: 10.0)
    told: list[tuple[int, int]] = []
    advise(SCENARIO, ARRIVALS, 3, lambda done, total: told.append((done, total)), workers=1)
    assert told[0] == (0, 48)
    assert told[-1][0] == told[-1][1] < 48
    assert told == sorted(told, key=lambda each: each[0])


@pytest.mark.slow
def test_processes_change_nothing():
    assert advise(SCENARIO, ARRIVALS, 2, workers=1) == advise(SCENARIO, ARRIVALS, 2, workers=2)


def test_as_a_process_it_prints_one_object():
    command = [*COMMAND, "--devices=2", "--num_requests=60", "--output=json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    split = "1 prefill + 1 decode"
    found = {each["layout"] for each in result["ranking"]}
    assert found == {"2 colocated", split, f"{split} (fluid)"}
    assert result["answer"].endswith(".")
    assert result["num_requests"] == 60


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_130_and_its_processes_too(sign):
    process = subprocess.Popen([*COMMAND, "--devices=4"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert "to do" in process.stderr.readline()
        process.send_signal(sign)
        # Its processes hold stderr open: that it ends tells that they have.
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, error) == (130, "")


@pytest.mark.parametrize("flag", ["--devices=1", "--rate=3", "--num_prefill=2", "--colocated=2"])
def test_wrong_use_is_one_line_and_code_2(flag):
    done = subprocess.run([*COMMAND, flag], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert flag.partition("=")[0] in done.stderr
