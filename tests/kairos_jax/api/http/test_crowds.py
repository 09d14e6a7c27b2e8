"""Clients that do not finish, do not read or say nothing hold no more than their share."""

import asyncio
import contextlib
import json

import fakes
import http_fakes
import pytest
from http_fakes import until
from uvicorn.protocols.http.flow_control import FlowControl

from kairos_jax.api.http.answers import writing
from kairos_jax.api.http.body import request
from kairos_jax.api.http.connections import Connections

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
