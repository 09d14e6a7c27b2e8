"""Clients that do not finish, do not read or say nothing hold no more than their share."""

import asyncio
import contextlib
import json

import fakes
import http_fakes
import pytest
from http_fakes import until
from uvicorn.protocols.http.flow_control import FlowControl

from kairos_jax.api.http import app
from kairos_jax.api.http.answers import writing
from kairos_jax.api.http.body import request
from kairos_jax.api.http.connections import Connections
from kairos_jax.text import tokenizer as tokenizer_module

CONFIG = fakes.altered(max_requests=4)


def serving(test):
    """Runs an async test against a server for four requests."""

    def run(*args, **kwargs):
        async def main():
            async with http_fakes.serving(CONFIG) as api:
                await test(api, *args, **kwargs)

        asyncio.run(asyncio.wait_for(main(), 60))

    return run


def head(length, path="/v1/completions"):
    lines = f"POST {path} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json"
    return "\r\n".join([*lines, f"content-length: {length}", "", ""]).encode()


async def connected(api):
    http = api.harness.server.http
    return await asyncio.open_connection("127.0.0.1", http.port)


@serving
async def test_a_request_whose_body_is_not_there_yet_holds_a_slot(api):
    slots, clients = api.harness.server.gate.slots, []
    for _ in range(4):
        reader, writer = await connected(api)
        writer.write(head(1000) + b"{")
        clients.append((reader, writer))
    await until(lambda: slots.num_held == 4)
    answer = await api.client.post("/v1/completions", json=http_fakes.ASK | {"prompt": "hello"})
    assert answer.status_code == 429
    assert "4 requests are in progress" in answer.json()["error"]["message"]
    for _, writer in clients:
        writer.close()
    await until(lambda: slots.num_held == 0)
    answer = await api.client.post("/v1/completions", json=http_fakes.ASK | {"prompt": "hello"})
    assert answer.status_code == 200


async def closed_by_server(api, said=b""):
    """Returns when the server has closed a connection on which this was said."""
    reader, writer = await connected(api)
    writer.write(said)
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), 30) == b""
    writer.close()


@serving
async def test_a_head_that_does_not_come_is_not_waited_for(api):
    http = api.harness.server.http
    http.connections.head_s = 0.05
    for said in (b"", b"GET /health HTTP/1.1\r\nhost:"):
        await closed_by_server(api, said)
    await until(lambda: http.connections.num_open == 0)


@serving
async def test_more_connections_than_there_may_be_are_closed_and_others_go_on(api):
    http = api.harness.server.http
    assert (await api.client.get("/health")).status_code == 200  # its connection stays
    http.connections.limit = 3
    kept = [await connected(api) for _ in range(2)]
    await until(lambda: http.connections.num_open == 3)
    for _ in range(5):
        await closed_by_server(api)
    assert (await api.client.get("/health")).status_code == 200
    for _, writer in kept:
        writer.close()
    await until(lambda: http.connections.num_open == 1)


def test_a_connection_too_many_is_told_once_in_the_log(caplog):
    some = Connections(2)
    assert [some.admit() for _ in range(5)] == [True, True, False, False, False]
    assert len(caplog.records) == 1
    for _ in range(4):
        some.left()
    assert [some.admit(), some.admit()] == [True, False]
    assert len(caplog.records) == 2


def long_answer(stream):
    body = http_fakes.ASK | {"prompt": "hello", "max_tokens": 60, "n": 4, "logprobs": 5}
    raw = json.dumps(body | {"stream": stream}).encode()
    return head(len(raw)) + raw


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_cut_off_and_its_slot_is_free(stream, monkeypatch, caplog):
    monkeypatch.setattr(writing, "WRITE_S", 0.2)

    async def never(self):
        await asyncio.Event().wait()

    @serving
    async def run(api):
        slots = api.harness.server.gate.slots
        _, writer = await connected(api)
        monkeypatch.setattr(FlowControl, "drain", never)  # as when all buffers are full
        paused = property(lambda self: True, lambda self, value: None)
        monkeypatch.setattr(FlowControl, "write_paused", paused, raising=False)
        writer.write(long_answer(stream))
        await until(lambda: slots.num_held == 4)
        await until(lambda: slots.num_held == 0)
        assert not api.harness.router.num_streams
        writer.close()

    run()
    assert "a client has read nothing of its answer for 0.2 s: it is cut off" in caplog.text


