"""Workloads: the statistics that the builders promise, and traces with every kind of bad line."""

import time
from pathlib import Path

import numpy as np
import pytest

from schedulers.ledger.request import Slo
from schedulers.simulation.traces import read_azure_csv, read_mooncake_jsonl, read_trace
from schedulers.simulation.workload import (
    Arrival,
    SloClass,
    arrival_times,
    assign_classes,
    check_slo,
    fit_lengths,
    parse_classes,
    poisson,
    rescale,
    synthetic,
)

LINE = '{"timestamp": %s, "input_length": %s, "output_length": %s}\n'
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE = Path(__file__).parents[4] / "shared" / "data" / "AzureLLMInferenceTrace_conv.csv"


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


def test_azure_columns_in_another_order_with_others_and_as_windows_writes_them(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_bytes(
        b"\xef\xbb\xbfmodel, GeneratedTokens,TIMESTAMP,ContextTokens\r\n"
        b'"a, ""b""",44,2024-05-10 00:00:00.25+00:00,374\r\n'
        b"c,1,2024-05-10T01:00:00+01:00,2\r\n"  # zones and none may mix: none is UTC
        b"c,3,2024-05-10 00:00:01,4\r\n"
        b"\r\n \n"
    )
    assert read_azure_csv(path) == [
        Arrival(0.0, 2, 1),
        Arrival(0.25, 374, 44),
        Arrival(1.0, 4, 3),
    ]


def test_lengths_of_zero_count_as_one(tmp_path):
    path = tmp_path / "trace"
    path.write_text(HEADER + "2023-11-16 18:15:46,0,44\n2023-11-16 18:15:46,374,0\n")
    assert read_trace(path) == [Arrival(0.0, 1, 44), Arrival(0.0, 374, 1)]
    path.write_text(LINE % (0, 0, 0))
    assert read_trace(path) == [Arrival(0.0, 1, 1)]


AZURE_LINES = [
    ("2023-11-16 18:15:46,374", "2 columns, but the header has 3"),
    ("2023-11-16 18:15:46,374,44,1", "4 columns"),
    ("yesterday,374,44", "TIMESTAMP must be like .* got 'yesterday'"),
    ("2023-13-16 18:15:46,374,44", "TIMESTAMP"),
    (",,", "TIMESTAMP must be like .* got ''"),
    ("2023-11-16 18:15:46,3.5,44", "ContextTokens must be a whole number .* got '3.5'"),
    ("2023-11-16 18:15:46,1_000,44", "ContextTokens"),
    ("2023-11-16 18:15:46,\u0663,44", "ContextTokens"),
    ("2023-11-16 18:15:46,nan,44", "ContextTokens .* got 'nan'"),
    ("2023-11-16 18:15:46,,44", "ContextTokens .* got ''"),
    ("2023-11-16 18:15:46,374,-1", "GeneratedTokens must be a whole number from 0 .* got '-1'"),
    ("2023-11-16 18:15:46,374,99999999999", "GeneratedTokens .* to 2147483647"),
    ('2023-11-16 18:15:46,374,"44', "not a line of CSV"),
    ("2023-11-16 18:15:46,374," + 100_000 * "4", "GeneratedTokens"),
    ("x" * 100_000 + ",374,44", "TIMESTAMP"),
    ('"' + "x" * 200_000 + '",374,44', "not a line of CSV: field larger"),
    ("," * 100_000, "100001 columns"),
    ("\0", "1 columns"),
    ("", "the line is empty"),
]


@pytest.mark.parametrize(("line", "why"), AZURE_LINES, ids=[line[:40] for line, _ in AZURE_LINES])
def test_azure_names_the_bad_line(tmp_path, line, why):
    path = tmp_path / "trace.csv"
    good = "2023-11-16 18:15:46,1,1\n"
    path.write_text(HEADER + good + line + "\n" + good, encoding="utf-8")
    assert_names_line(path, 3, why)


MOONCAKE_LINES = [
    ("{", "not JSON: .* at column 2"),
    ("[]", r"must be a JSON object, got \[\]"),
    ("[" + ", ".join([LINE.strip() % (0, 1, 1)] * 9) + "]", "must be a JSON object"),
    ("[" * 100_000, "nested too deep"),
    ("7" * 100_000, "numbers too long"),
    ('{"timestamp": 0, "input_length": 1}', "lacks output_length"),
    (LINE % (0, 1.5, 1), "input_length must be a whole number .* got 1.5"),
    (LINE % (0, "true", 1), "input_length must be a whole number .* got True"),
    (LINE % (0, '"1x"', 1), "input_length"),
    (LINE % (0, "NaN", 1), "input_length"),
    (LINE % (0, 1, -2), "output_length must be a whole number from 0 .* got -2"),
    (LINE % (0, 1, 10**300), "output_length"),
    (LINE % (0, 1, '"' + "y" * 100_000 + '"'), "output_length"),
    (LINE % ("NaN", 1, 1), "timestamp must be milliseconds, .* got nan"),
    (LINE % ("Infinity", 1, 1), "timestamp"),
    (LINE % (10**400, 1, 1), "timestamp"),
    (LINE % ("null", 1, 1), "timestamp .* got None"),
    (LINE % ("true", 1, 1), "timestamp"),
    (LINE % ('"0"', 1, 1), "timestamp"),
    (LINE % (-1, 1, 1), "timestamp must be .* at least 0 .* got -1"),
    (LINE % (0, 1, '1, "hash_ids": 7'), "hash_ids must be a list of whole numbers, got 7"),
    (LINE % (0, 1, '1, "hash_ids": [0.5]'), "hash_ids"),
    ("", "the line is empty"),
]


@pytest.mark.parametrize(
    ("line", "why"), MOONCAKE_LINES, ids=[line[:60].strip() for line, _ in MOONCAKE_LINES]
)
def test_mooncake_names_the_bad_line(tmp_path, line, why):
    path = tmp_path / "trace.jsonl"
    path.write_text(LINE % (0, 1, 1) + line.rstrip() + "\n" + LINE % (0, 1, 1))
    assert_names_line(path, 2, why)


def assert_names_line(path: Path, number: int, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        read_trace(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: line {number}: ")
    assert message.isprintable(), "one line"
    assert len(message.removeprefix(str(path))) <= 200


def test_bytes_that_are_not_utf8_have_a_line(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_bytes(HEADER.encode() + b"2023-11-16 18:15:46,1,1\n2023\xff,1,1\n")
    assert_names_line(path, 3, "not UTF-8 text: byte 0xff at column 5")
    path.write_bytes(HEADER.encode("utf-16"))
    assert_names_line(path, 1, "not UTF-8")


@pytest.mark.parametrize("name", ["trace", "trace.csv", "trace.jsonl"])
@pytest.mark.parametrize("text", ["", "\n\n", "\ufeff"])
def test_empty_files(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert_names_line(path, 1, "the file is empty: it holds no requests")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a,b\n", "line 1: the header must name .* but names TIMESTAMP 0 times"),
        ("TIMESTAMP,ContextTokens\n", "but names GeneratedTokens 0 times"),
        ("TIMESTAMP," + HEADER, "but names TIMESTAMP 2 times"),
        ("2023-11-16 18:15:46,1,1\n", "line 1: the header"),
        ("\n" + HEADER, "line 1: the line is empty"),
        (HEADER, "trace.csv: the trace holds no requests"),
    ],
)
def test_azure_wants_a_header_and_requests(tmp_path, text, why):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=why):
        read_azure_csv(path)


def test_mooncake(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0]}\n'
        '{"timestamp": 4500, "input_length": 10, "output_length": 2, "hash_ids": []}\n'
        '{"timestamp": 2999.5, "input_length": 7, "output_length": 3}\n\n'
    )
    assert read_mooncake_jsonl(path) == [
        Arrival(0.0, 7, 3),
        Arrival(pytest.approx(0.0005), 6758, 500, (0,)),
        Arrival(pytest.approx(1.5005), 10, 2),
    ]


