"""JSON from clients: what is too much of it to be read, and what looks so and is not."""

import json

import pytest

from kairos_jax.api import json_text
from kairos_jax.api.json_text import read_json
from kairos_jax.api.refusal import BadField


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(json_text, "MAX_VALUES", 100)
    monkeypatch.setattr(json_text, "MAX_OBJECTS", 10)


@pytest.mark.parametrize(
    "value",
    [
        list(range(100)),
        [[]] * 9,
        {"a": {}, "b": {}, "c": {}},
        "," * 1000,
        "[{:" * 1000,
        '\\"' * 1000,
        '",[' * 1000,
        "\\" * 999,
        ['"],["\\'] * 50,
        ["é,", "\u2028,"] * 40,
    ],
)
def test_so_much_is_read_and_texts_hold_anything(value):
    for form in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert read_json(form.encode(), "body") == value


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(list(range(101))),
        json.dumps([[]] * 10),
        json.dumps([{"a": 1}] * 5),
        json.dumps(["x"] * 101),
        json.dumps([""] * 500),
        json.dumps({str(id): id for id in range(10)}),
        json.dumps(['\\"'] * 101),
        "[" * 11,
    ],
)
def test_more_is_refused(text):
    with pytest.raises(BadField, match="body has too many values: at most 100 are read, and 10 "):
        read_json(text.encode(), "body")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"[1,", "must be JSON: "),
        (b'"\xff"', "must be UTF-8: byte 1 is not"),
        (b'"\\"' + b"," * 200, "must be JSON: Unterminated string"),
    ],
)
def test_what_is_no_json_is_refused_as_such(raw, words):
    with pytest.raises(BadField, match=words):
        read_json(raw, "body")


def test_what_is_nested_too_deeply_is_refused(monkeypatch):
    monkeypatch.setattr(json_text, "MAX_OBJECTS", 1 << 20)
    with pytest.raises(BadField, match="body is nested too deeply"):
        read_json(b"[" * 100_000, "body")
