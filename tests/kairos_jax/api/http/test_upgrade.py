"""Requests that ask to upgrade, over a raw socket: they are answered as if they had not asked."""

import asyncio
import contextlib
import json

import http_fakes
import pytest
from http_fakes import says, until

from kairos_jax.api.http.connections import Protocol

TEXT = "/v1/completions"
H2C = (
    "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
)
WEBSOCKET = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


def post(prompt: str, more: str = "", chunked: bool = False, version: str = "1.1") -> bytes:
    body = json.dumps(http_fakes.ASK | {"prompt": prompt, "max_tokens": 4}).encode()
    if chunked:
        size = "Transfer-Encoding: chunked"
        parts = [body[:7], body[7:], b""]
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    else:
        size = f"Content-Length: {len(body)}"
    head = f"POST {TEXT} HTTP/{version}\r\nHost: localhost\r\n{more}{size}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + body


class Connection:
    """One to the server, which reads apart what is written apart."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer
        self.num_written = self.num_read = 0  # bytes; read: by the server

    async def write(self, part: bytes) -> None:
        """Returns when the server has read it."""
        self._writer.write(part)
        self.num_written += len(part)
        await until(lambda: self.num_read == self.num_written)

    async def answer(self) -> tuple[int, bytes]:
        """Status and body."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ") for line in lines)}
        body = await self._reader.readexactly(int(headers["content-length"]))
        return int(status.split()[1]), body


@contextlib.asynccontextmanager
async def connected(api):
    """A connection, and no other at the same time."""
    received = Protocol.data_received

    def told(protocol, data):
        received(protocol, data)
        connection.num_read += len(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Protocol, "data_received", told)
        port = api.harness.server.http.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        connection = Connection(reader, writer)
        with contextlib.closing(writer):
            yield connection


async def answers(api, parts: list[bytes], count: int) -> list[tuple[int, bytes]]:
    """So many answers to what is written in these parts, on one connection."""
    async with connected(api) as connection:
        for part in parts:
            await connection.write(part)
        return [await connection.answer() for _ in range(count)]


def said(answer: tuple[int, bytes]) -> str:
    status, body = answer
    assert status == 200, body
    return json.loads(body)["choices"][0]["text"]


def in_threes(data: bytes) -> list[bytes]:
    third = len(data) // 3
    return [data[:third], data[third : 2 * third], data[2 * third :]]


@pytest.mark.parametrize(
    "asked", [H2C, WEBSOCKET, "Upgrade: TLS/1.0\r\nConnection: close, upgrade\r\n"]
)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("cut", [lambda data: [data], in_threes])
def test_a_body_after_a_request_to_upgrade_is_read(shared, asked, chunked, cut):
    async def run(api):
        (answer,) = await answers(api, cut(post("hello", asked, chunked)), 1)
        assert said(answer) == says("hello", 4)

    shared(run)


@pytest.mark.parametrize("chunked", [False, True])
def test_requests_may_follow_on_the_same_connection(shared, chunked):
    async def run(api):
        prompts = ["ab", "cd", "ef", "gh"]
        asked = ["", H2C, WEBSOCKET, ""]
        data = [post(*each, chunked) for each in zip(prompts, asked, strict=True)]
        expected = [says(prompt, 4) for prompt in prompts]
        # All at once, each by itself, and each after the answer to the one before.
        for parts in ([b"".join(data)], data):
            found = await answers(api, parts, len(prompts))
            assert [said(each) for each in found] == expected
        async with connected(api) as connection:
            for part, text in zip(data, expected, strict=True):
                await connection.write(part)
                assert said(await connection.answer()) == text

    shared(run)


def test_a_body_may_come_later_than_its_head(shared):
    async def run(api):
        head, _, body = post("hello", H2C).partition(b"\r\n\r\n")
        (answer,) = await answers(api, [head + b"\r\n\r\n", body], 1)
        assert said(answer) == says("hello", 4)

    shared(run)


def test_a_get_that_asks_for_a_websocket_is_a_get(shared):
    async def run(api):
        asked = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{WEBSOCKET}\r\n".encode()
        ((status, body),) = await answers(api, [asked], 1)
        assert (status, json.loads(body)["object"]) == (200, "list")

    shared(run)


def test_of_http_1_0_too(shared):
    async def run(api):
        (answer,) = await answers(api, [post("hello", H2C, version="1.0")], 1)
        assert said(answer) == says("hello", 4)

    shared(run)


@pytest.mark.parametrize("target", ["localhost:443", "/v1/completions"])
def test_a_tunnel_is_refused(shared, target):
    async def run(api):
        asked = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode()
        ((status, _),) = await answers(api, [asked], 1)
        assert status == 400

    shared(run)
