"""The gRPC server of a process of one role: what routers attach to, and health."""

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from absl import flags

from kairos_jax.config import ServerConfig
from kairos_jax.engine.engine import Engine
from kairos_jax.engine.followers import Leader
from kairos_jax.kv.manifest import Facts
from kairos_jax.net import limits
from kairos_jax.net.address import is_wildcard, join_address
from kairos_jax.net.credentials import Credentials
from kairos_jax.net.health import Health
from kairos_jax.process.command import UsageError
from kairos_jax.rpc import internal_pb2_grpc
from kairos_jax.worker import codec
from kairos_jax.worker.messages import HandBack, Welcome
from kairos_jax.worker.service import WorkerService
from kairos_jax.worker.worker import Worker
from schedulers.ledger.instance import Role

log = logging.getLogger(__name__)

# What routers are given to take back what has not ended by itself.
_RETURN_S = 5.0


@dataclass(frozen=True, slots=True)
class PreparedRole:
    """All that takes long to get. facts: of its KV; measured: its profile. leader: of a mesh that
    spans processes.
    """

    engine: Engine
    facts: Facts
    measured: dict[str, Any]
    mesh_size: int
    device_kind: str
    leader: Leader | None = None


@dataclass(frozen=True, slots=True)
class RoleOptions:
    """Where a role listens, and how it ends. host, port: as bound. advertise: the host by which
    peers reach it. health_port, metrics_port: 0 for none. link_s: how long health waits for a
    router to link.
    """

    host: str
    port: int
    advertise: str
    name: str = ""
    health_port: int = 0
    grace_s: float = 30.0
    router_hang_s: float = 10.0
    stuck_s: float = 30.0
    metrics_port: int = 0
    link_s: float = 5.0

    @classmethod
    def from_flags(cls) -> "RoleOptions":
        """Raises UsageError where peers would be told an address that is none."""
        values = flags.FLAGS
        advertise = values.advertise or values.host
        if is_wildcard(advertise):
            raise UsageError(f"--advertise is missing: peers cannot reach this host as {advertise}")
        return cls(
            values.host,
            values.port,
            advertise,
            values.name or "",
            values.health_port,
            values.grace_s,
            values.router_hang_s,
            values.stuck_s,
            values.metrics_port,
            values.link_s,
        )


class RoleServer:
    """The gRPC server of one role. Health says NOT_SERVING until `open`, and again from `drain`."""

    def __init__(self, role: Role, options: RoleOptions, net: Credentials):
        """Raises UsageError if an address cannot be listened on."""
        self.role, self.options = role, options
        self.service = WorkerService(
            asyncio.get_running_loop(), options.stuck_s, options.router_hang_s
        )
        self.grpc = grpc.aio.server(
            interceptors=net.interceptors(),
            options=[
                ("grpc.max_receive_message_length", codec.MAX_MESSAGE_BYTES),
                *limits.of_server(),
                # A peer that hangs is noticed: what it had claimed is not held for it for ever.
                *limits.of_silence(10_000, 10_000),
            ],
        )
        internal_pb2_grpc.add_WorkerServicer_to_server(self.service, self.grpc)
        host, port = options.host, options.port
        try:  # first: what is wrong with the host is wrong with all the ports
            port = net.add_port(self.grpc, host, port)
        except OSError as error:
            raise UsageError(f"--host={host} --port={port}: {error}") from error
        self._health = Health(self.grpc, codec.SERVICE, host, options.health_port)
        self.address = join_address(options.advertise, port)
        self.name = options.name or f"{role.value}-{self.address}"

    def add_late(self, add: Callable[[Any], None]) -> None:
        """Adds a service, by its `add_to`, to the server that has started."""
        add(_Late(self.grpc))

    async def start(self) -> None:
        """Listens; routers are answered UNAVAILABLE until `open`."""
        await self._health.say(serving=False)
        await self.grpc.start()
        await self._health.listen()

    async def open(self, worker: Worker, config: ServerConfig, prepared: PreparedRole) -> None:
        """Starts the worker, and takes routers for it."""
        welcome = Welcome(
            instance=self.name,
            incarnation=secrets.token_hex(8),
            role=self.role,
            model=prepared.facts.model,
            fingerprint=prepared.facts.fingerprint,
            dtype=config.dtype,
            limits=prepared.engine.limits,
            profile=prepared.measured,
            mesh_size=prepared.mesh_size,
            device_kind=prepared.device_kind,
            kv_address=self.address,
            prefix_cache=worker.page_keys is not None,
            version=codec.VERSION,
            fluid=config.fluid,
        )
        self.service.open(worker, welcome)
        worker.start()
        self._readying = asyncio.ensure_future(self._serve_once_linked())

    async def _serve_once_linked(self) -> None:
        """Health says SERVING when a router has linked: a rolling restart that goes by it would
        else go on to the next worker while no router knows of this one.
        """
        try:
            await asyncio.wait_for(self.service.linked.wait(), self.options.link_s)
        except TimeoutError:
            log.warning("no router has linked within %g s: ready without", self.options.link_s)
        if not self.service.draining:
            await self._health.say(serving=True)

    async def drain(self, worker: Worker) -> bool:
        """Gives back what waits, lets the rest end, and after the grace gives that back too. True
        if nothing outlasted it.
        """
        await self._health.say(serving=False)
        self.service.drain()
        worker.post(HandBack(running=False))
        if await self._drained(self.options.grace_s):
            return True
        worker.post(HandBack(running=True))
        await self._drained(_RETURN_S)
        return False

    async def close(self) -> None:
        """Ends the routers' calls, each once it has been told all, and stops listening."""
        self.service.close()
        await self.grpc.stop(grace=1.0)
        await self._health.close()

    async def _drained(self, timeout_s: float) -> bool:
        """Whether no router has a request here in time; where the worker died, none will have."""
        drained = asyncio.ensure_future(self.service.drained())
        await asyncio.wait(
            {drained, self.service.died}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        done = drained.done()
        drained.cancel()
        return done


class _Late:
    """A server that has started, as an argument of `add_..._to_server`. What generated code
    registers besides its generic handler is not looked up any more then, and gRPC warns of it.
    """

    def __init__(self, server: grpc.aio.Server):
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Does without."""