def test_pages_have_equal_keys_as_far_as_blocks_are_equal():
    one, other = (Arrival(0.0, 1100, 1, blocks) for blocks in ((5, 6, 7), (5, 6, 8)))
    assert len(one.page_keys(200)) == 5, "whole pages alone"
    assert len(set(one.page_keys(200))) == 5
    # Of the first 1024 tokens, which are the same, and of a page that goes on into the third block.
    equal = [a == b for a, b in zip(one.page_keys(200), other.page_keys(200), strict=True)]
    assert equal == [True] * 5
    equal = [a == b for a, b in zip(one.page_keys(100), other.page_keys(100), strict=True)]
    assert equal == [True] * 10 + [False]
    assert Arrival(0.0, 1100, 1).page_keys(100) == ()
    assert len(Arrival(0.0, 1100, 1, (5,)).page_keys(16)) == 512 // 16


def test_read_trace_knows_the_kinds_by_name_and_else_by_content(tmp_path):
    azure = HEADER + "2023-11-16 18:15:46,3,4\n"
    for name, text in (
        *(("t.csv", azure), ("T.CSV", azure), ("t.txt", azure), ("t", azure)),
        *((name, LINE % (5, 3, 4)) for name in ("t.jsonl", "t.json", "t.log", "u")),
    ):
        path = tmp_path / name
        path.write_text(text)
        assert read_trace(path) == read_trace(str(path)) == [Arrival(0.0, 3, 4)], name
    path.write_text("PK and so on\n" * 2)
    assert_names_line(path, 1, "neither the header of an Azure CSV nor a JSON object")
    with pytest.raises(IsADirectoryError):
        read_trace(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "missing.csv")


