"""The server: a router and the workers of all instances in one process, on disjoint meshes.

  python -m kairos_jax.serve --config=configs/smollm2_135m_cpu.py --port=50051

It listens at once and answers UNAVAILABLE (health: NOT_SERVING) until every shape is compiled.
SIGTERM and Ctrl-C drain it; a second Ctrl-C ends it at once.

Exit codes: 0 after a drain; 1 if an instance died, or it was stopped before it was ready; 2 for a
wrong flag, config or model.
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from absl import flags

from kairos_jax import channels, http_server, launch, lifecycle, profile, tracing
from kairos_jax.backend import backend
from kairos_jax.channels import Wire
from kairos_jax.config import ServerConfig
from kairos_jax.engine import JaxEngine
from kairos_jax.http_server import HttpOptions
from kairos_jax.instances import Model, build_engines, build_workers, open_model
from kairos_jax.metrics import Metrics
from kairos_jax.progress import bars
from kairos_jax.recording import recording
from kairos_jax.service import Server
from kairos_jax.streams import Router
from kairos_jax.tracing import Tracing
from kairos_jax.transfer import LocalTransport
from schedulers.cost import CostModel
from schedulers.journal import Journal
from schedulers.routing import ADMISSION

# What a step under way is given to end in, once no request is left.
_STOP_TIMEOUT_S = 5.0


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    launch.define_config_flag()
    lifecycle.define_flags(port=50051)
    channels.define_public_flags()
    http_server.define_flags()
    tracing.define_flags()
    flags.DEFINE_string("profile", None, "Profile to schedule by; else one of its own, kept.")
    flags.DEFINE_string("journal", None, "File for a record of every decision, as JSON lines.")
    flags.DEFINE_enum("admission", "none", list(ADMISSION), "Who is turned away early.")


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that takes long to get. measured: the profile; cost: what it predicts by."""

    model: Model
    engines: Sequence[JaxEngine]
    measured: dict
    cost: CostModel


def prepare(config: ServerConfig, profile_path: Path | None) -> Prepared:
    """Fetches, loads, compiles and measures. Raises UsageError or ModelNotAvailable."""
    devices = launch.start_jax(config.num_devices, flags.FLAGS.cpu_devices)
    with bars() as progress:
        model = open_model(config)
        engines = build_engines(config, model, devices, progress)
        measured = profile.load_or_measure(profile_path, config, model, engines, progress)
    return Prepared(model, engines, measured, CostModel.from_profile(measured))


async def serve(
    config: ServerConfig,
    host: str,
    port: int,
    grace_s: float,
    prepare: Callable[[], Prepared],
    journal: Journal | None = None,
    admission: str = "none",
    public: Wire = channels.PLAIN,
    http: HttpOptions | None = None,
    tracing: Tracing | None = None,
) -> int:
    """Serves until a signal, or until an instance dies. public: how clients come. Returns the exit
    code.
    """
    stopping = lifecycle.asked_to_stop()
    try:
        server = Server(host, port, time.monotonic, public, http=http)
    except OSError as error:
        raise launch.UsageError(str(error)) from error
    await server.start()
    print(f"starting {config.model}: {server.addresses}", flush=True)
    prepared = await lifecycle.prepared(prepare, stopping, lambda: server.drain(0.0))
    if prepared is None:
        return 1
    cost, loop = prepared.cost, asyncio.get_running_loop()
    metrics = Metrics(Path(config.model).name, config.default_slo)
    router = Router(loop, config.max_requests, cost, time.monotonic, admission, metrics, tracing)
    code = await _serve_until(stopping, config, server, grace_s, prepared, router, journal)
    if tracing:
        await asyncio.to_thread(tracing.flush)
    return code


async def _serve_until(
    stopping: asyncio.Future,
    config: ServerConfig,
    server: Server,
    grace_s: float,
    prepared: Prepared,
    router: Router,
    journal: Journal | None,
) -> int:
    engines, cost = prepared.engines, prepared.cost
    workers = build_workers(config, engines, cost, LocalTransport(), router.emit, journal)
    router.connect(workers)
    for worker in workers:
        worker.start()
    meshes = config.prefill.devices, config.devices(config.roles[-1])
    kind = jax.devices()[0].device_kind
    await server.open(backend(config, prepared.model, router, meshes, kind))
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
        f"({profile.fit_line(measured)}); {addresses}"
    )


def main(argv: list[str]) -> None:
    """Serves, and ends the process."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    config, public = launch.read_config(), Wire.public_from_flags()
    values, http, traced = flags.FLAGS, HttpOptions.from_flags(), Tracing.from_flags()
    path = Path(values.profile) if values.profile else None
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(recording(Path(values.journal))) if values.journal else None
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
            )
        )
    lifecycle.end(code)


if __name__ == "__main__":
    define_flags()
    launch.run(main)
