"""The HTTP server: uvicorn on the event loop of this process, beside gRPC."""

import asyncio
import contextlib
import functools
import logging
import math
import socket
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from absl import flags

from kairos_jax.api.http.connections import HEAD_S, Connections, Protocol
from kairos_jax.api.keys import keys_from_flags
from kairos_jax.net.address import Listener, join_address, listen
from kairos_jax.net.credentials import Credentials
from kairos_jax.process import descriptors
from kairos_jax.process.command import UsageError

log = logging.getLogger(__name__)

_DEFAULT_PORT = 8000


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    flags.DEFINE_integer(
        "http_port",
        None,
        f"Port of the HTTP API, on --host; 0: any free one, -1: none. Left out: {_DEFAULT_PORT}, "
        "or any free one with --port=0.",
        -1,
        65535,
    )
    flags.DEFINE_string(
        "api_keys_file", None, "File of API keys, one per line; clients must send one."
    )
    flags.DEFINE_list(
        "cors_origins", [], "Origins whose pages may read answers of the HTTP API; *: all."
    )
    flags.DEFINE_list(
        "allowed_hosts",
        [],
        "Names by which HTTP clients may call the server, where no key is asked for, beside "
        "--host, localhost and IP addresses; *: any.",
    )
    flags.DEFINE_boolean(
        "trust_request_chat_template",
        False,
        "Render chat templates that requests bring. They are programs; the model's own need no "
        "flag.",
    )
    flags.DEFINE_integer("http_max_body_mb", 8, "Largest HTTP request body, in MiB.", 1, 1024)


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """port: 0 for any free one. keys: SHA-256 of those that are let in; none: all are.
    cors_origins: whose pages may read answers, "*" for all. max_body_bytes: of one request.
    allowed_hosts: names by which the server may be called, see `Origins`.
    """

    port: int
    keys: Sequence[bytes] = field(default=(), repr=False)
    cors_origins: Sequence[str] = ()
    max_body_bytes: int = 8 << 20
    allowed_hosts: Sequence[str] = ()

    @classmethod
    def from_flags(cls) -> "HttpOptions | None":
        """None: there is to be no HTTP. Raises UsageError."""
        values = flags.FLAGS
        port = values.http_port
        if port is None:
            port = _DEFAULT_PORT if values.port else 0
        if port < 0:
            return None
        return cls(
            port,
            keys_from_flags(),
            tuple(values.cors_origins),
            values.http_max_body_mb << 20,
            tuple(values.allowed_hosts),
        )


class HttpServer:
    """An ASGI app on an address. It listens from the beginning, and answers from `start` on."""

    def __init__(self, app: Any, host: str, port: int, net: Credentials):
        """Raises UsageError if the address cannot be listened on."""
        try:
            self._socket = Listener(fileno=listen(host, port).detach())
        except OSError as error:
            raise UsageError(f"--http_port={port}: {error}") from error
        self.port = self._socket.getsockname()[1]
        self.address = join_address(host, self.port)
        self.connections = Connections(descriptors.for_clients())
        context = _tls(net)
        config = uvicorn.Config(
            app,
            http=functools.partial(Protocol, self.connections),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ssl_context_factory=(lambda config, default: context) if context else None,
        )
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to answer."""
        _tell_in_a_line(asyncio.get_running_loop())
        self._serving = asyncio.ensure_future(self._server.serve([self._socket]))

    async def stop(self, grace_s: int) -> None:
        """Stops listening; answers under way have `grace_s` seconds to end in."""
        if self._serving is None:
            self._socket.close()
            return
        self._server.config.timeout_graceful_shutdown = grace_s
        self._server.should_exit = True
        await self._serving


def _tell_in_a_line(loop: asyncio.AbstractEventLoop) -> None:
    """Has the loop log that there is no descriptor for a connection, which then waits, once a
    minute and without its stack.
    """
    before, told_at = loop.get_exception_handler(), -math.inf

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal told_at
        if context.get("message") != "socket.accept() out of system resource":
            tell = before or type(loop).default_exception_handler
            tell(loop, context)
        elif loop.time() - told_at > 60:
            told_at = loop.time()
            log.warning("connections have to wait: %s", context.get("exception"))

    loop.set_exception_handler(handle)


class _Server(uvicorn.Server):
    """Leaves signals to the process, and bounds the time of a TLS handshake."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's own, which has no such bound."""
        await self.lifespan.startup()
        config, loop = self.config, asyncio.get_running_loop()

        def protocol() -> asyncio.Protocol:
            make: Any = config.http_protocol_class
            return make(
                config=config, server_state=self.server_state, app_state=self.lifespan.state
            )

        handshake_s = HEAD_S if config.ssl else None
        self.servers = [
            await loop.create_server(
                protocol,
                sock=each,
                ssl=config.ssl,
                backlog=config.backlog,
                ssl_handshake_timeout=handshake_s,
            )
            for each in sockets or ()
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _tls(net: Credentials) -> ssl.SSLContext | None:
    if net.cert is None or net.key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:  # for its owner alone; SSL reads from files only
        file.write(net.cert + b"\n" + net.key)
        file.flush()
        context.load_cert_chain(file.name)
    return context
