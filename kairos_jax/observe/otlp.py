"""Where a process's spans go: to a collector, by OTLP over gRPC. Needs the extra `otel`; off unless
there is an endpoint.
"""

import os
import threading
from typing import TYPE_CHECKING

from absl import flags

from kairos_jax.process.command import UsageError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    flags.DEFINE_string(
        "otlp_endpoint",
        None,
        "Where traces go, by OTLP over gRPC, such as http://127.0.0.1:4317; else as "
        "OTEL_EXPORTER_OTLP_ENDPOINT says; without either there are none.",
    )


def from_flags(service: str) -> "TracerProvider | None":
    """What makes spans and exports them, on a thread of its own. service: the process's name, where
    OTEL_SERVICE_NAME says no other. None: nothing says where they are to go. Raises UsageError.
    """
    endpoint = flags.FLAGS.otlp_endpoint
    if endpoint is None and not any(map(os.environ.get, _ENDPOINTS)):
        return None
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise UsageError(f"--otlp_endpoint must begin with http:// or https://, got {endpoint!r}")
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UsageError(
            f"traces need OpenTelemetry: pip install 'kairos_jax[otel]' ({error})"
        ) from error
    name = os.environ.get("OTEL_SERVICE_NAME", service)
    provider = TracerProvider(
        resource=Resource.create({"service.name": name}), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    return provider


def flush(provider: "TracerProvider", timeout_s: float = 2.0) -> None:
    """Exports what is not exported yet, for so long at most: its receiver may be gone."""
    thread = threading.Thread(target=provider.force_flush, daemon=True)
    thread.start()
    thread.join(timeout_s)
