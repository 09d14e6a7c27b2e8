"""gRPC calls whose messages are none, or that have none: the client is told, and the log is not."""

import asyncio
import sys

import fakes
import grpc
import pytest
from grpc_health.v1 import health_pb2

from kairos_jax.rpc import kairos_pb2 as pb

GENERATE, MODEL = "/kairos.v1.Kairos/Generate", "/kairos.v1.Kairos/GetModel"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
METHODS = (GENERATE, MODEL, CHECK, WATCH, REFLECTION)

served = fakes.served_as(fakes.CONFIG)


async def answers(harness, method: str, *messages: bytes) -> list[bytes]:
    """Of a call with these messages, however many the method takes."""
    call = harness.channel.stream_stream(method)(iter(messages), timeout=20)
    return [answer async for answer in call]


@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_are_no_message_are_an_invalid_argument(method, caplog):
    @served
    async def test(harness):
        with pytest.raises(grpc.aio.AioRpcError, match="the message cannot be read") as error:
            await answers(harness, method, b"\xff\xff\xff")
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    test()
    assert not caplog.records


@pytest.mark.parametrize("method", [GENERATE, MODEL, CHECK, WATCH])
def test_a_call_without_a_message_is_an_invalid_argument(method):
    @served
    async def test(harness):
        with pytest.raises(grpc.aio.AioRpcError, match="the call has no message") as error:
            await answers(harness, method)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    test()


@served
async def test_all_others_are_answered_as_ever(harness):
    asked = fakes.ask([1, 2, 3], 4).SerializeToString()
    parts = [
        pb.GenerateResponse.FromString(each) for each in await answers(harness, GENERATE, asked)
    ]
    assert fakes.ids(parts) == fakes.expected_tokens([1, 2, 3], 4)
    (model,) = await answers(harness, MODEL, b"")
    assert pb.Model.FromString(model).name == "fake"
    (health,) = await answers(harness, CHECK, b"")
    serving = health_pb2.HealthCheckResponse.SERVING
    assert health_pb2.HealthCheckResponse.FromString(health).status == serving
    assert len(await answers(harness, REFLECTION, b"", b"")) == 2
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await answers(harness, "/kairos.v1.Kairos/Nope", b"")
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


@served
async def test_a_client_that_leaves_ends_its_request(harness):
    harness.engines[-1].gate.clear()
    call, _, _ = await harness.stream([1, 2, 3], 40)
    assert harness.router.num_streams == 1
    call.cancel()
    async with asyncio.timeout(20):
        while harness.router.num_streams:
            await asyncio.sleep(0)


@served
async def test_no_stream_of_messages_is_left_to_the_garbage_collector(harness):
    started, hooks = [], sys.get_asyncgen_hooks()

    def first(generator) -> None:
        started.append(generator.__qualname__)
        hooks.firstiter(generator)

    sys.set_asyncgen_hooks(firstiter=first)
    try:
        await answers(harness, GENERATE, fakes.ask([1, 2, 3], 4).SerializeToString())
    finally:
        sys.set_asyncgen_hooks(firstiter=hooks.firstiter)
    assert started
    assert not any("_MessageReceiver" in name for name in started)
