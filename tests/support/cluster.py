"""Workers with fake engines behind servers of their own, and routers linked to them."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import fakes

from kairos_jax.config import ServerConfig
from kairos_jax.kv.manifest import Facts
from kairos_jax.kv.transport import LocalTransport
from kairos_jax.net.credentials import Credentials
from kairos_jax.routing.links import Links
from kairos_jax.routing.router import Router
from kairos_jax.routing.stream import Stream
from kairos_jax.worker.build import build_worker
from kairos_jax.worker.server import PreparedRole, RoleOptions, RoleServer
from kairos_jax.worker.worker import Worker
from schedulers.cost import CostModel
from schedulers.ledger.instance import Limits, Role
from schedulers.ledger.request import Request

PLAIN = Credentials()
FACTS = Facts("fake", "f00d", "float32", 8, (), 32)
HOST = "127.0.0.1"


class Engine(fakes.FakeEngine):
    """Tells when a step has begun."""

    def __init__(self, limits: Limits):
        super().__init__(limits)
        self.begun = threading.Semaphore(0)

    def step(self, work):
        self.begun.release()
        return super().step(work)


@dataclass
class Node:
    """One worker, as a process of its own would have it."""

    server: RoleServer
    worker: Worker
    engine: Engine

    @classmethod
    async def start(
        cls,
        role: Role,
        transport: LocalTransport,
        config: ServerConfig = fakes.CONFIG,
        facts: Facts = FACTS,
        net: Credentials = PLAIN,
        options: RoleOptions | None = None,
    ) -> "Node":
        server = RoleServer(role, options or RoleOptions(HOST, 0, HOST), net)
        engine = Engine(config.limits(role))
        prepared = PreparedRole(engine, facts, fakes.PROFILE, 1, "fake")
        cost = CostModel.from_profile(fakes.PROFILE, (role.value,))
        emit = server.service.emit
        worker = build_worker(config, role, server.name, engine, cost, transport, emit)
        await server.start()
        await server.open(worker, config, prepared)
        return cls(server, worker, engine)

    @property
    def num_held(self) -> int:
        """Requests of which this worker knows anything."""
        ledger = self.worker.instance
        return len(ledger.waiting) + len(ledger.running) + len(ledger.parked)

    async def begun(self) -> None:
        """Returns when it is in a step."""
        assert await asyncio.to_thread(self.engine.begun.acquire, timeout=30)

    async def die(self) -> None:
        """As by kill -9: connections end, nothing is said."""
        self.engine.gate.set()
        await self.server.grpc.stop(None)
        await asyncio.to_thread(self.worker.stop)

    async def again(self, transport: LocalTransport) -> "Node":
        """Another start at the same address."""
        port = int(self.server.address.rpartition(":")[2])
        options = replace(self.server.options, port=port)
        return await Node.start(self.server.role, transport, options=options)


@dataclass
class Front:
    """A router and its links. seen: called with each change of its workers."""

    router: Router
    links: Links
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def start(
        cls,
        nodes: list[Node],
        config: ServerConfig = fakes.CONFIG,
        net: Credentials = PLAIN,
        hang_s: float = 5.0,
        rejoin_s: float = 0.0,
    ) -> "Front":
        loop = asyncio.get_running_loop()
        cost = CostModel.from_profile({"kv_capacity_tokens": 1}, ())
        router, changed = Router(loop, 1000, cost, rejoin_s=rejoin_s), asyncio.Event()
        links = Links(router, config, net, changed.set, min(0.1, hang_s / 4), hang_s)
        front = cls(router, links, changed)
        for role in (Role.PREFILL, Role.DECODE):
            addresses = [n.server.address for n in nodes if n.server.role is role]
            links.found(role, frozenset(addresses))
        return front

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns when the workers it has are so."""
        async with asyncio.timeout(30):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def linked(self, count: int) -> None:
        """Returns when so many workers take requests."""
        await self.until(lambda: len(self.links.workers) == count)

    async def ask(self, prompt: list[int], max_tokens: int) -> list[int]:
        return await read(self.submit(prompt, max_tokens))

    def submit(self, prompt: list[int], max_tokens: int, **fields) -> Stream:
        slo, now = fakes.CONFIG.default_slo, time.monotonic()
        return self.router.submit(Request("", now, prompt, max_tokens, slo, **fields))


async def read(stream: Stream) -> list[int]:
    """All its tokens."""
    return [output.token.id async for output in stream]


@contextlib.asynccontextmanager
async def running(
    num_prefill: int = 1, num_decode: int = 1, hang_s: float = 5.0
) -> AsyncIterator[tuple[list[Node], Front, LocalTransport]]:
    """Workers, those that prefill before those that decode, and a router with a link to each."""
    transport = LocalTransport()
    roles = [Role.PREFILL] * num_prefill + [Role.DECODE] * num_decode
    nodes = [await Node.start(role, transport) for role in roles]
    front = Front.start(nodes, hang_s=hang_s)
    try:
        await front.linked(len(nodes))
        yield nodes, front, transport
    finally:
        await front.links.close()
        for node in nodes:
            await node.die()
        transport.close()


async def idle(node: Node) -> None:
    """Returns when no router has a request there, and the worker has none either. Checks it."""
    async with asyncio.timeout(30):
        await node.server.service.drained()
        while node.num_held:  # its thread is about to read the last message
            await asyncio.sleep(0)
    ledger = node.worker.instance
    ledger.check()
    assert ledger.pages.num_free == ledger.limits.num_pages
