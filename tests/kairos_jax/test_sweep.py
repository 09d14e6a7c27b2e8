import csv
import json
import math
import multiprocessing
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import fakes
import pytest
from absl import flags

from kairos_jax import sweep
from kairos_jax.lab import offline, open_loop
from kairos_jax.lab.cells import Layout, grid, on_basis, run_cells, simulate_cells, simulation_basis
from kairos_jax.lab.curves import MAX_POINTS, Timeline, cdf
from kairos_jax.process.command import UsageError
from schedulers.cost import CostModel
from schedulers.ledger.instance import Batch, Instance, Limits, Role
from schedulers.ledger.request import Request, Slo
from schedulers.simulation.attainment import Outcome
from schedulers.simulation.scenario import Scenario
from schedulers.simulation.workload import Arrival, SloClass, synthetic

SLO = Slo(0.2, 0.01)
SCENARIO = Scenario(
    CostModel.from_profile(fakes.PROFILE | {"kv_capacity_tokens": 40_000}), (SloClass(1.0, SLO),)
)
ARRIVALS = synthetic(10, 1.0, 0)
PAIRS = [("fcfs", "continuous"), ("kairos", "kairos")]
ROOFLINE = "llama3_8b_h100_roofline"


def some_cells(rates=(100.0, 200.0), layouts=("1:1",)):
    made = grid([Layout.parse(each) for each in layouts], PAIRS, [8], [0.0], rates)
    return on_basis(made, simulation_basis(SCENARIO, ARRIVALS))


def counting(run):
    """The same, and the cells that it is asked to run."""
    asked = []

    def counted(missing):
        asked.extend(missing)
        return run(missing)

    return counted, asked


def values_of(*arguments: str) -> flags.FlagValues:
    values = flags.FlagValues()
    sweep.define_flags(values)
    values(["sweep", *arguments])
    return values


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("2:1", Layout(2, 1)),
        ("2:1fluid", Layout(2, 1, fluid=True)),
        ("colocated", Layout(colocated=1)),
        ("3xcolocated", Layout(colocated=3)),
    ],
)
def test_layouts_are_read_and_written_alike(text, layout):
    assert Layout.parse(text) == layout
    assert Layout.parse(str(layout)) == layout


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":1", "0:1", "1:1:1", "0xcolocated", "x:1", "-1:1", "0 colocated"]
)
def test_a_layout_that_is_none(text):
    with pytest.raises(ValueError, match="must be P:D, P:Dfluid, colocated or Nxcolocated"):
        Layout.parse(text)


def test_a_cell_is_named_by_all_that_determines_it():
    (cell, *_) = some_cells()
    others = [
        replace(cell, rate=99.0),
        replace(cell, pack=math.inf),
        replace(cell, max_batch=9),
        replace(cell, policies=("edf", "continuous")),
        replace(cell, layout=Layout(2, 1)),
        replace(cell, basis=simulation_basis(SCENARIO, ARRIVALS[1:])),
        replace(cell, basis=simulation_basis(replace(SCENARIO, chunk=99), ARRIVALS)),
    ]
    assert len({each.name for each in (cell, *others)}) == len(others) + 1
    assert cell.name == some_cells()[0].name


def test_a_finished_cell_is_not_run_again(tmp_path):
    run, asked = counting(simulate_cells(SCENARIO, ARRIVALS, workers=1))
    first = run_cells(some_cells(), tmp_path, run)
    assert asked == some_cells()
    assert [each.cell for each in first] == some_cells()
    asked.clear()
    more = some_cells((100.0, 300.0, 200.0))
    progress = []
    second = run_cells(more, tmp_path, run, lambda *at: progress.append(at))
    assert {cell.rate for cell in asked} == {300.0}
    assert progress == [(4, 6), (5, 6), (6, 6)]
    assert [json.dumps(each.summary) for each in second if each.cell.rate != 300.0] == [
        json.dumps(each.summary) for each in first
    ]


def test_a_broken_file_is_no_result(tmp_path):
    run, asked = counting(simulate_cells(SCENARIO, ARRIVALS, workers=1))
    run_cells(some_cells(), tmp_path, run)
    files = sorted(tmp_path.iterdir())
    assert [path.suffix for path in files] == [".json"] * 4
    files[0].write_text(files[0].read_text()[:100])
    files[1].write_text("{}")
    asked.clear()
    run_cells(some_cells(), tmp_path, run)
    assert len(asked) == 2


def test_what_is_stopped_goes_on_where_it_was(tmp_path):
    def interrupt(done, total):
        if done == 1:
            raise KeyboardInterrupt

    everything = some_cells((100.0, 200.0, 300.0))
    with pytest.raises(KeyboardInterrupt):
        run_cells(everything, tmp_path, simulate_cells(SCENARIO, ARRIVALS, 2), interrupt)
    assert not multiprocessing.active_children()
    assert len(list(tmp_path.iterdir())) == 1
    run, asked = counting(simulate_cells(SCENARIO, ARRIVALS, workers=1))
    results = run_cells(everything, tmp_path, run)
    assert len(asked) == 5
    assert [each.cell for each in results] == everything


