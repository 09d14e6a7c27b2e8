"""One trace a request, for OpenTelemetry, made from its stream's own record.

Its root, "generate", begins with the request; when that is over it gets a child for each part of
the way: queue, prefill, transfer, decode. Where the client is traced, and says so by the W3C
headers, the root is a child of the client's span. Workers are told of the root, and add spans of
their own to it (`worker_spans.py`).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kairos_jax.observe import otlp
from kairos_jax.routing.observer import Observer
from kairos_jax.routing.stream import Stream

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

# Of W3C Trace Context; gRPC has metadata of the same names.
_HEADERS = ("traceparent", "tracestate")


def trace_of(headers: Iterable[tuple[str, str | bytes]]) -> Mapping[str, str]:
    """What of a request's headers, or metadata, says of which trace it is a part."""
    return {key: value for key, value in headers if key in _HEADERS and isinstance(value, str)}


class Tracing(Observer):
    """Makes the traces of one router. provider: exports them. clock: that of the streams."""

    def __init__(self, provider: "TracerProvider", clock: Callable[[], float] = time.monotonic):
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider, self._clock = provider, clock
        self._tracer = provider.get_tracer("kairos_jax")
        self._headers = TraceContextTextMapPropagator()

    @classmethod
    def from_flags(cls) -> "Tracing | None":
        """None: nothing says where traces are to go. Raises UsageError."""
        provider = otlp.from_flags("kairos")
        return None if provider is None else cls(provider)

    def begun(self, stream: Stream) -> None:
        """A request was taken: from now on its trace is told as one of which its root is a part."""
        from opentelemetry import trace

        arrived_s = self._clock() - stream.request.arrival
        stream.span = self._tracer.start_span(
            "generate",
            self._headers.extract(stream.trace),
            trace.SpanKind.SERVER,
            start_time=time.time_ns() - int(arrived_s * 1e9),
        )
        told: dict[str, str] = {}
        self._headers.inject(told, trace.set_span_in_context(stream.span))
        stream.trace = told

    def ended(self, stream: Stream, outcome: str) -> None:
        """A request is over. outcome: "stop", "length", "cancelled" or "failed"."""
        from opentelemetry import trace

        root = stream.span
        if root is None or not root.is_recording():
            return

        def at(seconds: float) -> int:
            """In nanoseconds since 1970, of the streams' clock, which counts from anywhere."""
            return root.start_time + int((seconds - stream.request.arrival) * 1e9)

        root.set_attributes(_attributes(stream, outcome))
        if outcome == "failed":
            root.set_status(trace.StatusCode.ERROR)
        inside = trace.set_span_in_context(root)
        for name, begun, ended in _parts(stream):
            span = self._tracer.start_span(name, inside, start_time=at(begun))
            span.end(at(ended))
        answered = stream.last_token_at if outcome in ("stop", "length") else None
        root.end(at(self._clock() if answered is None else answered))


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
