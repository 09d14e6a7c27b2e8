"""What workers in processes of their own add to the trace of a request."""

import asyncio
import contextlib

import cluster
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from kairos_jax.kv.transport import LocalTransport
from kairos_jax.observe.tracing import Tracing
from kairos_jax.observe.worker_spans import WorkerSpans
from kairos_jax.worker.messages import Failed, Lost, Submit
from kairos_jax.worker.server import RoleOptions
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Request, Slo

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


class Collector:
    """Where all processes' spans go. provider: makes those of one of them."""

    def __init__(self):
        self._exporter = InMemorySpanExporter()

    @property
    def provider(self) -> TracerProvider:
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        return provider

    def spans(self):
        return self._exporter.get_finished_spans()

    def under(self, name):
        """A span of that name, and its children by theirs."""
        (span,) = (span for span in self.spans() if span.name == name)
        inside = (each for each in self.spans() if each.parent)
        return span, {
            each.name: each for each in inside if each.parent.span_id == span.context.span_id
        }


@contextlib.asynccontextmanager
async def traced(collector, tracing=True):
    """A prefill and a decode worker, and a router, which all make spans."""
    transport = LocalTransport()
    nodes = []
    for role in (Role.PREFILL, Role.DECODE):
        options = RoleOptions(cluster.HOST, 0, cluster.HOST, role.value)
        node = await cluster.Node.start(role, transport, options=options)
        node.server.service.spans = WorkerSpans(collector.provider, role, role.value)
        nodes.append(node)
    front = cluster.Front.start(nodes)
    if tracing:
        front.router.observers.append(Tracing(collector.provider))
    try:
        await front.linked(2)
        yield nodes, front
    finally:
        await front.links.close()
        for node in nodes:
            await node.die()
        transport.close()


def test_a_request_is_one_trace_across_router_and_workers():
    collector = Collector()

    async def run():
        async with traced(collector) as (nodes, front):
            await front.ask([1] * 20, 5)
            for node in nodes:
                await cluster.idle(node)

    asyncio.run(run())
    root, parts = collector.under("generate")
    assert {*parts} == {
        *("queue", "prefill", "transfer", "decode"),
        *("prefill worker", "decode worker"),
    }
    assert len({span.context.trace_id for span in collector.spans()}) == 1
    for role, names, outcome in (
        ("prefill", ["queue", "compute"], "handed_over"),
        ("decode", ["queue", "transfer", "compute"], "length"),
    ):
        span, inner = collector.under(f"{role} worker")
        assert (span.attributes["kairos.instance"], span.attributes["kairos.outcome"]) == (
            role,
            outcome,
        )
        assert sorted(inner, key=lambda name: inner[name].start_time) == names
        assert span.start_time == inner["queue"].start_time
        assert span.end_time == inner["compute"].end_time
        times = [time for name in names for time in (inner[name].start_time, inner[name].end_time)]
        assert times == sorted(times)
        assert root.start_time <= span.start_time


def test_a_trace_goes_on_to_workers_where_the_router_makes_none():
    collector = Collector()

    async def run():
        async with traced(collector, tracing=False) as (nodes, front):
            request = Request("", 0.0, [1, 2], 3, Slo(1, 1))
            await cluster.read(front.router.submit(request, TRACEPARENT))
            await cluster.read(front.router.submit(request))  # and this one is no part of any
            for node in nodes:
                await cluster.idle(node)

    asyncio.run(run())
    assert {f"{span.context.trace_id:032x}" for span in collector.spans()} == {TRACE}
    for role in Role.PREFILL, Role.DECODE:
        span, _ = collector.under(f"{role.value} worker")
        assert f"{span.parent.span_id:016x}" in TRACEPARENT["traceparent"]


def test_how_a_request_left_a_worker_is_told():
    collector = Collector()
    spans = WorkerSpans(collector.provider, Role.DECODE, "d", lambda: 1.0)
    for id in ("a", "b", "c"):
        spans.took(Submit(Request(id, 0.0, [1], 2, Slo(1, 1)), TRACEPARENT))
    spans.dropped("a")
    spans.said(Lost("b", OSError("far")))
    spans.said(Failed("c", "not_finite", "NaN"))
    cancelled, lost, failed = collector.spans()
    assert cancelled.attributes["kairos.outcome"] == "cancelled"
    assert (lost.status.status_code, lost.status.description) == (StatusCode.ERROR, "far")
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, "NaN")


@pytest.mark.parametrize("traceparent", [TRACEPARENT["traceparent"][:-1] + "0", "nonsense"])
def test_who_is_not_sampled_gets_no_span(traceparent):
    collector = Collector()
    spans = WorkerSpans(collector.provider, Role.DECODE, "d", lambda: 1.0)
    spans.took(Submit(Request("a", 0.0, [1], 2, Slo(1, 1)), {"traceparent": traceparent}))
    spans.dropped("a")
    assert not collector.spans()