def test_processes_and_one_process_find_the_same(tmp_path):
    alone = run_cells(some_cells(), tmp_path / "a", simulate_cells(SCENARIO, ARRIVALS, 1))
    together = run_cells(some_cells(), tmp_path / "b", simulate_cells(SCENARIO, ARRIVALS, 2))
    assert [str(each) for each in alone] == [str(each) for each in together]


def test_a_request_that_does_not_fit_is_told_of(tmp_path):
    arrivals = [Arrival(0.0, 50_000, 2), Arrival(1.0, 5, 2)]
    with pytest.raises(UsageError, match="request 0 has 50000"):
        run_cells(some_cells(), tmp_path, simulate_cells(SCENARIO, arrivals, workers=1))


def test_cdf_counts_failed_requests():
    outcomes = [
        Outcome(SLO, 0.0, 0.1, 0.2, 11),
        Outcome(SLO, 0.0, 0.3, 0.4, 1),
        Outcome(SLO, 0.0, ok=False),
    ]
    values, percent = cdf(outcomes, "ttft_s")
    assert values.tolist() == [0.1, 0.3]
    assert percent.tolist() == pytest.approx([100 / 3, 200 / 3])
    values, percent = cdf(outcomes, "tpot_s")
    assert values.tolist() == pytest.approx([0.01])
    assert percent.tolist() == [50.0]
    assert cdf([], "ttft_s")[0].size == 0


def test_a_timeline_is_thinned_as_it_grows():
    limits = Limits(8, 8, 100_000, 16, 10_000)
    prefill, decode = Instance("p", Role.PREFILL, limits), Instance("d", Role.DECODE, limits)
    timeline = Timeline([prefill, decode])
    prefill.add(Request("waits", 0.0, range(5), 9, SLO))
    decode.add(Request("runs", 0.0, range(5), 90_000, SLO), 1, 0.0)
    decode.begin(Batch(fetch=("runs",)), 0.0)
    decode.fetched("runs")
    batch = Batch({"runs": 1}, predicted_s=0.004)
    for step in range(5000):
        decode.begin(batch, 0.004 * step)
        decode.end(batch, 0.004 * (step + 1))
    columns = timeline.columns()
    assert MAX_POINTS / 2 <= len(columns["at_s"]) <= MAX_POINTS
    assert columns["at_s"][0] == 0
    assert columns["at_s"][-1] == pytest.approx(20, rel=0.05)
    assert set(columns["queue"]) == set(columns["batch"]) == {1}
    assert columns["slack_s"][-1] == pytest.approx(0.006)


# The binary.

ASKED = (
    "--simulated",
    f"--profile={ROOFLINE}",
    "--trace=synthetic",
    "--num_requests=20",
    "--ttft=1",
    "--tpot=0.025",
    "--workers=1",
    "--rates=20,60",
)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--rates=0", "--rates: must be positive, got 0"),
        ("--rates=20,x", "--rates: must be a number, got 'x'"),
        ("--policies=fcfs", "--policies: must be PREFILL+DECODE"),
        ("--policies=fifo+kairos", "the prefill policy must be one of fcfs, sjf"),
        ("--policies=fcfs+fifo", "the decode policy must be one of continuous"),
        ("--layouts=1:0", "a layout must be"),
        ("--max_batches=1.5", "--max_batches: must be a whole number of at least 1"),
        ("--max_batch=0", "--max_batches: must be a whole number of at least 1"),
        ("--packs=-1", "--packs: must be at least 0"),
        ("--tpot=2", "slo.tpot must be less than slo.ttft"),
        ("--classes=1:1", "class 1: must be SHARE:TTFT:TPOT"),
        ("--trace=nowhere.csv", "--trace=nowhere.csv: No such file"),
        ("--profile=none", "no such file, nor a profile"),
        ("--max_prompt=9", "--max_prompt does not go with --simulated"),
        ("--chunk=0", None),
    ],
)
def test_what_is_wrong_is_refused(argument, message):
    if message is None:
        with pytest.raises(flags.Error):
            values_of(*ASKED, argument)
        return
    with pytest.raises(UsageError, match=re.escape(message)):
        sweep.simulated(values_of(*ASKED, argument))


@pytest.mark.parametrize("name", ["profile", "trace", "rates", "ttft", "tpot"])
def test_what_is_missing_is_named(name):
    with pytest.raises(UsageError, match=f"--{name} is missing"):
        sweep.simulated(values_of(*(a for a in ASKED if not a.startswith(f"--{name}="))))


