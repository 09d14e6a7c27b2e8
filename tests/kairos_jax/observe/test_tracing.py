"""Each request becomes a trace, which tells the same times as its client is told."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import fakes
import pytest
from http_fakes import fetch
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from kairos_jax.api.http.app import make_app
from kairos_jax.api.http.server import HttpOptions
from kairos_jax.observe.tracing import Tracing

ROOT = Path(__file__).parents[3]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Traced:
    """A server of fake engines whose traces stay here."""

    def __init__(self, harness: fakes.Harness):
        self.harness, self._exporter = harness, InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        harness.router.observers.append(Tracing(provider))

    async def spans(self, names: str) -> list:
        """Those of all requests so far, once they are over."""
        await asyncio.wait_for(self.harness.router.drained(), 30)
        spans = sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time)
        assert sorted(span.name for span in spans) == sorted(names.split())
        return spans


def served(test):
    """Runs an async test against a server whose requests are traced."""
    return fakes.served_as(fakes.CONFIG)(lambda harness: test(Traced(harness)))


def seconds(span) -> float:
    return (span.end_time - span.start_time) / 1e9


@served
async def test_spans_take_as_long_as_the_client_is_told(traced):
    *_, last = await traced.harness.generate([1, 2, 3], 5, request_id="mine")
    spans = await traced.spans("generate queue prefill transfer decode")
    named, timing = {span.name: span for span in spans}, last.timing
    for name, value in (
        ("generate", timing.total_s),
        ("queue", timing.queue_s),
        ("prefill", timing.prefill_s),
        ("transfer", timing.transfer_s),
        ("decode", timing.total_s - timing.ttft_s),
    ):
        assert seconds(named[name]) == pytest.approx(value, abs=2e-6)
    root = named.pop("generate")
    assert (root.kind, root.parent) == (SpanKind.SERVER, None)
    for span in named.values():
        assert span.parent.span_id == root.context.span_id
        assert span.context.trace_id == root.context.trace_id
        assert root.start_time <= span.start_time <= span.end_time <= root.end_time
    told = root.attributes
    assert told["gen_ai.response.id"] == "mine"
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (3, 5)
    assert told["gen_ai.response.finish_reasons"] == ("length",)
    assert told["kairos.ttft_s"] == pytest.approx(timing.ttft_s)
    assert told["kairos.tpot_s"] == pytest.approx(timing.tpot_s)


@served
async def test_a_trace_goes_on_from_its_clients_over_grpc(traced):
    metadata = (("traceparent", TRACEPARENT), ("tracestate", "vendor=7"))
    call = traced.harness.stub.Generate(fakes.ask([1, 2], 1), metadata=metadata, timeout=30)
    assert [response async for response in call]
    root, *parts = await traced.spans("generate queue prefill")
    root, *parts = sorted([root, *parts], key=lambda span: span.name != "generate")
    assert f"{root.parent.span_id:016x}" == PARENT
    assert root.context.trace_state.get("vendor") == "7"
    assert {f"{span.context.trace_id:032x}" for span in (root, *parts)} == {TRACE}


@served
async def test_a_trace_goes_on_from_its_clients_over_http(traced):
    app = make_app(traced.harness.server.gate, HttpOptions(0))
    body = b'{"model": "fake", "prompt": [1, 2], "max_tokens": 1}'
    status, _, _ = await fetch(app, "POST", "/v1/completions", body, traceparent=TRACEPARENT)
    assert status == 200
    spans = await traced.spans("generate queue prefill")
    assert {f"{span.context.trace_id:032x}" for span in spans} == {TRACE}


@served
async def test_a_client_that_takes_no_trace_gets_none(traced):
    """It says that it is not sampled; what is no trace header is passed over."""
    for value in (TRACEPARENT[:-1] + "0", "nonsense"):
        metadata = (("traceparent", value),)
        call = traced.harness.stub.Generate(fakes.ask([1, 2], 1), metadata=metadata, timeout=30)
        assert [response async for response in call]
    await traced.spans("generate queue prefill")  # of the second


@served
async def test_how_a_request_ended_is_told(traced):
    await traced.harness.cancelled([1] * 10)
    traced.harness.engines[0].fail = RuntimeError("planted")
    failing = traced.harness.stub.Generate(fakes.ask([1], 5), timeout=30)
    await failing.code()
    spans = traced._exporter.get_finished_spans()
    cancelled, failed = (span for span in spans if span.name == "generate")
    assert cancelled.attributes["kairos.outcome"] == "cancelled"
    assert cancelled.status.status_code is StatusCode.UNSET
    assert failed.attributes["kairos.outcome"] == "failed"
    assert failed.status.status_code is StatusCode.ERROR
    assert "kairos.ttft_s" not in failed.attributes


@pytest.mark.parametrize(
    ("flag", "environment", "words"),
    [
        ("--otlp_endpoint=127.0.0.1:4317", {}, "must begin with http:// or https://"),
        ("", {"OTEL_EXPORTER_OTLP_ENDPOINT": "x", "PYTHONPATH": "without"}, "kairos_jax[otel]"),
    ],
)
def test_what_cannot_be_traced_is_one_line_and_code_2(tmp_path, flag, environment, words):
    """Where OpenTelemetry is not installed, as by the package in the path that has its name."""
    without = tmp_path / "without" / "opentelemetry"
    without.mkdir(parents=True)
    (without / "__init__.py").write_text("")
    if "PYTHONPATH" in environment:
        environment = environment | {"PYTHONPATH": str(without.parent)}
    command = [sys.executable, "-m", "kairos_jax.serve", "--config=tests/support/tiny_config.py"]
    done = subprocess.run(
        [*command, "--port=0", *filter(None, [flag])],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
