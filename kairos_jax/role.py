"""What the binaries of one role are: one instance, its worker, and the service that routers attach
to.

It listens at once and answers UNAVAILABLE (health: NOT_SERVING) until every shape is compiled.
SIGTERM and Ctrl-C drain it: what waits goes back to the routers, what runs goes on for --grace_s,
and then goes back too. A second Ctrl-C ends it at once. SIGUSR1 has it print what it holds, as one
line of JSON after "state: ".

Exit codes: 0 after a drain; 1 if the instance died, or it was stopped before it was ready, 130 by
Ctrl-C; 2 for a wrong flag, config or model.
"""

import asyncio
import functools
import json
import logging
import math
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from absl import flags

from kairos_jax.api.http import debug
from kairos_jax.api.http.debug import Debug
from kairos_jax.config import ConfigError, ServerConfig
from kairos_jax.engine import followers, profile_file, profiling
from kairos_jax.engine.build import build_engine, load_weights, open_programs, warm_up
from kairos_jax.engine.devices import agree, define_distributed_flags, start_distributed, start_jax
from kairos_jax.engine.model import open_model
from kairos_jax.kv import options as kv_options
from kairos_jax.kv.manifest import facts
from kairos_jax.kv.options import TransferOptions
from kairos_jax.kv.remote import RemoteTransport
from kairos_jax.net import address, credentials, health
from kairos_jax.net.credentials import Credentials
from kairos_jax.observe import metrics_port, otlp, recording
from kairos_jax.observe.request_log import WorkerLog, every_period
from kairos_jax.observe.worker_spans import WorkerSpans
from kairos_jax.process import command, launch, lifecycle, logs
from kairos_jax.process.hub import ModelNotAvailable
from kairos_jax.process.progress import bars
from kairos_jax.worker.build import build_worker
from kairos_jax.worker.messages import Cancel
from kairos_jax.worker.server import PreparedRole, RoleOptions, RoleServer
from kairos_jax.worker.status import status_of
from kairos_jax.worker.worker import Worker
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role
from schedulers.ledger.journal import Journal

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

# What a step under way is given to end in.
_STOP_TIMEOUT_S = 5.0


def define_flags(port: int) -> None:
    """Not at import: other binaries have flags of the same names."""
    launch.define_config_flag()
    define_distributed_flags()
    lifecycle.define_flags(port)
    credentials.define_flags()
    kv_options.define_flags()
    health.define_flags()
    profile_file.define_flags()
    recording.define_flags()
    debug.define_flags()
    otlp.define_flags()
    logs.define_flags()
    flags.DEFINE_string("name", None, "Name of the instance; default: its role and address.")
    flags.DEFINE_string("advertise", None, "Host name under which peers reach it; default: --host.")
    flags.DEFINE_integer("metrics_port", 0, "Port of http://HOST/metrics; 0: none.", 0, 65535)
    flags.DEFINE_float(
        "router_hang_s", 10.0, "Seconds of silence after which a router is dropped.", 0.1
    )
    flags.DEFINE_float(
        "link_s",
        5.0,
        "Seconds for which health waits for a router to link before it is ready.",
        0.0,
    )
    flags.DEFINE_float(
        "stuck_s", 30.0, "Seconds beyond its prediction after which a step counts as hung.", 0.1
    )


def prepare(config: ServerConfig, role: Role, profile_path: Path | None) -> PreparedRole:
    """Loads, compiles and measures one instance; a process that follows another of its mesh ends
    here. Raises UsageError or ModelNotAvailable.
    """
    processes = start_distributed()
    devices = start_jax(config.devices(role), flags.FLAGS.cpu_devices, processes)
    if processes.several:  # before anything that may take one of them longer than another
        common = {"jax": jax.__version__, "role": role.value}
        agree(processes, common | {"config": asdict(config) | {"model": config.name}})
    with bars(log.info) as progress:
        model = open_model(config)
        does = config.role(role)
        programs = open_programs(config, model, [does], devices)
        weights = load_weights(config, model, role.value, devices, progress)
        engine = build_engine(config, model, does, devices, weights, programs=programs)
        if not processes.leads:
            followers.follow(engine, processes)
            lifecycle.end(0)
        leader = followers.lead(engine, processes) if processes.several else None
        description = model.checkpoint.config
        known = facts(config.name, description, weights, config.dtype, config.page_size)
        del weights  # the engine may have them in another form
        warm_up(engine, role.value, progress)
        measured = profiling.load_or_measure(profile_path, config, model, [engine], progress)
    return PreparedRole(engine, known, measured, len(devices), devices[0].device_kind, leader)