@pytest.mark.parametrize(
    "argv", [["--simulated"], ["--simulated=true", "--other=1"], ["-simulated"]]
)
def test_a_simulation_is_told_before_all_flags_are_read(argv):
    assert sweep._is_simulated(["sweep", *argv])


@pytest.mark.parametrize("argv", [[], ["--nosimulated"], ["--simulated=false", "--config.x=1"]])
def test_a_live_sweep_is_told_before_all_flags_are_read(argv):
    assert not sweep._is_simulated(["sweep", *argv])


def test_a_simulated_sweep_from_flags_to_report(tmp_path):
    """As a process of its own, which must not load what only live sweeps need."""
    arguments = [*ASKED, "--layouts=2xcolocated", "--max_batches=32,64", f"--output={tmp_path}"]
    code = (
        "import runpy, sys\n"
        "sys.argv[0] = 'sweep'\n"
        "try:\n"
        "    runpy.run_module('kairos_jax.sweep', run_name='__main__', alter_sys=True)\n"
        "finally:\n"
        "    assert 'jax' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "2 colocated" in done.stdout
    with (tmp_path / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 2
    assert rows[0]["layout"] == "2 colocated"
    assert {row["max_batch"] for row in rows} == {"32", "64"}
    assert all(0 <= float(row["e2e_attainment"]) <= 100 for row in rows)
    assert all(row["ttft_p99_s"] and row["e2e_output_decile_10"] for row in rows)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 12


def test_ctrl_c_is_130(tmp_path, monkeypatch, capsys):
    def interrupted(values):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "simulated", interrupted)
    monkeypatch.setattr(sweep.early, "interrupt_on_signals", lambda: None)
    monkeypatch.setattr(sweep.flags, "FLAGS", values_of("--simulated", f"--output={tmp_path}"))
    assert sweep.main([]) == 130
    assert "kept in" in capsys.readouterr().err


# Live cells, with fake engines.


def setting(**values) -> offline.Setting:
    arrivals = [Arrival(index * 1.0, 5 + index % 20, 1 + index % 9) for index in range(30)]
    classes = (SloClass(0.5, Slo(30.0, 3.0)), SloClass(0.5, Slo(60.0, 6.0)))
    return offline.Setting(fakes.altered(**values), arrivals, classes, 0)


def live(setting, monkeypatch, cells, engines=None):
    """Their results, and the layouts that engines were built for."""
    built = []

    def build(setting, layout, devices, progress):
        config = offline._laid_out(setting.config, layout)
        built.append(layout)
        model = SimpleNamespace(checkpoint=SimpleNamespace(config=SimpleNamespace(vocab_size=97)))
        cost = CostModel.from_profile(fakes.PROFILE)
        return offline._Fleet(model, engines or fakes.fake_engines(config), cost)

    monkeypatch.setattr(offline._Fleet, "build", build)
    return list(offline.run_live(setting, [], lambda *args: None, cells)), built


def test_live_cells_are_served_to_their_end(monkeypatch):
    layouts = [Layout(1, 1), Layout(2, 1), Layout(colocated=1)]
    asked = grid(layouts, PAIRS, [2, 8], [math.inf], [2000.0])
    results, built = live(setting(), monkeypatch, asked)
    assert built == layouts
    assert [each.cell for each in results] == asked
    for each in results:
        assert each.summary["num_requests"] == 30
        assert each.summary["num_failed"] == 0
        assert len(each.summary["e2e_by_class"]) == 2
        assert 0 < each.summary["duration_s"] < 30
        assert each.timeline["at_s"]
        assert max(each.timeline["batch"]) <= each.cell.max_batch or each.cell.layout.colocated
        assert min(each.timeline["at_s"]) >= 0


def test_an_instance_that_dies_ends_a_live_sweep(monkeypatch):
    engines = fakes.fake_engines(fakes.CONFIG)
    engines[-1].fail = RuntimeError("out of memory")
    asked = grid([Layout(1, 1)], PAIRS, [8], [math.inf], [2000.0])
    with pytest.raises(open_loop.InstanceDied, match="decode-0 failed: out of memory"):
        live(setting(), monkeypatch, asked, engines)


def test_requests_beyond_what_the_server_takes_have_failed(monkeypatch):
    (result, *_), _ = live(
        setting(max_requests=2), monkeypatch, grid([Layout(1, 1)], PAIRS, [8], [math.inf], [1e6])
    )
    assert 0 < result.summary["num_failed"] < 30


def test_live_cells_are_of_a_device_and_a_config():
    one = setting()
    bases = [
        one.basis("cpu"),
        one.basis("gpu"),
        setting(max_context=120).basis("cpu"),
        replace(one, seed=1).basis("cpu"),
    ]
    assert len(set(bases)) == len(bases)
    assert one.basis("cpu") == setting(prefill__policy="fcfs", prefill__instances=2).basis("cpu")
