"""TLS and the token over real loopback connections."""

import asyncio
import contextlib
import logging
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from absl import flags
from absl.testing import flagsaver
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kairos_jax.api.server import Server
from kairos_jax.net import credentials
from kairos_jax.net.credentials import PLAIN, Credentials
from kairos_jax.net.health import ALIVE, Health
from kairos_jax.process.command import UsageError

TLS = Path(__file__).parents[2] / "support" / "tls"
CA = (TLS / "ca.pem").read_bytes()


def shown(name: str) -> dict[str, bytes]:
    return {"cert": (TLS / f"{name}.pem").read_bytes(), "key": (TLS / f"{name}.key").read_bytes()}


SECURE = Credentials(**shown("peer"), ca=CA)
MUTUAL = replace(SECURE, mutual=True)
NAMED = Credentials(**shown("named"), ca=CA, name="kairos")
STRANGER = Credentials(**shown("stranger"), ca=CA)
TOKEN = replace(SECURE, token="open-sesame")

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


async def one(request, context):
    return request


async def many(request, context):
    yield request
    yield request


async def last_of(requests, context):
    async for request in requests:
        last = request
    return last


async def echo(requests, context):
    async for request in requests:
        yield request


def methods() -> grpc.GenericRpcHandler:
    answers = (one, many, last_of, echo)
    return grpc.method_handlers_generic_handler(
        "test.Echo",
        {
            kind: getattr(grpc, f"{kind}_rpc_method_handler")(answer)
            for kind, answer in zip(KINDS, answers, strict=True)
        },
    )


@contextlib.asynccontextmanager
async def serving(wire: Credentials, host: str = "127.0.0.1"):
    server = grpc.aio.server(interceptors=wire.interceptors())
    server.add_generic_rpc_handlers((methods(),))
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = wire.add_port(server, host, 0)
    await server.start()
    try:
        yield credentials.join_address(host, port)
    finally:
        await server.stop(None)


async def call(
    wire: Credentials, address: str, kind: str = "unary_unary", metadata=None, silent: bool = False
) -> list[bytes]:
    """The answers to b"a", or to b"a" and b"b" where there may be several.

    silent: a stream opens, and says nothing.
    """
    metadata = wire.metadata if metadata is None else metadata
    async with wire.channel(address) as channel:
        method = getattr(channel, kind)(f"/test.Echo/{kind}")
        request = iter([b"a", b"b"]) if kind.startswith("stream") else b"a"
        if silent and kind.startswith("stream"):
            request = None
        answer = method(request, metadata=metadata, timeout=20)
        if kind.endswith("stream"):
            return [message async for message in answer]
        return [await answer]


async def refusal(*args, **kwargs) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call(*args, **kwargs)
    return error.value


@pytest.mark.parametrize("wire", [PLAIN, SECURE, MUTUAL, TOKEN, NAMED])
@pytest.mark.parametrize(
    ("kind", "answers"),
    list(zip(KINDS, ([b"a"], [b"a", b"a"], [b"b"], [b"a", b"b"]), strict=True)),
)
def test_every_kind_of_call_goes_through(wire, kind, answers):
    async def go():
        async with serving(wire) as address:
            assert await call(wire, address, kind) == answers

    asyncio.run(go())


def test_addresses_may_be_ipv6():
    async def go():
        async with serving(MUTUAL, "::1") as address:
            assert address.startswith("[::1]:")
            assert await call(MUTUAL, address) == [b"a"]

    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
    asyncio.run(go())


@pytest.mark.parametrize(
    ("server", "client"),
    [
        pytest.param(MUTUAL, Credentials(ca=CA), id="a caller without a certificate"),
        pytest.param(MUTUAL, STRANGER, id="a caller whose certificate another CA signed"),
        pytest.param(STRANGER, SECURE, id="a server whose certificate another CA signed"),
        pytest.param(NAMED, SECURE, id="a server with a certificate of another name"),
        pytest.param(SECURE, PLAIN, id="a caller without TLS"),
        pytest.param(PLAIN, SECURE, id="a server without TLS"),
    ],
)
def test_the_wrong_side_is_refused_at_once(server, client):
    async def go():
        async with serving(server) as address:
            error = await asyncio.wait_for(refusal(client, address), 10)  # not the call's 20
            assert error.code() is UNAVAILABLE
            assert address in error.details()

    asyncio.run(go())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param((), id="none"),
        pytest.param((("authorization", "Bearer open-sesam"),), id="too short"),
        pytest.param((("authorization", "Bearer open-sesame2"),), id="too long"),
        pytest.param((("authorization", "open-sesame"),), id="no scheme"),
        pytest.param((("token", "Bearer open-sesame"),), id="elsewhere"),
        pytest.param(
            (("authorization", "Bearer x"), ("authorization", "Bearer open-sesame")), id="two"
        ),
    ],
)
def test_a_call_without_the_token_is_refused(kind, metadata):
    async def go():
        async with serving(TOKEN) as address:
            # Silent: where a stream sends a message as the refusal comes, grpc.aio says INTERNAL.
            error = await refusal(TOKEN, address, kind, metadata, silent=True)
            assert error.code() is UNAUTHENTICATED
            assert "--token_file" in error.details()

    asyncio.run(go())