def test_poisson_keeps_lengths_and_has_the_rate_exactly():
    arrivals = [Arrival(0.0, i, 2 * i) for i in range(1, 2001)]
    made = poisson(arrivals, 4.0, seed=1)
    assert made == poisson(arrivals, 4.0, seed=1) != poisson(arrivals, 4.0, seed=2)
    assert [(a.num_prompt, a.num_output) for a in made] == [(i, 2 * i) for i in range(1, 2001)]
    assert made[0].at == 0
    assert 2000 / made[-1].at == pytest.approx(4.0, rel=1e-12)
    gaps = np.diff([a.at for a in made])
    assert gaps.min() >= 0
    assert gaps.std() / gaps.mean() == pytest.approx(1, rel=0.1)
    assert poisson([], 4.0, seed=1) == []
    assert poisson([Arrival(7.0, 1, 2)], 4.0, seed=1) == [Arrival(0.0, 1, 2)]
    with pytest.raises(ValueError, match="rate"):
        poisson(arrivals, 0.0, seed=1)


def test_rescale_keeps_bursts():
    arrivals = [Arrival(5.0, 1, 1), Arrival(6.0, 2, 2), Arrival(6.0, 3, 3), Arrival(9.0, 4, 4)]
    scaled = rescale(arrivals, rate=0.5)
    assert [a.at for a in scaled] == [0.0, 2.0, 2.0, 8.0]
    assert [a.num_prompt for a in scaled] == [1, 2, 3, 4]
    assert rescale(arrivals[3:], 0.5) == [Arrival(0.0, 4, 4)]
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
    with pytest.raises(ValueError, match="max_output must be at least 1, got 0"):
        fit_lengths(arrivals, 1, 0)


def test_classes():
    classes = parse_classes("0.7:1:0.025, 0.3:10:0.1")
    assert classes == (SloClass(0.7, Slo(1, 0.025)), SloClass(0.3, Slo(10, 0.1)))
    assert parse_classes("1:2:1") == (SloClass(1.0, Slo(2, 1)),)
    thirds = parse_classes("0.3333333:1:0.1,0.3333333:2:0.1,0.3333333:3:0.1")
    assert len(thirds) == 3, "shares need only sum to about 1"

    drawn = assign_classes(20_000, classes, seed=5)
    assert drawn.shape == (20_000,)
    assert set(drawn.tolist()) == {0, 1}
    assert drawn.mean() == pytest.approx(0.3, abs=0.02)
    assert np.array_equal(drawn, assign_classes(20_000, classes, seed=5))
    assert not np.array_equal(drawn, assign_classes(20_000, classes, seed=6))
    assert np.array_equal(np.unique(assign_classes(10_000, thirds, seed=0)), [0, 1, 2])
    assert assign_classes(0, classes, seed=0).shape == (0,)
    with pytest.raises(ValueError, match="classes must hold at least one"):
        assign_classes(3, (), seed=0)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "class 1: must be SHARE:TTFT:TPOT, got ''"),
        ("1:1:0.1,", "class 2: must be SHARE:TTFT:TPOT, got ''"),
        ("1:1", "class 1: must be SHARE:TTFT:TPOT, got '1:1'"),
        ("half:1:0.1", "class 1: share must be a number, got 'half'"),
        ("0.5:1:0.1,0.5:1s:0.1", "class 2: slo.ttft must be a number, got '1s'"),
        ("1:1:fast", "class 1: slo.tpot must be a number, got 'fast'"),
        ("0:1:0.1", "class 1: share must be a positive number, got 0"),
        ("-1:1:0.1,2:1:0.1", "class 1: share must be a positive number, got -1"),
        ("nan:1:0.1", "class 1: share"),
        ("1:inf:0.1", "class 1: slo.ttft must be a positive number of seconds, got inf"),
        ("1:1:0", "class 1: slo.tpot must be a positive number of seconds, got 0"),
        ("1:0.025:1", "slo.tpot must be less than slo.ttft, got slo.tpot = 1.0 and .* = 0.025"),
        ("0.5:1:0.1,0.6:1:0.1", r"shares must sum to 1 \(within 1e-6\), got 1.1"),
        ("1e308:1:0.1,1e308:1:0.1", "shares must sum to 1"),
        ("x" * 10_000, "class 1: must be"),
    ],
)
def test_bad_classes_are_named(text, why):
    with pytest.raises(ValueError, match=why) as caught:
        parse_classes(text)
    assert len(str(caught.value)) < 200


def test_check_slo():
    assert check_slo(1.0, 0.025) == Slo(1.0, 0.025)
    for ttft, tpot in ((0.025, 1.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match=f"got slo.tpot = {tpot} and slo.ttft = {ttft}"):
            check_slo(ttft, tpot)
    with pytest.raises(ValueError, match=r"slo\.ttft must be a positive"):
        check_slo(-1.0, 0.1)


@pytest.mark.skipif(not AZURE.exists(), reason=f"needs {AZURE.name}")
def test_the_recorded_azure_trace():
    begun = time.perf_counter()
    arrivals = read_trace(AZURE)
    assert time.perf_counter() - begun < 2, "about 0.1 s on an idle core"
    assert arrivals == read_azure_csv(AZURE)
    assert len(arrivals) == 19366
    assert np.median([a.num_prompt for a in arrivals]) == 1020
    assert np.median([a.num_output for a in arrivals]) == 129
    assert 19366 / rescale(arrivals, 40.0)[-1].at == pytest.approx(40.0)
