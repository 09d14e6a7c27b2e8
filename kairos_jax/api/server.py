"""The server of one process: gRPC with health and reflection, and HTTP beside it."""

import asyncio
import logging
from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection
from starlette.routing import BaseRoute

from kairos_jax.api.backend import Backend
from kairos_jax.api.gate import Gate
from kairos_jax.api.http.app import make_app
from kairos_jax.api.http.live import Live
from kairos_jax.api.http.server import HttpOptions, HttpServer
from kairos_jax.api.keys import KeyCheck
from kairos_jax.api.servicer import MAX_MESSAGE_BYTES, SERVICE, Servicer
from kairos_jax.net import limits
from kairos_jax.net.address import join_address
from kairos_jax.net.credentials import PLAIN, Credentials
from kairos_jax.net.health import Health
from kairos_jax.net.well_formed import WellFormed
from kairos_jax.process.command import UsageError

# Calls at once, those included that are refused for want of a slot.
MAX_CALLS = 4096
KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS, IDLE_MS = 30_000, 10_000, 600_000


class _NoTraceOfLeavers(logging.Filter):
    """Drops what grpc.aio logs as an error, with a traceback, where a client is gone before the
    status of its call could be sent: at times it finds that out too late.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        return not record.getMessage().startswith("ExecuteBatchError raised in core")


_NO_TRACE = _NoTraceOfLeavers()


class Server:
    """The gRPC server, and the HTTP server beside it. Health says NOT_SERVING until `open`, and
    again from `drain` on. http: None where there is none.
    """

    def __init__(
        self,
        host: str,
        port: int,
        clock: Callable[[], float],
        net: Credentials = PLAIN,
        health_port: int = 0,
        http: HttpOptions | None = None,
        routes: Sequence[BaseRoute] = (),
        keys: Sequence[bytes] | None = None,
    ):
        """Raises UsageError if an address cannot be listened on.

        port: 0 for any free one. health_port: for health alone, without TLS; 0 for none. routes: of
        HTTP, beside those of the API and the live page. keys: SHA-256 digests of the keys of
        gRPC clients; None: the keys of HTTP.
        """
        options = [
            *limits.of_server(),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            # A client that has gone without a word is noticed, and frees what it held.
            *limits.of_silence(KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS),
            # One that is there and asks nothing gives its place to others, and opens another.
            ("grpc.max_connection_idle_ms", IDLE_MS),
        ]
        if keys is None:
            keys = http.keys if http else ()
        logging.getLogger("grpc._cython.cygrpc").addFilter(_NO_TRACE)  # once, however many servers
        checks = [KeyCheck(keys)] if keys else []  # first: before a message is read
        self._grpc = grpc.aio.server(
            interceptors=[*checks, WellFormed()], options=options, maximum_concurrent_rpcs=MAX_CALLS
        )
        self.gate, self._draining = Gate(clock), False
        if http:  # the largest body alone is always taken
            slots = self.gate.slots
            slots.max_bytes = max(slots.max_bytes, http.max_body_bytes)
        Servicer(self.gate).add_to(self._grpc)
        try:  # first: what is wrong with the host is wrong with all the ports
            self.port = net.add_port(self._grpc, host, port)
        except OSError as error:
            raise UsageError(f"--host={host} --port={port}: {error}") from error
        self._health = Health(self._grpc, SERVICE, host, health_port)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)
        self.address = join_address(host, self.port)
        self._live = Live(self.gate)
        self.http = None
        if http:
            app = make_app(self.gate, http, [*self._live.routes(), *routes], host)
            self.http = HttpServer(app, host, http.port, net)

    @property
    def addresses(self) -> str:
        """Where it listens, in words; gRPC last."""
        http = f"HTTP on {self.http.address}, " if self.http else ""
        return f"{http}gRPC on {self.address}"

    async def start(self) -> None:
        """Listens; requests are answered UNAVAILABLE until `open`."""
        await self._health.say(serving=False)
        await self._grpc.start()
        await self._health.listen()
        if self.http:
            await self.http.start()

    async def open(self, backend: Backend) -> None:
        """Serves, until `shut`, and again after; not any more once it drains."""
        if self._draining:
            return
        self.gate.open(backend)
        await self._health.say(serving=True)

    async def shut(self, reason: str) -> None:
        """Answers UNAVAILABLE with this reason; requests in progress go on."""
        if self._draining:
            return
        self.gate.closed = reason
        await self._health.say(serving=False)

    async def drain(self, grace_s: float) -> bool:
        """Takes no new requests, waits for those in progress, and stops listening. After `grace_s`
        seconds it ends those that are left. True if there were none.
        """
        self._draining, self.gate.closed = True, "the server is draining"
        await self._health.say(serving=False)
        drained = True
        if self.gate.slots.num_held:  # a grace of 0 would else never find them given back
            try:
                await asyncio.wait_for(self.gate.slots.idle(), grace_s)
            except TimeoutError:
                drained = False
        self._live.close()
        # The last answers may still be on their way out.
        stops = [self._grpc.stop(grace=1.0 if drained else 0.0)]
        if self.http:
            stops.append(self.http.stop(grace_s=1 if drained else 0))
        await asyncio.gather(*stops)
        await self._health.close()
        return drained
