"""What a worker adds to the trace of a request, for OpenTelemetry: a span under the router's root,
with a child for each part of what it did. Made from what goes in and out, beside the step loop.

"prefill worker": from when the request came until its first token; queue, compute. "decode worker":
from when it came until its last token; queue, transfer, compute.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kairos_jax.worker.messages import (
    Event,
    Failed,
    Handover,
    Lost,
    Moved,
    Output,
    Returned,
    Stepped,
    Submit,
)
from schedulers.ledger.instance import Role

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


@dataclass(slots=True)
class _Open:
    """A request here. came_at: on the worker's clock. moving: from when to when its KV came."""

    span: Any
    came_at: float
    moving: tuple[float, float] | None = None
    begun_at: float | None = None

    def at(self, seconds: float) -> int:
        """In nanoseconds since 1970, of a time on the worker's clock."""
        return self.span.start_time + int((seconds - self.came_at) * 1e9)


class WorkerSpans:
    """The spans of one worker. instance: its name. clock: that of its events."""

    def __init__(
        self,
        provider: "TracerProvider",
        role: Role,
        instance: str,
        clock: Callable[[], float] = time.monotonic,
    ):
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._clock = clock
        self._name, self._instance = f"{role.value} worker", instance
        self._tracer = provider.get_tracer("kairos_jax")
        self._context_of = TraceContextTextMapPropagator().extract
        self._open: dict[str, _Open] = {}

    def took(self, message: Submit | Handover) -> None:
        """A request has come. One that is no part of a trace gets no span."""
        from opentelemetry import trace

        if not message.trace:
            return
        request, above = message.request, self._context_of(message.trace)
        if not trace.get_current_span(above).get_span_context().is_valid:
            return  # the headers are the client's own, and are none
        span = self._tracer.start_span(
            self._name,
            above,
            trace.SpanKind.SERVER,
            {"kairos.instance": self._instance, "kairos.request": request.id},
        )
        if span.is_recording():
            self._open[request.id] = _Open(span, self._clock())

    def said(self, event: Event) -> None:
        """What the worker has told of its requests."""
        match event:
            case Stepped(outputs):
                if self._open:
                    for output in outputs:
                        self._output(output)
            case Moved(id, at, float(asked_at)) if open := self._open.get(id):
                open.moving = asked_at, at
            case Returned(id):
                self._end(id, self._clock(), {"kairos.outcome": "handed_back"})
            case Lost(id, error):
                self._end(id, self._clock(), {"kairos.outcome": "lost"}, str(error))
            case Failed(id, _, error):
                self._end(id, self._clock(), {"kairos.outcome": "failed"}, error)

    def dropped(self, id: str) -> None:
        """Nobody waits for a request here any more."""
        self._end(id, self._clock(), {"kairos.outcome": "cancelled"})

    def _output(self, output: Output) -> None:
        open = self._open.get(output.id)
        if open is None:
            return
        open.begun_at = output.begun_at
        if output.ticket is not None:
            outcome = "handed_over"
        elif output.finish_reason:
            outcome = output.finish_reason
        else:
            return
        told = {"kairos.outcome": outcome, "kairos.cached_tokens": output.cached}
        self._end(output.id, output.at, told)

    def _end(self, id: str, at: float, told: Mapping[str, Any], error: str | None = None) -> None:
        from opentelemetry import trace

        open = self._open.pop(id, None)
        if open is None:
            return
        open.span.set_attributes(told)
        if error is not None:
            open.span.set_status(trace.StatusCode.ERROR, error)
        inside = trace.set_span_in_context(open.span)
        for name, begun, ended in _parts(open, at):
            span = self._tracer.start_span(name, inside, start_time=open.at(begun))
            span.end(open.at(ended))
        open.span.end(open.at(at))


def _parts(open: _Open, ended_at: float) -> list[tuple[str, float, float]]:
    """What is known of its way: name, begin, end."""
    parts, moving, begun_at = [], open.moving, open.begun_at
    waited_until = moving[0] if moving else begun_at
    if waited_until is not None:
        parts.append(("queue", open.came_at, waited_until))
    if moving:
        parts.append(("transfer", *moving))
    if begun_at is not None:
        parts.append(("compute", begun_at, ended_at))
    return parts