async def serve(
    config: ServerConfig,
    role: Role,
    options: RoleOptions,
    net: Credentials,
    carried: TransferOptions,
    prepare: Callable[[], PreparedRole],
    journal: Journal | None = None,
    debugging: Debug | None = None,
    traces: "TracerProvider | None" = None,
) -> int:
    """Serves until a signal, or until the instance dies. debugging: answers beside metrics. traces:
    exports the worker's spans. Returns the exit code.
    """
    stopping = lifecycle.asked_to_stop()
    workers: list[Worker] = []
    server = RoleServer(role, options, net)
    if traces:
        server.service.spans = WorkerSpans(traces, role, server.name)
    if options.metrics_port:
        port = metrics_port.serve_workers(options.host, options.metrics_port, workers)
        if debugging:
            debugging.workers = workers
            debug.answer_beside(port, debugging)
    if carried.kind == "jax":
        _check_kv_host(carried.listens_on(server.address))
    await server.start()
    print(f"starting {role.value} of {config.model}: gRPC on {server.address}", flush=True)
    prepared = await lifecycle.prepared(prepare, stopping, server.close)
    if prepared is None:
        return stopping.result()
    engine, emit = prepared.engine, server.service.emit
    transport = RemoteTransport(
        prepared.facts,
        server.address,
        asyncio.get_running_loop(),
        net.channel,
        net.metadata,
        carried,
        on_expired=lambda id: worker.post(Cancel(id)),
    )
    server.add_late(transport.add_to)
    cost = CostModel.from_profile(prepared.measured, config.role(role).jobs)
    worker = build_worker(config, role, server.name, engine, cost, transport, emit, journal)
    workers.append(worker)
    await server.open(worker, config, prepared)
    asyncio.get_running_loop().add_signal_handler(
        signal.SIGUSR1, _print_state, server, worker, transport
    )
    print(_ready_line(config, server, prepared), flush=True)
    lines = WorkerLog(functools.partial(status_of, worker.instance, worker.ran))
    telling = asyncio.ensure_future(every_period(lines.tell_interval))
    died = server.service.died
    await asyncio.wait({died, stopping}, return_when=asyncio.FIRST_COMPLETED)
    print("the instance died: ending" if died.done() else "draining", flush=True)
    drained = not died.done() and await server.drain(worker)
    telling.cancel()
    await server.close()
    if traces:
        await asyncio.to_thread(otlp.flush, traces)
    if died.done():
        return 1
    await asyncio.to_thread(worker.stop, _STOP_TIMEOUT_S)
    transport.close()
    if prepared.leader:
        await asyncio.to_thread(prepared.leader.close)
    print("drained" if drained else "handed over what outlasted --grace_s", flush=True)
    return 0


def _check_kv_host(host: str) -> None:
    """Whether the transfer server will be able to listen there, which it does only when all is
    compiled. Raises UsageError.
    """
    try:
        address.listen(host, 0).close()
    except OSError as error:
        raise command.UsageError(f"--kv_host={host}: {error}") from error


def _print_state(server: RoleServer, worker: Worker, transport: RemoteTransport) -> None:
    """As it is while the worker's own thread goes on: in the midst of a step, not to the last."""
    ledger = worker.instance
    state = {
        "pages": ledger.limits.num_pages,
        "pages_free": ledger.pages.num_free,
        "waiting": len(ledger.waiting),
        "running": len(ledger.running) + len(ledger.ending),
        "parked": len(ledger.parked),
        "offers": transport.num_offers,
        "fetches": transport.num_fetches,
        "requests": server.service.num_requests,
        "routers": server.service.num_routers,
    }
    print(f"state: {json.dumps(state)}", flush=True)


def _ready_line(config: ServerConfig, server: RoleServer, prepared: PreparedRole) -> str:
    policy = config.prefill.policy if server.role is Role.PREFILL else config.decode.policy
    measured = prepared.measured
    return (
        f"ready: {server.name}, {config.model} on {prepared.mesh_size} {prepared.device_kind} "
        f"devices, {policy}, step times {measured.get('source', 'of unknown source')} "
        f"({profiling.fit_line(measured)}); gRPC on {server.address}"
    )


def main(role: Role) -> None:
    """Serves one instance of a role, and ends the process: at once, since at a normal exit JAX
    waits for the other processes of a mesh.
    """
    logs.set_up(role.value)
    try:
        code = _run(role)
    except (ConfigError, ModelNotAvailable, command.UsageError) as error:
        code = command.fail(error)
    except Exception:
        log.exception("this process ends")
        code = 1
    lifecycle.end(code)


def _run(role: Role) -> int:
    """Returns the exit code. Raises ConfigError, ModelNotAvailable or UsageError."""
    config, options, net = launch.read_config(), RoleOptions.from_flags(), Credentials.from_flags()
    if config.colocated:
        raise command.UsageError(f"config.colocated must be False for a process of {role.value}")
    values, traces = flags.FLAGS, otlp.from_flags(f"kairos-{role.value}")
    path = Path(values.profile) if values.profile else None
    if values.process_id > 0:  # it follows, and has no service of its own
        prepare(config, role, path)
    carried = TransferOptions.from_flags(options.host)
    if role is Role.DECODE or config.fluid:
        # What it offers are its own evicted sequences, which nobody else would fetch.
        carried = replace(carried, lease_s=math.inf)
    if carried.kind == "jax" and net.cert:
        log.warning("--tls_cert does not protect KV: --kv_transport=jax sends it in the clear")

    debugging = Debug.from_flags()
    if debugging and not options.metrics_port:
        raise command.UsageError("--debug_dir needs --metrics_port, where it is answered")
    with recording.from_flags(debugging and debugging.watch) as journal:
        ready = functools.partial(prepare, config, role, path)
        process = serve(config, role, options, net, carried, ready, journal, debugging, traces)
        return asyncio.run(process)
