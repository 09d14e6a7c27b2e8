"""Traces: both formats, every kind of bad line, and other formats that look alike."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from schedulers.simulation.traces import read_trace
from schedulers.simulation.workload import Arrival, rescale

LINE = '{"timestamp": %s, "input_length": %s, "output_length": %s}\n'
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE = Path(__file__).parents[4] / "shared" / "data" / "AzureLLMInferenceTrace_conv.csv"


def test_azure(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        HEADER
        + "2023-11-16 18:15:50.5000000,396,109\n"
        + "2023-11-16 18:15:46.2500000,374,44\n"
        + "2023-11-17 18:15:46.2500000,1,1\n"
    )
    assert read_trace(path) == [
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
    assert read_trace(path) == [
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
    ("1700158546,374,44", "TIMESTAMP must be like .* got '1700158546'"),
    # datetime.fromisoformat takes these for dates of the year 1612 and 2012.
    ("1612031512304,374,44", "TIMESTAMP must be like .* got '1612031512304'"),
    ("20120131,374,44", "TIMESTAMP must be like"),
    ("0.25,374,44", "TIMESTAMP must be like"),
    ("2023-11-16,374,44", "TIMESTAMP must be like"),
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
    (LINE % ("NaN", 1, 1), "timestamp must be whole milliseconds, .* got nan"),
    (LINE % ("Infinity", 1, 1), "timestamp"),
    (LINE % (10**400, 1, 1), "timestamp"),
    (LINE % ("null", 1, 1), "timestamp .* got None"),
    (LINE % ("true", 1, 1), "timestamp"),
    (LINE % ('"0"', 1, 1), "timestamp"),
    (LINE % (0.25, 1, 1), "timestamp must be whole milliseconds, .* got 0.25"),
    (LINE % (-1, 1, 1), "timestamp must be .* at least 0 .* got -1"),
    (LINE % (0, 1, '1, "hash_ids": 7'), "hash_ids must be a list of whole numbers, got 7"),
    (LINE % (0, 1, '1, "hash_ids": [0.5]'), "hash_ids"),
    (LINE % (0, 512, '1, "hash_ids": [4, 5]'), "hash_ids must be at most 1, one for each 512 of"),
    (LINE % (0, 1, '1, "chat_id": 7'), "field 'chat_id' is not of a Mooncake trace"),
    (LINE % (0, 1, '1, "session_id": "a"'), "field 'session_id' is not of a Mooncake trace"),
    (LINE % (0, 1, '1, "' + "k" * 1000 + '": 1'), "field 'kkk.* is not of a Mooncake trace"),
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
        read_trace(path)


def test_mooncake(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0]}\n'
        '{"timestamp": 4500, "input_length": 10, "output_length": 2, "hash_ids": []}\n'
        '{"timestamp": 2999.0, "input_length": 7, "output_length": 3}\n\n'
    )
    assert read_trace(path) == [
        Arrival(0.0, 7, 3),
        Arrival(pytest.approx(0.001), 6758, 500, (0,)),
        Arrival(pytest.approx(1.501), 10, 2),
    ]


def test_a_trace_in_seconds_is_not_taken_for_one_in_milliseconds(tmp_path):
    """A line of the form that the Qwen-Bailian traces have, numbers made up."""
    bailian = {
        "chat_id": 3,
        "parent_chat_id": -1,
        "timestamp": 61.114,
        "input_length": 40,
        "output_length": 12,
        "type": "text",
        "turn": 1,
        "hash_ids": [7, 8, 9],
    }
    known = ("timestamp", "input_length", "output_length", "hash_ids")
    for name in ("trace.jsonl", "trace.json", "trace"):
        path = tmp_path / name
        path.write_text(json.dumps(bailian) + "\n")
        assert_names_line(path, 1, "field '.*' is not of a Mooncake trace .* units")
        # Without the fields that tell: of 40 tokens, three blocks are not of 512 tokens each.
        plain = {key: bailian[key] for key in known}
        path.write_text(json.dumps(plain) + "\n")
        assert_names_line(path, 1, "timestamp must be whole milliseconds, .* got 61.114")
        path.write_text(json.dumps(plain | {"timestamp": 61}) + "\n")
        assert_names_line(path, 1, "hash_ids must be at most 1, one for each 512 of 40 tokens")


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


@pytest.mark.skipif(not AZURE.exists(), reason=f"needs {AZURE.name}")
def test_the_recorded_azure_trace():
    begun = time.perf_counter()
    arrivals = read_trace(AZURE)
    assert time.perf_counter() - begun < 2, "about 0.1 s on an idle core"
    assert len(arrivals) == 19366
    assert np.median([a.num_prompt for a in arrivals]) == 1020
    assert np.median([a.num_output for a in arrivals]) == 129
    assert 19366 / rescale(arrivals, 40.0)[-1].at == pytest.approx(40.0)
