"""The metrics port of a process of workers."""

from collections.abc import Sequence
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

from kairos_jax.net.address import join_address
from kairos_jax.observe.collectors import WorkerGauges
from kairos_jax.process.command import UsageError
from kairos_jax.worker.worker import Worker

# Connections at once, and for how long one may say nothing, or not read on.
_MOST, _SILENCE_S = 16, 10.0


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
    _bound(server)
    return server


def _bound(server: WSGIServer) -> None:
    """Each connection has a thread, and would keep it for as long as it says nothing."""
    bounds: Any = server
    handler = bounds.RequestHandlerClass
    bounds.RequestHandlerClass = type("Handler", (handler,), {"timeout": _SILENCE_S})
    begin, end = server.process_request, server.shutdown_request
    opened: set[Any] = set()

    def process_request(request: Any, address: Any) -> None:
        opened.add(request)
        begin(request, address)

    def shutdown_request(request: Any) -> None:
        opened.discard(request)
        end(request)

    bounds.verify_request = lambda request, address: len(opened) < _MOST
    bounds.process_request, bounds.shutdown_request = process_request, shutdown_request