def test_methods_that_do_not_exist_are_refused_alike():
    async def go():
        async with serving(TOKEN) as address, TOKEN.channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary("/test.Echo/no_such")(b"")
            assert error.value.code() is UNAUTHENTICATED

    asyncio.run(go())


def test_health_needs_no_token():
    async def go():
        async with serving(TOKEN) as address, TOKEN.channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

    asyncio.run(go())


def test_health_has_a_port_without_tls_for_probes():
    serving, not_serving = (
        getattr(health_pb2.HealthCheckResponse, name) for name in ("SERVING", "NOT_SERVING")
    )

    async def go():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        told = Health(grpc.aio.server(), "test.Echo", "127.0.0.1", port)
        await told.say(serving=False)
        await told.listen()
        async with PLAIN.channel(f"127.0.0.1:{port}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            for service, status in (("", not_serving), (ALIVE, serving)):
                answer = await check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == status
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary("/test.Echo/unary_unary")(b"")
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        await told.close()

    asyncio.run(go())


def test_a_health_port_in_use_is_named():
    async def go():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(UsageError, match=f"--health_port={port}: cannot listen on 127"):
                Server("127.0.0.1", 0, time.monotonic, health_port=port)

    asyncio.run(go())


def test_clients_come_over_tls_and_probes_without():
    async def go():
        with socket.create_server(("127.0.0.1", 0)) as free:
            health_port = free.getsockname()[1]
        public = Credentials(**shown("peer"))
        server = Server("127.0.0.1", 0, time.monotonic, public, health_port)
        await server.start()
        probed = f"127.0.0.1:{health_port}"
        for client, address in ((Credentials(ca=CA), server.address), (PLAIN, probed)):
            async with client.channel(address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                answer = await stub.Check(health_pb2.HealthCheckRequest())
                assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.drain(0.0)
        async with PLAIN.channel(probed) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())

    asyncio.run(go())


def test_a_port_in_use_is_an_error():
    async def go():
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
            for wire in (PLAIN, SECURE):
                with pytest.raises(OSError, match=f"127.0.0.1:{port}: Address already in use"):
                    wire.add_port(server, "127.0.0.1", port)
            await server.stop(None)

    asyncio.run(go())


def test_a_peer_that_cannot_be_reached_is_tried_again_soon():
    """Seven tries take 3 s; with gRPC's own pauses they take half a minute."""

    async def go():
        tries, enough = [], asyncio.Event()

        def refuse(reader, writer):
            tries.append(time.monotonic())
            writer.close()
            if len(tries) == 7:
                enough.set()

        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with PLAIN.channel(address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            waiting = check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            await asyncio.wait_for(enough.wait(), 60)
            waiting.cancel()
        server.close()
        assert tries[-1] - tries[0] < 15

    asyncio.run(go())


def test_the_token_does_not_leave_the_host_in_the_clear():
    wire = Credentials(token="open-sesame")

    async def go():
        for host in ("127.0.0.1", "localhost", "[::1]", "127.8.0.1"):
            await wire.channel(f"{host}:1").close()
        with pytest.raises(UsageError, match=r"--tls_ca to call 10\.0\.0\.7:50061"):
            wire.channel("10.0.0.7:50061")
        server = grpc.aio.server()
        with pytest.raises(UsageError, match=r"--tls_cert to listen on 0\.0\.0\.0:0"):
            wire.add_port(server, "0.0.0.0", 0)
        assert wire.add_port(server, "127.0.0.1", 0) > 0
        await TOKEN.channel("10.0.0.7:50061").close()
        await server.stop(None)

    asyncio.run(go())


def test_who_calls_over_tls_listens_over_tls():
    async def go():
        server = grpc.aio.server()
        with pytest.raises(UsageError, match="--tls_cert is missing"):
            Credentials(ca=CA).add_port(server, "127.0.0.1", 0)
        await server.stop(None)

    asyncio.run(go())


def test_secrets_are_not_printed():
    text = repr(TOKEN)
    assert "open-sesame" not in text
    assert "PRIVATE KEY" not in text


@pytest.fixture
def from_flags():
    """A function from flags to the Credentials that they make, or to a public one."""
    names = flags.FLAGS
    if "tls_cert" not in names:
        credentials.define_flags()
        credentials.define_public_flags()
    names.mark_as_parsed()

    def read(public: bool = False, **given) -> Credentials:
        with flagsaver.flagsaver(**given):
            return Credentials.public_from_flags() if public else Credentials.from_flags()

    return read


def named(name: str) -> dict[str, str]:
    return {"tls_cert": str(TLS / f"{name}.pem"), "tls_key": str(TLS / f"{name}.key")}


def test_flags_make_a_wire(from_flags, tmp_path):
    token = tmp_path / "token"
    token.write_text("open-sesame\n")
    assert from_flags() == PLAIN
    peer = named("peer") | {"tls_ca": str(TLS / "ca.pem")}
    assert from_flags(**peer, mutual_tls=True) == MUTUAL
    assert from_flags(**peer, token_file=str(token)) == TOKEN
    assert from_flags(**peer, tls_name="kairos").name == "kairos"
    public = {f"public_{flag}": path for flag, path in named("peer").items()}
    assert from_flags(public=True, **public) == Credentials(**shown("peer"))
    assert from_flags(public=True) == PLAIN


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tls_cert": "x"}, "--tls_ca is missing"),
        ({"tls_cert": "x", "tls_ca": "y"}, "--tls_key is missing: it goes with --tls_cert"),
        ({"tls_key": "x"}, "--tls_cert is missing: it goes with --tls_key"),
        ({"mutual_tls": True}, "--tls_ca is missing, which --mutual_tls needs"),
        ({"tls_name": "kairos"}, "--tls_ca is missing, which --tls_name needs"),
        ({"tls_ca": "no/such.pem"}, "--tls_ca no/such.pem: No such file"),
        ({"tls_ca": str(TLS / "peer.key")}, "--tls_ca .*peer.key: NO_CERT"),
        ({"tls_ca": __file__}, "--tls_ca .*test_credentials.py: "),
        ({"token_file": "no/such"}, "--token_file no/such: No such file"),
        ({"token_file": "/dev/null"}, "--token_file /dev/null: not a regular file"),
        ({"token_file": str(TLS)}, "--token_file .*: not a regular file"),
        ({"token_file": str(TLS / "README.md")}, "must hold one word of printable ASCII"),
    ],
)
def test_wrong_flags_are_named(from_flags, given, message):
    with pytest.raises(UsageError, match=message):
        from_flags(**given)


