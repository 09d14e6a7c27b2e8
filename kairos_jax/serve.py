"""The server: a router and the workers of all instances in one process, on disjoint meshes.

  kairos serve org/name
  kairos serve --config=smollm2_135m_cpu --port=50051

Without --config it makes a config for the model and the devices (kairos_jax/engine/configure.py).
It listens at once and answers UNAVAILABLE (health: NOT_SERVING) until every shape is compiled.
SIGTERM and Ctrl-C drain it; a second Ctrl-C ends it at once.

Exit codes: 0 after a drain; 1 if an instance died, or it was stopped before it was ready, 130 by
Ctrl-C; 2 for a wrong flag, config or model.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from absl import flags

from kairos_jax.api.backend import Backend
from kairos_jax.api.http import debug, server
from kairos_jax.api.http.debug import Debug
from kairos_jax.api.http.server import HttpOptions
from kairos_jax.api.keys import keys_from_flags
from kairos_jax.api.server import Server
from kairos_jax.config import ServerConfig
from kairos_jax.engine import configure, profile_file, profiling
from kairos_jax.engine.build import build_engines
from kairos_jax.engine.devices import start_jax
from kairos_jax.engine.engine import JaxEngine
from kairos_jax.engine.model import Model, open_model
from kairos_jax.kv.transport import LocalTransport
from kairos_jax.net import credentials
from kairos_jax.net.credentials import Credentials
from kairos_jax.observe import otlp, recording, request_log
from kairos_jax.observe.metrics import Metrics
from kairos_jax.observe.request_log import RequestLog
from kairos_jax.observe.tracing import Tracing
from kairos_jax.process import command, launch, lifecycle, logs
from kairos_jax.process.progress import bars
from kairos_jax.routing import router
from kairos_jax.routing.router import Router
from kairos_jax.worker.build import build_workers
from kairos_jax.worker.worker import Worker
from schedulers.cost import CostModel
from schedulers.ledger.journal import Journal

log = logging.getLogger("kairos_jax.serve")  # which is __main__ as a process

# What a step under way is given to end in, once no request is left.
_STOP_TIMEOUT_S = 5.0


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    launch.define_config_flag()
    lifecycle.define_flags(port=50051)
    credentials.define_public_flags()
    server.define_flags()
    otlp.define_flags()
    profile_file.define_flags()
    recording.define_flags()
    debug.define_flags()
    router.define_flags()
    logs.define_flags()
    request_log.define_flags()


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that takes long to get. measured: the profile; cost: what it predicts by."""

    model: Model
    engines: Sequence[JaxEngine]
    measured: dict
    cost: CostModel


def prepare(config: ServerConfig, profile_path: Path | None) -> Prepared:
    """Fetches, loads, compiles and measures. Raises UsageError or ModelNotAvailable."""
    devices = start_jax(config.num_devices, flags.FLAGS.cpu_devices)
    with bars(log.info) as progress:
        model = open_model(config)
        engines = build_engines(config, model, devices, progress)
        measured = profiling.load_or_measure(profile_path, config, model, engines, progress)
    return Prepared(model, engines, measured, CostModel.from_profile(measured))


