"""JSON for clients: what JSON has no form for, and line breaks that some clients cut events by."""

import asyncio
import json
import math

import http_fakes
import pytest
from http_fakes import of

from kairos_jax.api.http.to_json import to_bytes, to_json
from kairos_jax.engine.calls import Token
from kairos_jax.text.tokenizer import Tokenizer

BREAKS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r\n"


def refuse(constant):
    raise AssertionError(constant)


def strictly(text: str | bytes):
    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null():
    value = {"a": [math.nan, math.inf, (1.5, -math.inf)], "b": {"c": math.nan}, "d": 1, "e": True}
    expected = {"a": [None, None, [1.5, None]], "b": {"c": None}, "d": 1, "e": True}
    assert strictly(to_json(value)) == strictly(to_json(value, compact=True)) == expected
    assert to_json({"a": [1, 2.5]}, compact=True) == '{"a":[1,2.5]}'


def test_a_string_has_no_line_break_of_any_kind():
    value = {f"key{BREAKS}": f"é{BREAKS}日本 \\u2028 {BREAKS}"}
    text = to_json(value)
    assert text.splitlines() == [text]
    assert strictly(text) == value
    assert "日本" in text


def test_a_lone_surrogate_is_escaped():
    assert to_bytes("a\ud800é") == b'"a\\ud800\xc3\xa9"'


class Speaker(Tokenizer):
    """Says each of these characters in turn, whatever the ids."""

    def decode(self, ids):
        return "".join(BREAKS[id % len(BREAKS)] for id in ids)


@pytest.mark.parametrize("chat", [False, True])
def test_no_event_and_no_body_is_cut_by_splitlines(monkeypatch, chat):
    monkeypatch.setattr(Tokenizer, "decode", Speaker.decode)
    monkeypatch.setattr(Tokenizer, "has_text", lambda self, id: True)

    async def main():
        async with http_fakes.serving() as api:
            path = "/v1/chat/completions" if chat else "/v1/completions"
            said = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
            body = http_fakes.ASK | said | {"max_tokens": 30, "stream": True}
            text = (await api.post(path, body)).text
            lines = [line for line in text.splitlines() if line]
            assert all(line.startswith("data: ") for line in lines)
            events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
            assert set(http_fakes.text_in(events)) & {"\u2028", "\u2029", "\x85"}
            whole = (await api.post(path, body | {"stream": False})).text
            assert whole.splitlines() == [whole]
            for asked, where in (
                ({"tokens": list(range(90))}, "/detokenize"),
                (body | {"temperature": BREAKS}, path),
                (body | {"model": f"x{BREAKS}"}, path),
            ):
                answer = (await api.post(where, asked)).text
                assert answer.splitlines() == [answer]

    asyncio.run(main())


def test_five_likeliest_are_five_though_two_look_alike():
    same = Token(7, -0.5, ((7, -0.5), (0, -1.0), (1, -1.5), (0, -2.0), (9, -math.inf)))

    async def main():
        async with http_fakes.serving() as api:
            step = api.harness.engines[0].step
            api.harness.engines[0].step = lambda work: dict.fromkeys(step(work), same)
            answer = await api.complete(prompt="x", max_tokens=1, logprobs=5)
            (top,) = of(answer)["logprobs"]["top_logprobs"]
            assert list(top.values()) == [-0.5, -1.0, -1.5, -2.0, -9999.0]
            assert list(top) == ["%", "</s>", "<s>", "token_id:0", "'"]
            chat = await api.chat("x", max_tokens=1, logprobs=True, top_logprobs=5)
            (content,) = of(chat)["logprobs"]["content"]
            assert len(content["top_logprobs"]) == 5

    asyncio.run(main())