@pytest.mark.parametrize("flag", ["token_file", "tls_ca", "tls_cert", "public_tls_key"])
def test_a_fifo_is_named_and_not_waited_for(from_flags, tmp_path, flag):
    os.mkfifo(tmp_path / "fifo")
    given = named("peer") | {"tls_ca": str(TLS / "ca.pem")}
    given |= {f"public_{flag}": path for flag, path in named("peer").items()}
    with pytest.raises(UsageError, match=f"--{flag} .*/fifo: not a regular file"):
        from_flags(public=flag.startswith("public"), **given | {flag: str(tmp_path / "fifo")})


@pytest.mark.parametrize(
    ("cert", "key", "reason"),
    [
        ("peer.pem", "named.key", "KEY_VALUES_MISMATCH"),
        ("peer.pem", "locked.key", ""),
        ("README.md", "peer.key", "NO_START_LINE|PEM|not PEM"),
        ("peer.pem", "README.md", "NO_START_LINE|PEM|not PEM"),
    ],
)
def test_a_certificate_that_cannot_serve_is_found_at_start(from_flags, cert, key, reason):
    given = {"tls_cert": str(TLS / cert), "tls_key": str(TLS / key), "tls_ca": str(TLS / "ca.pem")}
    with pytest.raises(UsageError, match=f"--tls_cert .*{cert} with --tls_key .*{key}: .*{reason}"):
        from_flags(**given)


def test_a_token_that_all_can_read_is_warned_of(from_flags, tmp_path, caplog):
    token = tmp_path / "token"
    token.write_text("open-sesame")
    token.chmod(0o640)
    with caplog.at_level(logging.WARNING):
        from_flags(token_file=str(token))
        assert not caplog.records
        token.chmod(0o644)
        from_flags(token_file=str(token))
    assert "every user" in caplog.text
