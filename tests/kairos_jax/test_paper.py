import json
import math
from dataclasses import replace

import pytest
from absl import flags

from kairos_jax import paper
from kairos_jax.engine import profile_file
from kairos_jax.lab.cells import Cell, Layout, Result
from kairos_jax.lab.claims import CLAIMS, compare, markdown, shown_rate, tuned, verdict
from kairos_jax.process.command import UsageError
from schedulers.simulation.workload import Arrival, synthetic

TWO_ONE, ONE_ONE = Layout(2, 1), Layout(1, 1)
BASE, OURS = ("fcfs", "continuous"), ("kairos", "kairos")


def found(policies, rate, ttft, tpot, e2e, tokens, cap=256, pack=0.0, layout=TWO_ONE) -> Result:
    """A result with these attainments (percent) and decode tokens a second."""
    summary = {
        "ttft_attainment": ttft,
        "tpot_attainment": tpot,
        "e2e_attainment": e2e,
        "decode_tokens_per_s": tokens,
    }
    return Result(Cell(layout, policies, cap, pack, rate), summary, ([], []), ([], []), {})


RESULTS = [
    found(BASE, 30.0, 95, 95, 92, 1000, cap=256),
    found(BASE, 40.0, 50, 40, 20, 1100, cap=256),
    found(BASE, 40.0, 60, 55, 30, 900, cap=64),
    found(BASE, 40.0, 65, 50, 28, 1300, cap=64, pack=math.inf),
    found(OURS, 30.0, 97, 96, 95, 1010),
    found(OURS, 40.0, 90, 85, 80, 1200),
]


def test_each_load_is_compared_with_the_baseline_tuned_for_it():
    best, _, _ = compare(RESULTS)
    gains = {claim.name: row[0] for claim, row in best.gains}
    assert gains["TTFT attainment"].gain == 25  # over the packed one
    assert gains["TPOT attainment"].gain == 30  # over the other
    assert gains["end-to-end attainment"].gain == 50
    assert gains["end-to-end attainment"].baseline.cell.max_batch == 64
    # At 40/s the packed baseline has more tokens than ours: the largest gain is elsewhere.
    assert gains["decode throughput"].gain == pytest.approx(1.0)
    assert gains["decode throughput"].ours.cell.rate == 30.0
    assert [row[0].reached for _, row in best.gains] == [True, True, True, False]
    assert verdict(best) == "Below the paper's figure: decode throughput (kairos + kairos)."


def test_the_cap_of_256_is_shown_beside_it():
    _, capped, _ = compare(RESULTS)
    gains = {claim.name: row[0] for claim, row in capped.gains}
    assert capped.title.endswith("a cap of 256")
    assert gains["end-to-end attainment"].gain == 60
    assert gains["decode throughput"].gain == pytest.approx(100 / 11)


def test_gains_in_an_overload_are_told_from_those_at_a_load_that_holds():
    *_, held = compare(RESULTS)
    gains = {claim.name: row[0] for claim, row in held.gains}
    assert {each.ours.cell.rate for each in gains.values()} == {30.0}
    assert gains["end-to-end attainment"].gain == 3
    *_, held = compare([each for each in RESULTS if each.cell.rate == 40.0])
    assert [row for _, row in held.gains] == [[None]] * 4
    assert "| - | - | - |" in markdown([held])


def test_roles_that_flow_are_held_against_the_baseline_on_fixed_ones():
    flows = found(OURS, 40.0, 95, 95, 90, 1400, layout=replace(TWO_ONE, fluid=True))
    best, *_ = compare([*RESULTS, flows])
    gain = best.gains[2][1][0]
    assert (gain.gain, gain.ours, gain.baseline.cell.layout) == (60, flows, TWO_ONE)
    assert "| 40/s on 2 prefill + 1 decode (fluid) |" in markdown([best], several_layouts=True)
    # Where the baseline was run on it too, that one counts.
    same = found(BASE, 40.0, 70, 70, 70, 1000, layout=replace(TWO_ONE, fluid=True))
    best, *_ = compare([*RESULTS, flows, same])
    assert best.gains[2][1][0].gain == 50


def test_one_cap_is_one_comparison_the_less():
    titles = [each.title for each in compare([r for r in RESULTS if r.cell.max_batch == 256])]
    assert titles == [
        "Largest gain against the baseline, cap 256",
        "Gain against the baseline, cap 256, where the pair still holds 90 % end to end",
    ]


def test_a_tie_goes_to_the_stronger_baseline():
    tied = [found(BASE, 40.0, 10, 9, 8, 1), found(BASE, 40.0, 30, 9, 9, 1, cap=64)]
    best, *_ = compare([*tied, found(OURS, 40.0, 90, 85, 80, 1)])
    assert best.gains[1][1][0].baseline is tied[1]


