"""What follows a request on its connection does not spoil the answer, nor hide that a client has
left.
"""

import asyncio
import json

import http_fakes

GARBAGE = b"this is no HTTP\r\n\r\n"


def stream(max_tokens: int) -> bytes:
    asked = http_fakes.ASK | {"prompt": "hello", "max_tokens": max_tokens, "stream": True}
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + body


async def begun(api, raw: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
    """A connection on which this was sent, and the first event of the answer: the others wait."""
    api.harness.engines[-1].gate.clear()
    reader, writer = await asyncio.open_connection("127.0.0.1", api.harness.server.http.port)
    writer.write(raw)
    return reader, writer, await reader.readuntil(b"data: ")


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


def run(test):
    async def main():
        async with http_fakes.serving() as api:
            await test(api)

    asyncio.run(main())


def test_an_answer_under_way_ends_before_what_is_no_http_ends_the_connection(caplog):
    async def test(api):
        reader, writer, first = await begun(api, stream(9))
        for _ in range(2):
            writer.write(GARBAGE)
        await until(lambda: "Invalid HTTP request" in caplog.text)
        api.harness.engines[-1].gate.set()
        said = first + await asyncio.wait_for(reader.read(), 20)
        assert said.count(b"HTTP/1.1") == 1
        assert said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        writer.close()

    run(test)


def test_what_is_no_http_is_refused_where_no_answer_has_begun():
    async def test(api):
        reader, writer = await asyncio.open_connection("127.0.0.1", api.harness.server.http.port)
        writer.write(GARBAGE)
        said = await asyncio.wait_for(reader.read(), 20)
        assert said.startswith(b"HTTP/1.1 400 ")
        writer.close()

    run(test)


def test_a_client_that_leaves_ends_its_request_though_another_waits_behind_it():
    async def test(api):
        behind = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        _, writer, _ = await begun(api, stream(40) + behind)
        assert api.harness.router.num_streams == 1
        writer.close()
        await until(lambda: api.harness.router.num_streams == 0)
        await until(lambda: api.harness.server.gate.slots.num_held == 0)

    run(test)
