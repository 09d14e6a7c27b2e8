"""The HTTP server itself: where and how it listens, and what it does not let in."""

import asyncio
import socket
import ssl
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest

from kairos_jax.api.http import server
from kairos_jax.api.http.server import HttpOptions, HttpServer
from kairos_jax.api.keys import digest
from kairos_jax.api.server import Server
from kairos_jax.net.credentials import PLAIN, Credentials
from kairos_jax.process.command import UsageError

TLS = Path(__file__).parents[3] / "support" / "tls"


@pytest.fixture
def from_flags(monkeypatch):
    """A function from flags to the options that they make."""

    def read(**given):
        values = {
            "port": 50051,
            "http_port": None,
            "api_keys_file": None,
            "cors_origins": [],
            "http_max_body_mb": 8,
            "allowed_hosts": [],
        }
        monkeypatch.setattr(server.flags, "FLAGS", SimpleNamespace(**values | given))
        return HttpOptions.from_flags()

    return read


def test_flags_make_options(from_flags, tmp_path):
    assert from_flags() == HttpOptions(8000)
    assert from_flags(port=0) == HttpOptions(0)
    assert from_flags(http_port=0) == HttpOptions(0)
    assert from_flags(port=0, http_port=8080) == HttpOptions(8080)
    assert from_flags(http_port=-1) is None
    keys = tmp_path / "keys"
    keys.write_text("first\n\n  second\r\n")
    given = {"cors_origins": ["*"], "http_max_body_mb": 1, "allowed_hosts": ["kairos"]}
    options = from_flags(api_keys_file=str(keys), **given)
    keys = digest(b"first"), digest(b"second")
    assert options == HttpOptions(8000, keys, ("*",), 1 << 20, ("kairos",))
    assert "first" not in repr(options)
    assert str(digest(b"first")) not in repr(options)


def test_a_file_without_keys_is_refused(from_flags, tmp_path):
    with pytest.raises(UsageError, match="--api_keys_file no/such: No such file"):
        from_flags(api_keys_file="no/such")
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(UsageError, match="keys is empty"):
        from_flags(api_keys_file=str(tmp_path / "keys"))


def test_a_port_in_use_is_told_of():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--http_port={port}: cannot listen on 127.0.0.1"):
            HttpServer(None, "127.0.0.1", port, PLAIN)


async def started(public=PLAIN) -> Server:
    server = Server("127.0.0.1", 0, lambda: 0.0, public, http=HttpOptions(0))
    await server.start()
    assert server.addresses == f"HTTP on {server.http.address}, gRPC on {server.address}"
    return server


def test_clients_come_over_the_public_tls():
    async def go():
        cert, key = ((TLS / f"peer.{kind}").read_bytes() for kind in ("pem", "key"))
        server = await started(Credentials(cert, key))
        context = ssl.create_default_context(cafile=TLS / "ca.pem")
        async with httpx2.AsyncClient(verify=context) as client:
            answer = await client.get(f"https://{server.http.address}/health")
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "the server is starting"
            with pytest.raises(httpx2.TransportError):
                await client.get(f"http://{server.http.address}/health")
        await server.drain(0.0)

    asyncio.run(go())


def test_headers_without_end_are_refused():
    async def go():
        server = await started()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.http.port)
        writer.write(b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * (80 << 10))
        assert (await reader.readline()).startswith(b"HTTP/1.1 400")
        writer.close()
        await server.drain(0.0)

    asyncio.run(go())


def test_a_client_that_only_listens_does_not_hold_up_the_end():
    async def go():
        server = await started()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.http.port)
        writer.write(b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
        await asyncio.wait_for(server.drain(0.0), 30)
        await asyncio.wait_for(reader.read(), 30)  # its end
        writer.close()

    asyncio.run(go())
