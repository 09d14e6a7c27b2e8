"""Workloads: the statistics that the builders promise, and traces with every kind of bad line."""

from pathlib import Path

import numpy as np
import pytest

from schedulers.workload import (
    Arrival,
    arrival_times,
    fit_lengths,
    read_azure_csv,
    read_mooncake_jsonl,
    rescale,
    synthetic,
)

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE = Path(__file__).parents[3] / "shared" / "data" / "AzureLLMInferenceTrace_conv.csv"


def test_synthetic_is_long_tailed_and_repeats():
    arrivals = synthetic(5000, rate=10.0, seed=3)
    assert arrivals == synthetic(5000, rate=10.0, seed=3) != synthetic(5000, rate=10.0, seed=4)
    assert arrivals[0].at == 0
    assert 5000 / arrivals[-1].at == pytest.approx(10.0, rel=0.1)
    for lengths, limit in (
        ([a.num_prompt for a in arrivals], 16384),
        ([a.num_output for a in arrivals], 2048),
    ):
        assert 1 <= min(lengths) <= max(lengths) <= limit
        assert np.mean(lengths) > 1.25 * np.median(lengths)
        assert np.quantile(lengths, 0.99) > 6 * np.median(lengths)
    prompts = sorted(a.num_prompt for a in arrivals)
    assert 0.35 < sum(prompts[-500:]) / sum(prompts) < 0.55


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_burstiness_asked_for(cv):
    gaps = np.diff(arrival_times(20_000, 4.0, np.random.default_rng(0), cv))
    assert gaps.mean() == pytest.approx(0.25, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_empty_workloads():
    assert synthetic(0, rate=1.0, seed=0) == []
    assert rescale([], 1.0) == []
    assert fit_lengths([], 1, 1) == []


@pytest.mark.parametrize("name", ["rate", "cv"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_rates_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        arrival_times(3, **{"rate": 1.0, "cv": 1.0, name: value}, rng=np.random.default_rng(0))


def test_azure(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        HEADER
        + "2023-11-16 18:15:50.5000000,396,109\n"
        + "2023-11-16 18:15:46.2500000,374,44\n"
        + "2023-11-17 18:15:46.2500000,1,1\n"
    )
    assert read_azure_csv(path) == [
        Arrival(0.0, 374, 44),
        Arrival(4.25, 396, 109),
        Arrival(86400.0, 1, 1),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "2023-11-16 18:15:46,374",
        "2023-11-16 18:15:46,374,44,1",
        "yesterday,374,44",
        "2023-11-16 18:15:46,3.5,44",
        "2023-11-16 18:15:46,0,44",
        "2023-11-16 18:15:46,374,-1",
        "",
    ],
)
def test_azure_names_the_bad_line(tmp_path, line):
    path = tmp_path / "trace.csv"
    path.write_text(HEADER + "2023-11-16 18:15:46,1,1\n" + line + "\n")
    with pytest.raises(ValueError, match="line 3"):
        read_azure_csv(path)


@pytest.mark.parametrize(
    ("text", "named"), [("", "line 1"), ("a,b\n", "line 1"), (HEADER, "no re")]
)
def test_azure_wants_a_header_and_requests(tmp_path, text, named):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=named):
        read_azure_csv(path)


def test_mooncake(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0]}\n'
        '{"timestamp": 4500, "input_length": 10, "output_length": 2, "hash_ids": []}\n'
    )
    assert read_mooncake_jsonl(path) == [Arrival(0.0, 6758, 500), Arrival(1.5, 10, 2)]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "",
        '{"timestamp": 0, "input_length": 1}',
        '{"timestamp": 0, "input_length": 1.5, "output_length": 1}',
        '{"timestamp": 0, "input_length": true, "output_length": 1}',
        '{"timestamp": 0, "input_length": 0, "output_length": 1}',
        '{"timestamp": NaN, "input_length": 1, "output_length": 1}',
        '{"timestamp": null, "input_length": 1, "output_length": 1}',
    ],
)
def test_mooncake_names_the_bad_line(tmp_path, line):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 1, "output_length": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        read_mooncake_jsonl(path)


def test_mooncake_empty(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="no requests"):
        read_mooncake_jsonl(path)


def test_rescale_keeps_bursts():
    arrivals = [Arrival(5.0, 1, 1), Arrival(6.0, 2, 2), Arrival(6.0, 3, 3), Arrival(9.0, 4, 4)]
    scaled = rescale(arrivals, rate=0.5)
    assert [a.at for a in scaled] == [0.0, 2.0, 2.0, 8.0]
    assert [a.num_prompt for a in scaled] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="one time"):
        rescale(arrivals[1:3], 1.0)
    with pytest.raises(ValueError, match="rate"):
        rescale(arrivals, 0.0)


def test_fit_lengths_shrinks_by_one_factor_and_clips():
    arrivals = [Arrival(float(i), 10 * i, i) for i in range(1, 101)]
    whole = fit_lengths(arrivals, 100, 1000, percentile=100)
    assert [a.num_prompt for a in whole] == list(range(1, 101)), "a tenth of each"
    assert [a.num_output for a in whole] == list(range(1, 101)), "never stretched"
    cut = fit_lengths(arrivals, 100, 1000, percentile=50)
    assert max(a.num_prompt for a in cut) == 100
    assert cut[9].num_prompt == pytest.approx(20, abs=1)


@pytest.mark.skipif(not AZURE.exists(), reason=f"needs {AZURE.name}")
def test_the_recorded_azure_trace():
    arrivals = read_azure_csv(AZURE)
    assert len(arrivals) == 19366
    assert np.median([a.num_prompt for a in arrivals]) == 1020
    assert np.median([a.num_output for a in arrivals]) == 129
    assert 19366 / rescale(arrivals, 40.0)[-1].at == pytest.approx(40.0)
