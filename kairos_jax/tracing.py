"""One trace a request, made when it is over from its stream's own record, for OpenTelemetry.

Its root, "generate", has a child for each part of the way: queue, prefill, transfer, decode. Where
the client is traced, and says so by the W3C headers, the root is a child of the client's span.
Needs the extra `otel`; off unless there is an endpoint.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

from kairos_jax.command import UsageError
from kairos_jax.stream import Stream

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

# Of W3C Trace Context; gRPC has metadata of the same names.
_HEADERS = ("traceparent", "tracestate")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    flags.DEFINE_string(
        "otlp_endpoint",
        None,
        "Where traces go, by OTLP over gRPC, such as http://127.0.0.1:4317; else as "
        "OTEL_EXPORTER_OTLP_ENDPOINT says; without either there are none.",
    )


def trace_of(headers: Iterable[tuple[str, str | bytes]]) -> Mapping[str, str]:
    """What of a request's headers, or metadata, says of which trace it is a part."""
    return {key: value for key, value in headers if key in _HEADERS and isinstance(value, str)}


class Tracing:
    """Makes traces and exports them, on a thread of its own. clock: that of the streams."""

    def __init__(self, provider: "TracerProvider", clock: Callable[[], float] = time.monotonic):
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._clock = provider, clock
        self._tracer = provider.get_tracer("kairos_jax")
        self._context_of = TraceContextTextMapPropagator().extract

    @classmethod
    def from_flags(cls) -> "Tracing | None":
        """None: nothing says where traces are to go. Raises UsageError."""
        endpoint = flags.FLAGS.otlp_endpoint
        if endpoint is None and not any(map(os.environ.get, _ENDPOINTS)):
            return None
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise UsageError(
                f"--otlp_endpoint must begin with http:// or https://, got {endpoint!r}"
            )
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise UsageError(
                f"traces need OpenTelemetry: pip install 'kairos_jax[otel]' ({error})"
            ) from error
        name = os.environ.get("OTEL_SERVICE_NAME", "kairos")
        resource = Resource.create({"service.name": name})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        return cls(provider)

    def ended(self, stream: Stream, outcome: str) -> None:
        """A request is over. outcome: "stop", "length", "cancelled" or "failed"."""
        from opentelemetry import trace

        now = self._clock()
        # The streams' clock counts from anywhere; spans are told in nanoseconds since 1970.
        offset = time.time() - now

        def at(seconds: float) -> int:
            return int((seconds + offset) * 1e9)

        root = self._tracer.start_span(
            "generate",
            self._context_of(stream.trace),
            trace.SpanKind.SERVER,
            _attributes(stream, outcome),
            start_time=at(stream.request.arrival),
        )
        if outcome == "failed":
            root.set_status(trace.StatusCode.ERROR)
        inside = trace.set_span_in_context(root)
        for name, begun, ended in _parts(stream):
            span = self._tracer.start_span(name, inside, start_time=at(begun))
            span.end(at(ended))
        answered = stream.last_token_at if outcome in ("stop", "length") else None
        root.end(at(now if answered is None else answered))

    def flush(self, timeout_s: float = 2.0) -> None:
        """Exports what is not exported yet, for so long at most: its receiver may be gone."""
        thread = threading.Thread(target=self._provider.force_flush, daemon=True)
        thread.start()
        thread.join(timeout_s)


def _parts(stream: Stream) -> Iterator[tuple[str, float, float]]:
    """What is known of its way: name, begin, end."""
    begun, first, last = stream.begun_at, stream.first_token_at, stream.last_token_at
    if begun is None or first is None or last is None:
        return
    yield "queue", stream.request.arrival, begun
    yield "prefill", begun, first
    if stream.moved_at is not None:
        yield "transfer", first, stream.moved_at
    if last > first:
        yield "decode", first, last


def _attributes(stream: Stream, outcome: str) -> dict[str, Any]:
    """By OpenTelemetry's names for generative models, and our own."""
    request = stream.request
    attributes = {
        "gen_ai.response.id": stream.name,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.usage.input_tokens": len(request.prompt),
        "gen_ai.usage.output_tokens": len(stream.tokens),
        "kairos.outcome": outcome,
        "kairos.slo.ttft_s": request.slo.ttft,
        "kairos.slo.tpot_s": request.slo.tpot,
        "kairos.num_lost": stream.num_lost,
    }
    if stream.finish_reason:
        attributes["gen_ai.response.finish_reasons"] = [stream.finish_reason]
    if stream.first_token_at is not None:
        timing = stream.timing()
        attributes |= {
            "kairos.ttft_s": timing.ttft_s,
            "kairos.ttft_met": timing.ttft_met,
            "kairos.tpot_met": timing.tpot_met,
        }
        if timing.tpot_s is not None:
            attributes["kairos.tpot_s"] = timing.tpot_s
    return attributes
