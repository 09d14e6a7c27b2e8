"""gRPC clients that send half, say nothing or do not read hold no more than their share."""

import asyncio
import contextlib
import functools
import socket

import fakes
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from http_fakes import until

from kairos_jax.api import server, servicer, slots
from kairos_jax.net import limits, well_formed
from kairos_jax.net.health import Health
from kairos_jax.process import descriptors
from kairos_jax.rpc import kairos_pb2 as pb

CONFIG = fakes.altered(max_requests=4)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
CODES = grpc.StatusCode


def serving(test):
    """Runs an async test against a server for four requests."""

    def run(monkeypatch):
        async def main():
            async with fakes.running(CONFIG) as harness:
                await test(harness)
                assert await harness.generate([1, 2], 3), "others are served"
                await until(lambda: harness.server.gate.slots.num_held == 0)
                assert harness.server.gate.slots.num_bytes == 0

        asyncio.run(asyncio.wait_for(main(), 60))

    return run


def with_limits(**values):
    """As `serving`, with these of the modules that have them."""

    def decorate(test):
        @functools.wraps(test)
        def run(monkeypatch):
            for name, value in values.items():
                (module,) = (
                    each for each in (server, servicer, limits, well_formed) if hasattr(each, name)
                )
                monkeypatch.setattr(module, name, value)
            serving(test)(monkeypatch)

        del run.__wrapped__  # whose arguments pytest would ask for
        return run

    return decorate


def frame(kind, flags, stream, payload):
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def head(path, stream=1):
    """The head of a call, of which nothing else is there."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x"}
    fields |= {"content-type": "application/grpc", "te": "trailers"}
    block = b""
    for name, value in fields.items():
        block += bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    return frame(1, 4, stream, block)


def part_of_message(size, sent, stream=1):
    """The first bytes of a message of some size."""
    return frame(0, 0, stream, bytes(1) + size.to_bytes(4) + bytes(sent))


@contextlib.asynccontextmanager
async def said(port, *parts):
    """A connection on which this was said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"".join(parts))
    try:
        yield reader
    finally:
        writer.close()


async def code_of(call):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in call:
            pass
    return error.value.code(), error.value.details()


GENERATE = "/kairos.v1.Kairos/Generate"


@with_limits()
async def test_a_call_whose_message_is_not_there_yet_holds_a_slot(harness):
    held = harness.server.gate.slots
    calls = [head(GENERATE, 2 * nth + 1) for nth in range(4)]
    parts = [part_of_message(4_000_000, 10_000, 2 * nth + 1) for nth in range(4)]
    async with said(harness.server.port, PREFACE, *calls, *parts):
        await until(lambda: held.num_held == 4)
        code, words = await code_of(harness.stub.Generate(fakes.ask([1], 1)))
        assert (code, words[:26]) == (CODES.RESOURCE_EXHAUSTED, "4 requests are in progress")
    await until(lambda: held.num_held == 0)


@with_limits(MESSAGE_S=0.2)
async def test_a_message_that_does_not_come_is_not_waited_for(harness):
    channel = harness.channel

    async def never():
        await asyncio.Event().wait()
        yield b""

    generate = channel.stream_stream(GENERATE)(never())
    model = channel.stream_unary("/kairos.v1.Kairos/GetModel")
    check = channel.stream_unary("/grpc.health.v1.Health/Check")

    async def unary(call):
        yield await call(never())

    for call in (generate, unary(model), unary(check)):
        code, words = await code_of(call)
        assert (code, words) == (
            CODES.DEADLINE_EXCEEDED,
            "the message did not come within 0.2 s",
        )


@with_limits(_WITH_HEAD_S=0.01)
async def test_messages_that_are_on_their_way_count_as_long(harness):
    held = harness.server.gate.slots
    held.max_bytes = servicer.MAX_MESSAGE_BYTES
    async with said(harness.server.port, PREFACE, head(GENERATE)):
        await until(lambda: held.num_bytes == servicer.MAX_MESSAGE_BYTES)
        assert await harness.generate([1, 2], 3), "short ones pass"
        async with said(harness.server.port, PREFACE, head(GENERATE)):
            await until(lambda: held.num_held == 2)
            await until(lambda: held.num_held == 1)
        big = pb.GenerateRequest(text="x" * 2 * slots.SMALL_BYTES)
        code, words = await code_of(harness.stub.Generate(big))
        assert code is CODES.RESOURCE_EXHAUSTED
        assert "the bodies of requests in progress" in words


@with_limits(_MOST_WAITING=2)
async def test_few_calls_that_hold_no_slot_wait_for_their_message(harness):
    path = "/grpc.health.v1.Health/Check"
    async with said(harness.server.port, PREFACE, head(path), head(path, 3)):
        check = health_pb2_grpc.HealthStub(harness.channel).Check
        code = CODES.OK
        async with asyncio.timeout(30):
            while code is CODES.OK:
                call = check(health_pb2.HealthCheckRequest())
                code = await call.code()
        assert code is CODES.RESOURCE_EXHAUSTED
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await check(health_pb2.HealthCheckRequest())
                break


@with_limits(HANDSHAKE_S=0.2)
async def test_a_connection_that_says_nothing_is_closed(harness):
    for parts in ((), (PREFACE,)):  # the latter does not agree to the server's settings
        async with said(harness.server.port, *parts) as reader:
            await asyncio.wait_for(reader.read(), 30)


def test_more_connections_than_there_may_be_are_closed_and_others_go_on(monkeypatch):
    monkeypatch.setattr(descriptors, "for_clients", lambda: 3)

    @serving
    async def run(harness):
        await harness.generate([1], 1)  # whose connection stays
        kept = [socket.create_connection(("127.0.0.1", harness.server.port)) for _ in range(9)]
        await asyncio.sleep(0)
        async with said(harness.server.port) as reader:
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 30) == b""
        assert await harness.generate([1], 1)
        for each in kept:
            each.close()

    run(monkeypatch)


@with_limits(KEEPALIVE_MS=300, KEEPALIVE_TIMEOUT_MS=300)
async def test_a_client_that_is_gone_without_a_word_is_noticed_and_its_slot_is_free(harness):
    """It answers no ping."""
    for engine in harness.engines:
        engine.gate.clear()
    raw = fakes.ask([1], 1).SerializeToString()
    message = frame(0, 1, 1, bytes(1) + len(raw).to_bytes(4) + raw)
    async with said(harness.server.port, PREFACE, head(GENERATE), message) as reader:
        await until(lambda: harness.router.num_streams == 1)
        await until(lambda: harness.router.num_streams == 0)
        await asyncio.wait_for(reader.read(), 30)
    for engine in harness.engines:
        engine.gate.set()


@with_limits(IDLE_MS=300)
async def test_a_connection_on_which_nothing_is_asked_is_closed(harness):
    async with said(harness.server.port, PREFACE) as reader:
        await asyncio.wait_for(reader.read(), 30)


def test_probes_are_bounded_too(monkeypatch):
    monkeypatch.setattr(limits, "_PROBES", 2)
    monkeypatch.setattr(limits, "HANDSHAKE_S", 0.5)

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        told = Health(grpc.aio.server(), "test", "127.0.0.1", port)
        await told.listen()
        kept = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
        async with said(port) as reader:
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 30) == b""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            answer = await check(
                health_pb2.HealthCheckRequest(service="alive"), wait_for_ready=True, timeout=30
            )
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        for each in kept:
            each.close()
        await told.close()

    asyncio.run(main())