async def serve(
    config: ServerConfig,
    host: str,
    port: int,
    grace_s: float,
    prepare: Callable[[], Prepared],
    journal: Journal | None = None,
    admission: str = "none",
    public: Credentials = credentials.PLAIN,
    http: HttpOptions | None = None,
    tracing: Tracing | None = None,
    debugging: Debug | None = None,
    keys: Sequence[bytes] | None = None,
    requests: RequestLog | None = None,
    trusts_templates: bool = False,
) -> int:
    """Serves until a signal, or until an instance dies. public: how clients come; keys: which they
    need; trusts_templates: whether they may bring chat templates. debugging: it is told of the
    workers. requests: logs them. Returns the exit code.
    """
    stopping = lifecycle.asked_to_stop()
    routes = debug.routes(debugging, "profiles and traces are off: --debug_dir turns them on")
    server = Server(host, port, time.monotonic, public, http=http, routes=routes, keys=keys)
    await server.start()
    print(f"starting {config.model}: {server.addresses}", flush=True)
    prepared = await lifecycle.prepared(prepare, stopping, lambda: server.drain(0.0))
    if prepared is None:
        return stopping.result()
    cost, loop = prepared.cost, asyncio.get_running_loop()
    metrics = Metrics(config.name, config.default_slo)
    observers = [each for each in (metrics, tracing, requests) if each]
    router = Router(loop, config.max_requests, cost, time.monotonic, admission, observers)
    metrics.watch(router)
    if requests:
        requests.watch(router)
    workers = build_workers(config, prepared.engines, cost, LocalTransport(), router.emit, journal)
    if debugging:
        debugging.workers = workers
    meshes = config.prefill.devices, config.devices(config.roles[-1])
    kind = jax.devices()[0].device_kind
    backend = Backend.of(
        config, prepared.model, router, metrics, meshes, kind, trusts_templates=trusts_templates
    )
    code = await _serve_until(stopping, config, server, grace_s, prepared, backend, workers)
    if debugging:
        debugging.close()
    if tracing:
        await asyncio.to_thread(otlp.flush, tracing.provider)
    return code


async def _serve_until(
    stopping: asyncio.Future,
    config: ServerConfig,
    server: Server,
    grace_s: float,
    prepared: Prepared,
    backend: Backend,
    workers: Sequence[Worker],
) -> int:
    router = backend.router
    router.connect(workers)
    backend.metrics.watch_workers(workers)
    for worker in workers:
        worker.start()
    await server.open(backend)
    print(_ready_line(config, prepared, server.addresses), flush=True)
    await asyncio.wait({router.died, stopping}, return_when=asyncio.FIRST_COMPLETED)
    print("an instance died: ending" if router.died.done() else "draining", flush=True)
    drained = await server.drain(grace_s)
    if router.died.done():
        return 1
    for worker in workers:
        await asyncio.to_thread(worker.stop, _STOP_TIMEOUT_S)
    print("drained" if drained else "ended requests that outlasted --grace_s", flush=True)
    return 0


def _ready_line(config: ServerConfig, prepared: Prepared, addresses: str) -> str:
    measured = prepared.measured
    compiled = sum(engine.num_compiled for engine in prepared.engines)
    return (
        f"ready: {config.model} on {config.layout} {jax.devices()[0].device_kind} devices, "
        f"{config.prefill.policy} + {config.decode.policy}, "
        f"SLO TTFT {config.slo.ttft:g} s TPOT {config.slo.tpot:g} s, "
        f"{compiled} programs compiled, step times {measured.get('source', 'of unknown source')} "
        f"({profiling.fit_line(measured)}); {addresses}"
    )


def main(argv: list[str]) -> None:
    """Serves, and ends the process."""
    logs.set_up("serve")
    config, public = configure.read_config(), Credentials.public_from_flags()
    values, http, traced = flags.FLAGS, HttpOptions.from_flags(), Tracing.from_flags()
    path = Path(values.profile) if values.profile else None
    debugging = Debug.from_flags()
    if debugging and http is None:
        raise command.UsageError("--debug_dir needs the HTTP API, which --http_port=-1 turns off")
    with recording.from_flags(debugging and debugging.watch) as journal:
        where = values.host, values.port
        code = asyncio.run(
            serve(
                config,
                *where,
                values.grace_s,
                lambda: prepare(config, path),
                journal,
                values.admission,
                public,
                http,
                traced,
                debugging,
                None if http else keys_from_flags(),
                RequestLog.from_flags(),
                values.trust_request_chat_template,
            )
        )
    lifecycle.end(code)


if __name__ == "__main__":
    define_flags()
    launch.run(main, serves=True)