@serving
async def test_a_drain_waits_for_answers_that_are_still_written(api):
    slots = api.harness.server.gate.slots
    with slots.take():
        draining = asyncio.ensure_future(api.harness.server.drain(30.0))
        await until(lambda: api.harness.server.gate.closed == "the server is draining")
        await asyncio.sleep(0)
        assert not draining.done()
    assert await draining


def test_a_stream_that_is_queued_shows_that_it_is_alive(monkeypatch):
    monkeypatch.setattr(writing, "COMMENT_S", 0.02)

    @serving
    async def run(api):
        for engine in api.harness.engines:
            engine.gate.clear()
        body = http_fakes.ASK | {"prompt": "hello", "max_tokens": 3, "stream": True}
        async with api.client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            seen = [await anext(lines) for _ in range(4)]
            assert seen == [": waiting", "", ": waiting", ""]
            for engine in api.harness.engines:
                engine.gate.set()
            rest = [line async for line in lines if line.startswith("data:")]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) >= 2

    run()


@serving
async def test_an_answer_of_more_numbers_than_one_is_made_of_is_refused(api):
    body = http_fakes.ASK | {"prompt": "hello", "logprobs": 5, "n": 4}
    whole = await api.client.post("/v1/completions", json=body | {"max_tokens": 9})
    assert len(whole.json()["choices"]) == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "MAX_LOGPROBS", 4 * 9 * 6 - 1)
        refused = await api.client.post("/v1/completions", json=body | {"max_tokens": 9})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "logprobs")
        assert "36 tokens in all choices and 5 alternatives each make 216" in error["message"]


def test_a_slow_template_of_a_client_holds_up_nobody_else(monkeypatch):
    """Each loops without end, until its time is over."""
    monkeypatch.setattr(tokenizer_module, "CLIENTS_SECONDS", 0.5)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

    async def main():
        async with http_fakes.serving(trusts_templates=True) as api:
            await api.chat("hi", max_tokens=2)  # the process of the model's template has started
            messages = {"messages": [{"role": "user", "content": "hi"}]}
            body = http_fakes.ASK | messages | {"chat_template": endless}
            slow = [asyncio.ensure_future(api.post("/v1/chat/completions", body)) for _ in range(3)]
            await until(lambda: api.harness.server.gate.slots._num_templates == 3)
            await api.complete(prompt="hello", max_tokens=2)
            await api.chat("hi", max_tokens=2)
            assert not any(each.done() for each in slow[1:]), "they are not over"
            for each in asyncio.as_completed(slow):
                answer = await each
                assert answer.status_code == 400
                words = "the given chat template took more than 0.5 s of processor time"
                assert words in answer.json()["error"]["message"]

    asyncio.run(asyncio.wait_for(main(), 60))


@serving
async def test_bodies_in_progress_are_bounded_in_all(api):
    slots = api.harness.server.gate.slots
    slots.max_bytes = 100_000
    _, writer = await connected(api)
    writer.write(head(99_000) + b"{" * 90_000)
    await until(lambda: slots.num_bytes > 80_000)
    refused = await api.post("/tokenize", {"prompt": "x" * 70_000})
    assert refused.status_code == 429
    assert "the bodies of requests in progress" in refused.json()["error"]["message"]
    assert (await api.post("/tokenize", {"prompt": "hello"})).status_code == 200
    writer.close()
    await until(lambda: slots.num_held == 0)
    assert slots.num_bytes == 0


@serving
async def test_the_ids_of_a_long_text_are_written_in_parts(api):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "_IDS_PART", 10)
        for count in (0, 1, 10, 95):
            answer = await api.post("/tokenize", {"prompt": "x" * count})
            told = answer.json()
            assert told == {"count": count, "max_model_len": 128, "tokens": [90] * count}


@serving
async def test_more_ids_than_the_context_has_have_no_text(api):
    assert (await api.post("/detokenize", {"tokens": [2] * 128})).json() == {"prompt": " " * 128}
    refused = await api.post("/detokenize", {"tokens": [2] * 129})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["message"] == "tokens must be at most 128, which the context has, got 129"
