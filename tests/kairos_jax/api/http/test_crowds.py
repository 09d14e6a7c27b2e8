"""Clients that do not finish, do not read or say nothing hold no more than their share."""

import asyncio
import contextlib
import errno
import json
import socket

import fakes
import http_fakes
import pytest
from http_fakes import until

from kairos_jax.api.http import app, guard
from kairos_jax.api.http.answers import writing
from kairos_jax.api.http.body import request
from kairos_jax.api.http.connections import Connections, Protocol
from kairos_jax.routing import stream
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


def long_answer(as_events):
    body = http_fakes.ASK | {"prompt": "hello" * 13, "max_tokens": 60, "n": 4, "logprobs": 20}
    body |= {"echo": True}
    raw = json.dumps(body | {"stream": as_events}).encode()
    return head(len(raw)) + raw


async def deaf(api):
    """A connection whose client reads nothing, and whose buffers are small."""
    http = api.harness.server.http
    http._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", http.port))
    return client


@pytest.mark.parametrize("as_events", [True, False])
def test_a_client_that_does_not_read_is_cut_off_and_its_slot_is_free(
    as_events, monkeypatch, caplog
):
    made = Protocol.connection_made

    def made_small(self, transport):
        transport.set_write_buffer_limits(high=1024)
        made(self, transport)

    monkeypatch.setattr(Protocol, "connection_made", made_small)

    @serving
    async def run(api):
        slots, http = api.harness.server.gate.slots, api.harness.server.http
        http.connections.write_s = 0.2
        client = await deaf(api)
        await asyncio.get_running_loop().sock_sendall(client, long_answer(as_events))
        await until(lambda: slots.num_held == 4)
        await until(lambda: slots.num_held == 0)
        await until(lambda: http.connections.num_open == 0)
        assert not api.harness.router.num_streams
        client.close()

    run()
    assert "a client has read nothing of its answer for 0.2 s: it is cut off" in caplog.text


GET = b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"


@serving
async def test_a_client_that_reads_no_answer_of_any_route_is_cut_off(api):
    http = api.harness.server.http
    http.connections.write_s = 0.2
    client = await deaf(api)
    await asyncio.get_running_loop().sock_sendall(client, GET * 200)
    await until(lambda: http.connections.num_open == 1)
    await until(lambda: http.connections.num_open == 0)
    client.close()


@serving
async def test_a_connection_that_is_closed_is_not_kept_by_what_nobody_reads(api):
    """Less than a server's buffers hold, so that nothing waits but the end."""
    http = api.harness.server.http
    http.connections.write_s, http._server.config.timeout_keep_alive = 0.2, 0
    client = await deaf(api)
    await asyncio.get_running_loop().sock_sendall(client, GET * 2)
    await until(lambda: http.connections.num_open == 1)
    await until(lambda: http.connections.num_open == 0)
    client.close()


UNFINISHED = [
    b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n",  # 421
    b"GET /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n",
    head(1_000_000, "/absent"),
    head(1_000_000, "/health"),  # 405
    head(1_000_000).replace(b"application/json", b"text/plain"),
    b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n",  # all there, and what follows is nothing
]


@serving
async def test_no_byte_keeps_a_connection_that_is_answered(api):
    http = api.harness.server.http
    http._server.config.timeout_keep_alive = 0.3

    async def ask(said):
        reader, writer = await connected(api)
        writer.write(said)
        assert (await reader.readline()).startswith(b"HTTP/1.1 ")
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof():
                writer.write(b"\r\n")
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1 << 16), 0.02)
        writer.close()

    await asyncio.gather(*map(ask, UNFINISHED))
    await until(lambda: http.connections.num_open == 0)


@serving
async def test_a_body_that_does_not_come_is_answered_and_not_waited_for(api):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "_BODY_TIMEOUT_S", 0.1)
        reader, writer = await connected(api)
        writer.write(head(1000) + b"{")
        assert await reader.readline() == b"HTTP/1.1 408 Request Timeout\r\n"
        assert b"the body did not come within 0.1 s" in await reader.readuntil(b"}}")
        writer.close()
    await until(lambda: api.harness.server.gate.slots.num_held == 0)


@serving
async def test_a_body_for_which_nobody_waits_has_a_limit_too(api):
    api.harness.server.http.connections.body_s = 0.1
    reader, writer = await connected(api)
    writer.write(b"GET /live HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\nx")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    with contextlib.suppress(ConnectionResetError):
        await reader.read()
    writer.close()


@serving
async def test_requests_that_follow_one_another_at_once_are_all_answered(api):
    """The second comes in two parts, while the first is answered."""
    reader, writer = await connected(api)
    writer.write(GET + GET[:20])
    await reader.readuntil(b"\r\n\r\n")
    writer.write(GET[20:] + GET)
    read = b""
    while read.count(b"HTTP/1.1 200 OK") < 2:
        read += await asyncio.wait_for(reader.read(1 << 16), 30)
    writer.close()


def test_a_server_without_a_descriptor_left_waits_for_one_and_says_so_once(monkeypatch, caplog):
    """As CPython 3.11 does, the loop is told 2,048 times at once if it is not kept from it."""
    tries = 0

    @serving
    async def run(api):
        nonlocal tries
        listener = api.harness.server.http._socket
        accept, full = socket.socket.accept, True

        def none_left(self):
            nonlocal tries
            if full and self is listener:
                tries += 1
                raise OSError(errno.EMFILE, "Too many open files")
            return accept(self)

        monkeypatch.setattr(socket.socket, "accept", none_left)
        asking = asyncio.ensure_future(api.client.get("/health"))
        await until(lambda: tries >= 2)
        full = False
        assert (await asking).status_code == 200

    run()
    assert tries < 5
    told = [each.getMessage() for each in caplog.records]
    assert told.count("connections have to wait: [Errno 24] Too many open files") == 1
    assert "Traceback" not in caplog.text


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


@serving
async def test_the_numbers_of_echoed_prompts_count(api):
    body = {"prompt": ["hello"] * 2, "logprobs": 5, "n": 2, "echo": True, "max_tokens": 3}
    most = 2 * 2 * (5 + 3) * 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "MAX_LOGPROBS", most)
        assert len((await api.complete(**body))["choices"]) == 4
        patch.setattr(request, "MAX_LOGPROBS", most - 1)
        refused = await api.post("/v1/completions", http_fakes.ASK | body)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "logprobs")
        words = "32 tokens in all choices and their prompts and 5 alternatives each make 192"
        assert words in error["message"]
        patch.setattr(request, "MAX_LOGPROBS", 2 * 2 * 5 * 6)
        await api.complete(**body | {"max_tokens": 0})  # of which no output is shown


def test_a_late_reader_gets_events_of_bounded_size_and_others_their_turn(monkeypatch):
    monkeypatch.setattr(stream, "_MOST_TAKEN", 12)

    @serving
    async def run(api):
        body = {"prompt": "hello", "max_tokens": 60, "logprobs": 5}
        turns, taken = [], stream.Stream.take

        async def late(self):
            if not turns:
                await until(lambda: len(self.tokens) == 60)
            turns.append(asyncio.get_running_loop().time())
            return await taken(self)

        monkeypatch.setattr(stream.Stream, "take", late)
        running = asyncio.ensure_future(api.events("/v1/completions", body))
        beats = 0
        while not running.done():
            await asyncio.sleep(0)
            beats += len(turns) > 1
        events = [event["choices"][0] for event in await running]
        assert [len(event["logprobs"]["tokens"]) for event in events] == [2] * 30
        assert beats >= 30

    run()
