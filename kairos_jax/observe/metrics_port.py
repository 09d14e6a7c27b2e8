"""The metrics port of a process of workers."""

from collections.abc import Sequence
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

from kairos_jax.net.address import join_address
from kairos_jax.observe.collectors import WorkerGauges
from kairos_jax.process.command import UsageError
from kairos_jax.worker.worker import Worker


def serve_workers(host: str, port: int, workers: Sequence[Worker]) -> WSGIServer:
    """Answers `GET /metrics` with the metrics of workers, on a thread of its own, which does not
    keep the process alive. Raises UsageError if the port cannot be listened on.

    port: 0 for any free one. workers: as they are when somebody asks.
    """
    registry = CollectorRegistry()
    registry.register(WorkerGauges(workers))
    ProcessCollector(registry=registry)
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        where, reason = join_address(host, port), error.strerror
        raise UsageError(f"--metrics_port={port}: cannot listen on {where}: {reason}") from error
    return server
