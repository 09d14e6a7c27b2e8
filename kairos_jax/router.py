r"""The router in a process of its own, over prefill and decode workers in other processes.

It has the public gRPC service and the HTTP API.

  kairos router --config=smollm2_135m_cpu --port=50051 \
    --prefill=127.0.0.1:50061 --decode=127.0.0.1:50071,dns:decode.example:50071

It listens at once and answers UNAVAILABLE (health: NOT_SERVING) until there is a worker of each
role, and whenever there is none of one. Several routers may share the same workers. SIGTERM and
Ctrl-C drain it; a second Ctrl-C ends it at once.

Exit codes: 0 after a drain; 1 if it was stopped before it was ready, 130 by Ctrl-C; 2 for a wrong
flag, config or model.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from absl import flags

from kairos_jax.api.backend import Backend
from kairos_jax.api.http import debug, server
from kairos_jax.api.http.server import HttpOptions
from kairos_jax.api.keys import keys_from_flags
from kairos_jax.api.server import Server
from kairos_jax.config import ServerConfig
from kairos_jax.engine.model import open_model
from kairos_jax.net import credentials, health
from kairos_jax.net.credentials import Credentials
from kairos_jax.observe import otlp, request_log
from kairos_jax.observe.metrics import Metrics
from kairos_jax.observe.request_log import RequestLog
from kairos_jax.observe.tracing import Tracing
from kairos_jax.process import command, launch, lifecycle, logs
from kairos_jax.routing import discovery, router
from kairos_jax.routing.links import Links
from kairos_jax.routing.router import Router
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role

_ROLES = (Role.PREFILL, Role.DECODE)
_NO_DEBUG = "a router runs no steps: ask the metrics port of a worker that has --debug_dir"


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    launch.define_config_flag()
    lifecycle.define_flags(port=50051)
    credentials.define_flags()
    credentials.define_public_flags()
    server.define_flags()
    otlp.define_flags()
    health.define_flags()
    router.define_flags()
    logs.define_flags()
    request_log.define_flags()
    for role in _ROLES:
        flags.DEFINE_list(
            role.value, [], f"Where {role.value} workers are: host:port, or dns:name:port for all."
        )
    flags.DEFINE_float("resolve_s", 5.0, "Seconds between two look-ups of dns: names.", 0.1)
    flags.DEFINE_float("heartbeat_s", 0.25, "Seconds between two pings to a worker.", 0.01)
    flags.DEFINE_float(
        "hang_s", 1.0, "Seconds of silence after which a worker counts as lost.", 0.05
    )
    flags.DEFINE_float(
        "rejoin_s", 10.0, "Seconds that requests wait for a worker when a role has none.", 0.0
    )


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """targets: where the workers of each role are, as `discovery.watch` takes it. requests: logs
    them.
    """

    host: str
    port: int
    targets: dict[Role, list[str]]
    grace_s: float = 30.0
    resolve_s: float = 5.0
    heartbeat_s: float = 0.25
    hang_s: float = 1.0
    rejoin_s: float = 10.0
    health_port: int = 0
    admission: str = "none"
    http: HttpOptions | None = None
    tracing: Tracing | None = None
    keys: Sequence[bytes] | None = None
    requests: RequestLog | None = None
    trusts_templates: bool = False

    @classmethod
    def from_flags(cls) -> "RouterOptions":
        """Raises UsageError."""
        values = flags.FLAGS
        targets: dict[Role, list[str]] = {
            role: list(values[role.value].value or ()) for role in _ROLES
        }
        for role, given in targets.items():
            if not given:
                raise command.UsageError(f"--{role.value} is missing: give host:port, ...")
            for target in given:
                try:
                    discovery.Target.parse(target)
                except ValueError as error:
                    raise command.UsageError(f"--{role.value}: {error}") from error
        if values.hang_s < 2 * values.heartbeat_s:
            raise command.UsageError(
                f"--hang_s must be at least twice --heartbeat_s, {values.heartbeat_s:g}, got "
                f"{values.hang_s:g}"
            )
        http = HttpOptions.from_flags()
        return cls(
            values.host,
            values.port,
            targets,
            values.grace_s,
            values.resolve_s,
            values.heartbeat_s,
            values.hang_s,
            values.rejoin_s,
            values.health_port,
            values.admission,
            http,
            Tracing.from_flags(),
            None if http else keys_from_flags(),
            RequestLog.from_flags(),
            values.trust_request_chat_template,
        )


async def serve(
    config: ServerConfig,
    options: RouterOptions,
    net: Credentials,
    public: Credentials = credentials.PLAIN,
) -> int:
    """Serves until a signal. net: to workers; public: from clients. Returns the exit code."""
    stopping = lifecycle.asked_to_stop()
    where = options.host, options.port
    routes = debug.routes(None, _NO_DEBUG)
    health_port, http = options.health_port, options.http
    server = Server(*where, time.monotonic, public, health_port, http, routes, options.keys)
    await server.start()
    print(f"starting router for {config.model}: {server.addresses}", flush=True)
    model = await lifecycle.prepared(
        lambda: open_model(config), stopping, lambda: server.drain(0.0)
    )
    if model is None:
        return stopping.result()
    changed = asyncio.Event()
    # What steps cost, it learns from its workers.
    cost = CostModel.from_profile(_NOTHING, ())
    metrics = Metrics(config.name, config.default_slo)
    router = Router(
        asyncio.get_running_loop(),
        config.max_requests,
        cost,
        admission=options.admission,
        observers=[each for each in (metrics, options.tracing, options.requests) if each],
        rejoin_s=options.rejoin_s,
    )
    metrics.watch(router)
    if options.requests:
        options.requests.watch(router)
    links = Links(router, config, net, changed.set, options.heartbeat_s, options.hang_s)
    tasks = [
        asyncio.ensure_future(_watch(links, role, targets, options.resolve_s))
        for role, targets in options.targets.items()
    ]

    def backend(meshes: tuple[int, int], kind: str) -> Backend:
        trusts = options.trusts_templates
        return Backend.of(config, model, router, metrics, meshes, kind, trusts_templates=trusts)

    keeping = _keep_open(server, config, backend, links, changed, options.rejoin_s)
    tasks.append(asyncio.ensure_future(keeping))
    await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task.done():
            task.result()  # none of them ends but by an error
    print("draining", flush=True)
    tasks[-1].cancel()
    drained = await server.drain(options.grace_s)
    for task in tasks:
        task.cancel()
    await links.close()
    if options.tracing:
        await asyncio.to_thread(otlp.flush, options.tracing.provider)
    print("drained" if drained else "ended requests that outlasted --grace_s", flush=True)
    return 0


_NOTHING = {"kv_capacity_tokens": 1}


async def _watch(links: Links, role: Role, targets: list[str], period_s: float) -> None:
    await discovery.watch(targets, period_s, lambda addresses: links.found(role, addresses))


async def _keep_open(
    server: Server,
    config: ServerConfig,
    backend: Callable[[tuple[int, int], str], Backend],
    links: Links,
    changed: asyncio.Event,
    rejoin_s: float,
) -> None:
    """Opens the server while there is a worker of each role; where a role has none any more, it
    stays open for so long.
    """
    said = False
    while True:
        changed.clear()
        workers = [links.of(role) for role in _ROLES]
        missing = [
            f"a {role.value} worker" for role, of in zip(_ROLES, workers, strict=True) if not of
        ]
        if missing:
            if said:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), rejoin_s)
                    continue
            await server.shut(f"waiting for {' and '.join(missing)}")
        else:
            first, last = (of[0].welcome for of in workers)
            await server.open(backend((first.mesh_size, last.mesh_size), last.device_kind))
            if not said:
                print(_ready_line(config, links, server.addresses), flush=True)
            said = True
        await changed.wait()


def _ready_line(config: ServerConfig, links: Links, addresses: str) -> str:
    counts = " + ".join(f"{len(links.of(role))} {role.value}" for role in _ROLES)
    return (
        f"ready: {config.model} on {counts} workers, SLO TTFT {config.slo.ttft:g} s TPOT "
        f"{config.slo.tpot:g} s; {addresses}"
    )


def main(argv: list[str]) -> None:
    """Serves, and ends the process."""
    logs.set_up("router")
    config, options = launch.read_config(), RouterOptions.from_flags()
    net, public = Credentials.from_flags(), Credentials.public_from_flags()
    for target in itertools.chain(*options.targets.values()):
        net.check_target(discovery.Target.parse(target).address)
    lifecycle.end(asyncio.run(serve(config, options, net, public)))


if __name__ == "__main__":
    define_flags()
    launch.run(main, serves=True)
