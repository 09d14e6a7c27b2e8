"""API keys of gRPC clients: the same as those of HTTP."""

import asyncio
import os
from types import SimpleNamespace

import fakes
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kairos_jax.api import keys
from kairos_jax.api.http.server import HttpOptions
from kairos_jax.api.keys import digest, keys_from_flags, shows_key
from kairos_jax.api.server import Server
from kairos_jax.api.servicer import SERVICE
from kairos_jax.process.command import UsageError
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.rpc import kairos_pb2_grpc

KEYS = (digest(b"first"), digest(b"second"))
REFUSED = [
    (),
    (("authorization", "Bearer wrong"),),
    (("authorization", "Bearer"),),
    (("authorization", ""),),
    (("authorization", "first"),),
    (("authorization", "Basic first"),),
    (("authorization", "Bearer first"), ("authorization", "Bearer second")),
    (("authorization-bin", b"Bearer first"),),
    (("x-authorization", "Bearer first"),),
]


async def refusal(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details()


def test_every_call_needs_a_key_but_health_and_reflection():
    async def main():
        async with fakes.running(http=HttpOptions(0, keys=KEYS)) as harness:
            stub, ask = harness.stub, fakes.ask([1, 2], 3)

            async def generate(metadata):
                call = stub.Generate(ask, timeout=30, metadata=metadata)
                return [response async for response in call]

            for metadata in REFUSED:
                told = {
                    await refusal(generate(metadata)),
                    await refusal(stub.GetModel(pb.GetModelRequest(), metadata=metadata)),
                }
                assert told == {(grpc.StatusCode.UNAUTHENTICATED, keys.MISSING)}
            for key in ("Bearer first", "bearer second", "BEARER  first"):
                metadata = (("authorization", key), ("traceparent", "x"))
                assert fakes.ids(await generate(metadata)) == fakes.expected_tokens([1, 2], 3)
                assert (await stub.GetModel(pb.GetModelRequest(), metadata=metadata)).name == "fake"
            unknown = harness.channel.unary_unary("/kairos.v1.Kairos/Nothing")
            assert (await refusal(unknown(b"")))[0] is grpc.StatusCode.UNAUTHENTICATED
            health = health_pb2_grpc.HealthStub(harness.channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            reflection = reflection_pb2_grpc.ServerReflectionStub(harness.channel)
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            listed = await reflection.ServerReflectionInfo(iter([asked])).read()
            assert SERVICE in {each.name for each in listed.list_services_response.service}
            await harness.assert_nothing_held()

    asyncio.run(main())


@pytest.mark.parametrize("given", [KEYS, (), None])
def test_keys_are_asked_for_without_http_too(given):
    async def main():
        server = Server("127.0.0.1", 0, lambda: 0.0, keys=given)
        await server.start()
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = kairos_pb2_grpc.KairosStub(channel)
            code, _ = await refusal(stub.GetModel(pb.GetModelRequest()))
        expected = grpc.StatusCode.UNAUTHENTICATED if given else grpc.StatusCode.UNAVAILABLE
        assert code is expected
        await server.drain(0.0)

    asyncio.run(main())


def test_keys_are_read_from_a_file(tmp_path, monkeypatch):
    def read(path):
        monkeypatch.setattr(keys.flags, "FLAGS", SimpleNamespace(api_keys_file=path))
        return keys_from_flags()

    assert read(None) == ()
    file = tmp_path / "keys"
    file.write_text("first\n\n  second\r\n")
    assert read(str(file)) == KEYS
    file.write_text("\n")
    with pytest.raises(UsageError, match="keys is empty"):
        read(str(file))
    with pytest.raises(UsageError, match="no/such: No such file"):
        read("no/such")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="fifo: not a regular file"):
        read(str(tmp_path / "fifo"))


def test_a_key_that_is_no_latin_1_is_wrong():
    assert not shows_key("Bearer \u2028", KEYS)
    assert shows_key("Bearer first", KEYS)
