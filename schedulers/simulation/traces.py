"""Reads recorded traces: Azure LLM inference CSVs and Mooncake JSON lines.

An Azure CSV has a header that names TIMESTAMP (a date and a time, UTC where no zone is given),
ContextTokens and GeneratedTokens, in any order and perhaps among other columns.

A Mooncake line is a JSON object with `timestamp` (whole milliseconds), `input_length`,
`output_length` and perhaps `hash_ids`, one for each 512 tokens of the prompt. It has no other
field: a format with other fields may have other units. Qwen-Bailian traces, for example, have the
same four fields and `chat_id`, and count seconds and blocks of 16 tokens.

Sources: https://github.com/Azure/AzurePublicDataset, https://github.com/kvcache-ai/Mooncake,
https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon
"""

import csv
import json
import re
import reprlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from schedulers.simulation.workload import BLOCK_TOKENS, Arrival

# Longer than any context: lengths above it are damage, and would overflow 32 bits further on.
_MAX_TOKENS = 2**31 - 1
# A float of seconds from here keeps the microseconds of any trace of our days; from 1970 not.
_EPOCH = datetime(2023, 1, 1, tzinfo=UTC)
_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
# fromisoformat would also take digits alone, of which some are seconds or milliseconds since 1970.
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d.*")
_FIELDS = ("timestamp", "input_length", "output_length")

_Entry = tuple[float, int, int, tuple[int, ...]]
_Parse = Callable[[str], _Entry]
_Format = Callable[[str], tuple[_Parse, bool]]
"""First line -> (parser of entries, whether the first line is one already or a header)."""


def read_trace(path: str | Path) -> list[Arrival]:
    """Reads a recorded trace: .csv as Azure's, .jsonl and .json as Mooncake's, others by content.

    Arrivals are sorted by time, the first at 0. Lengths of 0 tokens, of which real traces hold
    some, count as 1, since a server can neither read nor write less. Blank lines may end a file.

    Raises:
      ValueError: "path: line N: ..." where a line is malformed or of another format; a file
        without requests.
      OSError: the file can't be read.
    """
    formats = {".csv": _azure, ".jsonl": _mooncake, ".json": _mooncake}
    entries = _read(path, formats.get(Path(path).suffix.lower(), _sniff))
    entries.sort(key=lambda entry: entry[0])
    first = entries[0][0]
    return [
        Arrival(at - first, num_prompt, num_output, blocks)
        for at, num_prompt, num_output, blocks in entries
    ]


def _read(path: str | Path, begin: _Format) -> list[_Entry]:
    """The entries of a trace, in the order of the file; at least one."""
    entries: list[_Entry] = []
    parse: _Parse | None = None
    blank = 0
    number = 1
    # Bytes, not text: so that what is not UTF-8 has a line number.
    with open(path, "rb") as file:
        try:
            for number, raw in enumerate(file, start=1):
                line = _decoded(raw, number)
                if not line:
                    blank = blank or number
                    continue
                if blank:
                    number = blank
                    raise ValueError("the line is empty")
                if parse is None:
                    parse, is_entry = begin(line)
                    if not is_entry:
                        continue
                entries.append(parse(line))
            if parse is None:
                number = 1
                raise ValueError("the file is empty: it holds no requests")
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from error
    if not entries:
        raise ValueError(f"{path}: the trace holds no requests")
    return entries


def _decoded(raw: bytes, number: int) -> str:
    try:
        # Editors on Windows begin a file with a byte order mark.
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        byte, column = raw[error.start], error.start + 1
        raise ValueError(f"not UTF-8 text: byte 0x{byte:02x} at column {column}") from error


def _sniff(line: str) -> tuple[_Parse, bool]:
    if line.startswith("{"):
        return _mooncake(line)
    if any(column in line for column in _COLUMNS):
        return _azure(line)
    raise ValueError("neither the header of an Azure CSV nor a JSON object of a Mooncake trace")


def _azure(header: str) -> tuple[_Parse, bool]:
    names = [name.strip() for name in _cells(header)]
    for column in _COLUMNS:
        if names.count(column) != 1:
            raise ValueError(
                f"the header must name {', '.join(_COLUMNS)} once each, but names {column} "
                f"{names.count(column)} times"
            )
    at, num_prompt, num_output = map(names.index, _COLUMNS)

    def parse(line: str) -> _Entry:
        row = _cells(line)
        if len(row) != len(names):
            raise ValueError(f"{len(row)} columns, but the header has {len(names)}")
        return (
            _seconds(row[at]),
            _tokens(_COLUMNS[1], row[num_prompt]),
            _tokens(_COLUMNS[2], row[num_output]),
            (),
        )

    return parse, False


def _cells(line: str) -> list[str]:
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error as error:
        raise ValueError(f"not a line of CSV: {error}") from error


def _seconds(text: str) -> float:
    try:
        if not _TIMESTAMP.fullmatch(text.strip()):
            raise ValueError("not a date and a time")
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(
            f"TIMESTAMP must be like 2023-11-16 18:15:46.68, got {_short(text)}"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH).total_seconds()


def _mooncake(_: str) -> tuple[_Parse, bool]:
    return _parse_mooncake, True


def _parse_mooncake(line: str) -> _Entry:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            "not JSON that can be read: numbers too long or nested too deep"
        ) from error
    if not isinstance(entry, dict):
        raise ValueError(f"must be a JSON object, got {_short(entry)}")
    for key in _FIELDS:
        if key not in entry:
            raise ValueError(f"lacks {key}")
    for key in entry:
        if key not in (*_FIELDS, "hash_ids"):
            raise ValueError(
                f"field {_short(key)} is not of a Mooncake trace ({', '.join(_FIELDS)}, hash_ids): "
                "the units of other formats are not known"
            )
    at = entry["timestamp"]
    # The limit (30,000 years) turns away NaN, infinity and what is too large for a float. Fractions
    # are what a trace in seconds has; Mooncake's have none.
    if type(at) not in (int, float) or not 0 <= at < 1e15 or at % 1:
        raise ValueError(
            f"timestamp must be whole milliseconds, at least 0 and below 1e15, got {_short(at)}"
        )
    num_prompt = _tokens("input_length", entry["input_length"])
    return (
        at / 1000,
        num_prompt,
        _tokens("output_length", entry["output_length"]),
        _blocks(entry.get("hash_ids", []), num_prompt),
    )


def _blocks(value: object, num_prompt: int) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(id) is not int for id in value):
        raise ValueError(f"hash_ids must be a list of whole numbers, got {_short(value)}")
    most = -(-num_prompt // BLOCK_TOKENS)
    if len(value) > most:
        raise ValueError(
            f"hash_ids must be at most {most}, one for each {BLOCK_TOKENS} of {num_prompt} tokens, "
            f"got {len(value)}"
        )
    return tuple(value)


def _tokens(name: str, value: object) -> int:
    """At least 1: see `read_trace`."""
    number = value
    if isinstance(value, str):
        text = value.strip()
        # int() would also take underscores and the digits of other scripts.
        if text.isascii() and text.removeprefix("-").isdigit() and len(text) < 20:
            number = int(text)
    # A bool is an int to isinstance.
    if type(number) is not int or not 0 <= number <= _MAX_TOKENS:
        raise ValueError(
            f"{name} must be a whole number from 0 to {_MAX_TOKENS}, got {_short(value)}"
        )
    return max(number, 1)


def _short(value: object) -> str:
    """For an error of one line: reprlib bounds depth and count, but not their product."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