def test_policies_are_tuned_for_each_load_of_each_layout():
    there = found(BASE, 40.0, 1, 1, 1, 1, layout=ONE_ONE)
    best = tuned([*RESULTS[:4], there])
    assert list(best) == [(TWO_ONE, 30.0), (TWO_ONE, 40.0), (ONE_ONE, 40.0)]
    assert best[TWO_ONE, 40.0].cell.max_batch == 64
    assert best[ONE_ONE, 40.0] is there


def test_a_baseline_without_tokens_gives_no_gain_in_throughput():
    best, _ = compare([found(BASE, 9.0, 0, 0, 0, 0), found(OURS, 9.0, 1, 1, 1, 5)])
    assert best.gains[3] == (CLAIMS[3], [None])


def test_the_rate_shown_is_the_highest_that_is_held():
    assert shown_rate(RESULTS) == 30.0
    assert shown_rate([each for each in RESULTS if each.cell.rate == 40.0]) == 40.0


def test_markdown_says_what_is_reached_at_which_load_against_which_cap():
    text = markdown(compare(RESULTS))
    assert (
        "| end-to-end attainment | +33.8 points | **+50.0** (30.0 to 80.0) | 40/s "
        "| cap 64, not packed |" in text
    )
    assert "| decode throughput | +19.3 % | +1.0 % (1000 to 1010) | 30/s |" in text


# The binary.

CPU = {
    "name": "a CPU",
    "source": "measured",
    "prefill": {
        "base_s": 0.02,
        "per_token_s": 1e-3,
        "per_token_sq_s": 1e-7,
        "row_tokens": 64,
    },
    "decode": {
        "base_s": 0.02,
        "per_seq_s": 2e-3,
        "per_context_token_s": 5e-6,
        "form": "padded",
        "buckets": [1, 2, 4, 6, 8, 12],
    },
    "transfer": {"base_s": 1e-3, "per_token_s": 1e-5},
    "kv_capacity_tokens": 30_000,
    "samples": {"prefill": [[512, 0, 0.5], [512, 1024, 0.8], [64, 0, 0.1]]},
}


def silent(*args):
    pass


def flags_of(*arguments):
    values = flags.FlagValues()
    paper.define_flags(values)
    values(["paper", *arguments])
    return values


def test_objectives_and_rates_are_derived_from_a_measured_profile(tmp_path):
    arrivals = synthetic(40, 1.0, 0)
    study = paper.measured_study(CPU, ONE_ONE, arrivals, tmp_path, silent)
    assert max(each.num_prompt for each in study.arrivals) <= 1536 * 3 / 4
    assert max(each.num_output for each in study.arrivals) <= 1536 / 4
    assert study.caps == (2, 4, 6, 8, 12)
    assert {cell.max_batch for cell in study.cells if cell.policies != BASE} == {12}
    assert study.scenario.chunk == 512
    slo = study.scenario.classes[0].slo
    prompt = sorted(each.num_prompt for each in study.arrivals)[20]
    assert slo.ttft == pytest.approx(10 * study.scenario.cost.prompt_s(prompt, 0, 512), rel=0.1)
    assert len(study.rates) == 8
    assert "10 times the prefill of the median prompt" in study.notes["SLO"]
    # What was found on the way is there for the next time.
    kept = set(tmp_path.iterdir())
    assert kept
    assert paper.measured_study(CPU, ONE_ONE, arrivals, tmp_path, silent).rates == study.rates
    assert set(tmp_path.iterdir()) == kept


def test_a_study_from_cells_to_report(tmp_path):
    arrivals = [Arrival(0.1 * index, 500 + 90 * (index % 9), 20) for index in range(20)]
    profile = profile_file.read(paper.ROOFLINE)
    study = paper.roofline_study(profile, TWO_ONE, arrivals)
    assert study.caps == (32, 64, 128, 256, 512)
    assert len(study.cells) == 8 * 2 * (5 + 2 + 1)
    assert {each.policies for each in study.cells if each.layout.fluid} == {paper.OURS[-1]}
    study = replace(study, rates=(20.0, 200.0), caps=(64, 256))
    part = paper.run_study(study, profile, "a trace", tmp_path, silent, workers=1)
    assert [each["title"] for each in part["comparisons"]][:2] == [
        "Largest gain against the baseline at its best for each claim and load",
        "Largest gain against the baseline at a cap of 256",
    ]
    assert json.dumps(part, allow_nan=False)
    assert "| claim | paper, up to | kairos + kairos | at | baseline |" in part["markdown"]
    assert "Against the baseline, and the paper" in (tmp_path / "roofline/report.html").read_text()
    assert len(list((tmp_path / "cells").iterdir())) == len(study.cells)


def test_a_trace_that_is_not_there_is_told_of():
    with pytest.raises(UsageError, match=r"no trace nowhere.csv: get Azure.*make paper TRACE=FILE"):
        paper._arrivals(flags_of("--trace=nowhere.csv"))
    with pytest.raises(UsageError, match="--trace is missing"):
        paper._arrivals(flags_of())
