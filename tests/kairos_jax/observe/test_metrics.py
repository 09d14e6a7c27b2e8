"""What is counted of requests that were sent, and told in a form that Prometheus reads."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import fakes
import grpc
import pytest
from http_fakes import fetch
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from kairos_jax.api.http.app import make_app
from kairos_jax.api.http.server import HttpOptions
from kairos_jax.kv.transport import LocalTransport
from kairos_jax.observe import collectors, metrics_port
from kairos_jax.observe.metrics import MAX_CLASSES, Metrics
from kairos_jax.process.command import UsageError
from kairos_jax.routing.stream import Stream
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.worker.build import build_workers
from kairos_jax.worker.tally import Steps, Tally
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Request, Slo

ROOT = Path(__file__).parents[3]
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
CLASS = "ttft=30s tpot=30s"
served = fakes.served_as(fakes.CONFIG)


class Told:
    """What was told, by a metric's name and some of its labels."""

    def __init__(self, text: str):
        self.families = list(text_string_to_metric_families(text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of all samples of that name that have these labels; fails if there is none."""
        found = [
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert found, f"{name} {labels} is not told"
        return sum(found)

    @property
    def names(self) -> set[str]:
        return {sample.name for sample in self.samples}


def told(metrics: Metrics) -> Told:
    text, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    return Told(text.decode())


def assert_bucket(seen: Told, name: str, value: float, **labels: str) -> None:
    """That this one value was counted, where it belongs."""
    assert seen(name, le="+Inf", **labels) == 1
    for sample in seen.samples:
        if sample.name == name and labels.items() <= sample.labels.items():
            assert sample.value == (value <= float(sample.labels["le"])), sample


@served
async def test_requests_are_counted_by_how_they_ended(harness):
    answers = [await harness.generate([1, 2, 3], 5), await harness.generate([4, 5], 1)]
    await harness.cancelled([7] * 10)
    seen = told(harness.metrics)
    for outcome, count in (("length", 2), ("cancelled", 1)):
        counted = seen("kairos_requests_total", outcome=outcome, **{"class": CLASS})
        assert counted == count
    assert seen("kairos_prompt_tokens_total") == 3 + 2 + 10
    for objective in ("ttft", "tpot", "both"):
        assert seen("kairos_slo_requests_total", objective=objective, result="met") == 2
    assert seen("kairos_goodput_tokens_total") == 5 + 1
    timings = [answer[-1].timing for answer in answers]
    for name, values in (
        ("request_duration", [timing.total_s for timing in timings]),
        ("request_transfer", [timings[0].transfer_s]),
        ("time_per_output_token", [timings[0].tpot_s]),
        ("request_decode", [timing.total_s - timing.ttft_s for timing in timings]),
    ):
        assert seen(f"kairos_{name}_seconds_sum") == pytest.approx(sum(values))
        assert seen(f"kairos_{name}_seconds_count") == len(values)
    assert seen("kairos_time_to_first_token_seconds_count") == 3
    assert seen("kairos_output_tokens_total") >= 5 + 1 + 1


@served
async def test_the_times_of_a_request_are_those_that_its_client_is_told(harness):
    count = 6
    *_, last = await harness.generate([1, 2, 3], count, slo=pb.Slo(ttft_s=2.0, tpot_s=1e-4))
    seen, timing = told(harness.metrics), last.timing
    for name, value in (
        ("time_to_first_token", timing.ttft_s),
        ("request_queue", timing.queue_s),
        ("request_prefill", timing.prefill_s),
        ("inter_token_latency", (count - 1) * timing.tpot_s),
    ):
        assert seen(f"kairos_{name}_seconds_sum") == pytest.approx(value)
    slack_s = (count - 1) * (1e-4 - timing.tpot_s)
    for name, at, value in (
        ("laxity", "first_step", 2.0 - timing.queue_s),
        ("laxity", "first_token", 2.0 - timing.ttft_s),
        ("slack", "last", slack_s),
        ("slack", "worst", slack_s),  # each token is later than the one before
    ):
        assert_bucket(seen, f"kairos_{name}_seconds_bucket", value, at=at)
    assert seen("kairos_inter_token_latency_seconds_count") == count - 1
    for objective, result in (("ttft", "met"), ("tpot", "missed"), ("both", "missed")):
        assert seen("kairos_slo_requests_total", objective=objective, result=result) == 1
    assert "kairos_goodput_tokens_total" not in seen.names


@served
async def test_benchmark_tools_find_the_names_that_they_look_for(harness):
    slos = [pb.Slo(ttft_s=ttft) for ttft in (1.0, 2.0)]
    await asyncio.gather(*(harness.generate([1, 2], 4, slo=slo) for slo in slos))
    seen = told(harness.metrics)
    for alias, name in (
        ("time_to_first_token", "time_to_first_token"),
        ("inter_token_latency", "inter_token_latency"),
        ("e2e_request_latency", "request_duration"),
    ):
        for suffix in ("sum", "count"):
            own = seen(f"kairos_{name}_seconds_{suffix}")
            assert seen(f"vllm:{alias}_seconds_{suffix}") == pytest.approx(own)
        assert seen(f"vllm:{alias}_seconds_bucket", le="+Inf") == own
    assert seen("vllm:num_requests_running") == seen("vllm:num_requests_waiting") == 0


@served
async def test_what_is_in_progress_is_told_as_it_is_at_the_time(harness):
    prefill, decode = harness.engines
    call, _, _ = await harness.stream([1] * 20, 60)
    decode.gate.clear()
    prefill.gate.clear()
    waiting = harness.stub.Generate(fakes.ask([2] * 20, 60))
    while harness.router.num_streams < 2 or not harness.workers[0].instance.next_to_end:
        await asyncio.sleep(0)
    seen = told(harness.metrics)
    assert seen("kairos_requests_in_progress", state="running") == 1
    assert seen("kairos_requests_in_progress", state="waiting") == 1
    assert seen("vllm:num_requests_running") == seen("vllm:num_requests_waiting") == 1
    assert seen("kairos_worker_requests", worker="prefill-0", state="running") == 1
    assert seen("kairos_worker_kv_pages", worker="prefill-0", state="used") == 3
    assert seen("kairos_worker_kv_pages", worker="prefill-0") == 512 / 8
    assert seen("kairos_peer_taking", role="decode") == 1
    for each in (call, waiting):
        each.cancel()
    for engine in harness.engines:
        engine.gate.set()
    await asyncio.wait_for(harness.router.drained(), 30)


@served
async def test_used_kv_is_what_the_decode_pools_have_not_free(harness):
    _, decode = harness.engines
    step, looked_at, outlined = decode.step, threading.Event(), asyncio.Event()
    update = harness.router.fleet.peers["decode-0"].update
    harness.router.fleet.peers["decode-0"].update = lambda *args: (update(*args), outlined.set())

    def three_steps(pieces):  # and no more: the request is still there when its KV is looked at
        assert decode.num_steps < 3 or looked_at.wait(30)
        return step(pieces)

    decode.step = three_steps
    assert told(harness.metrics)("vllm:kv_cache_usage_perc") == 0
    call, _, _ = await harness.stream([1] * 30, 60)
    async with asyncio.timeout(30):
        while not told(harness.metrics)("vllm:kv_cache_usage_perc"):
            outlined.clear()
            await outlined.wait()
    usage = told(harness.metrics)("vllm:kv_cache_usage_perc")
    ledger = harness.workers[1].instance
    assert usage == pytest.approx(1 - ledger.pages.num_free / ledger.limits.num_pages, abs=0.1)
    call.cancel()
    looked_at.set()


@served
async def test_steps_are_held_against_what_was_predicted(harness):
    await harness.generate([1, 2, 3], 9)
    worker = harness.workers[1]
    await harness.assert_nothing_held()  # its thread has ended
    seen = told(harness.metrics)
    of = {"worker": "decode-0", "role": "decode"}
    assert seen("kairos_worker_step_seconds_count", **of) == harness.engines[1].num_steps == 8
    assert seen("kairos_worker_step_sequences_sum", **of) == 8
    predicted = seen("kairos_worker_step_predicted_seconds_total", **of)
    assert predicted == pytest.approx(8 * 1.01e-4, rel=0.01)
    assert seen("kairos_worker_step_seconds_sum", **of) == pytest.approx(worker.ran.seconds.sum)
    assert seen("kairos_worker_step_time_ratio_count", **of) == 8
    for name, count in (
        ("steps_ahead", worker.ran.num_ahead),
        ("steps_waited_for", worker.ran.num_waited),
        ("rows_wasted", worker.ran.num_wasted),
    ):
        assert seen(f"kairos_worker_{name}_total", **of) == count
    assert seen("kairos_worker_pace_ratio", **of) == worker.instance.pace


def refused(config, **fields):
    """What is told after one request too many, or a wrong one."""

    async def main():
        async with fakes.running(config) as harness:
            for engine in harness.engines:
                engine.gate.clear()
            calls = [
                harness.stub.Generate(fakes.ask([1, 2], 9)) for _ in range(config.max_requests)
            ]
            while harness.router.num_streams < len(calls):
                await asyncio.sleep(0)
            with pytest.raises(grpc.aio.AioRpcError):
                await harness.generate([1, 2], **{"max_tokens": 9} | fields)
            for call in calls:
                call.cancel()
            return told(harness.metrics)

    return asyncio.run(main())


def test_what_was_not_taken_is_counted_by_reason():
    full = refused(fakes.altered(max_requests=1))
    assert full("kairos_requests_rejected_total", reason="max_requests") == 1
    assert full("kairos_slo_requests_total", objective="both", result="missed") == 1
    wrong = refused(fakes.altered(max_requests=2), max_tokens=0, request_id="")
    assert wrong("kairos_requests_rejected_total") == 1


def test_a_wrong_request_misses_no_slo():
    async def main():
        async with fakes.running() as harness:
            for fields, reason in (({}, "bad_request"), ({"model": "other"}, "unknown_model")):
                with pytest.raises(grpc.aio.AioRpcError):
                    await harness.generate([1, 2], 0, **fields)
                seen = told(harness.metrics)
                assert seen("kairos_requests_rejected_total", reason=reason) == 1
            assert "kairos_slo_requests_total" not in seen.names
            await harness.server.shut("no worker")
            with pytest.raises(grpc.aio.AioRpcError):
                await harness.generate([1, 2], 1)
            seen = told(harness.metrics)
            assert seen("kairos_requests_rejected_total", reason="closed") == 1

    asyncio.run(main())


@served
async def test_a_worker_that_fails_and_its_requests_are_counted(harness):
    harness.engines[1].fail = RuntimeError("planted")
    with pytest.raises(grpc.aio.AioRpcError):
        await harness.generate([1, 2], 5)
    seen = told(harness.metrics)
    assert seen("kairos_workers_lost_total", role="decode") == 1
    assert seen("kairos_requests_total", outcome="failed") == 1
    assert seen("kairos_requests_failed_total", cause="no_worker") == 1
    assert seen("kairos_slo_requests_total", objective="both", result="missed") == 1


def test_classes_beyond_the_most_are_one():
    metrics = Metrics(slo=Slo(9.0, 9.0))
    for ttft in range(1, 100):
        metrics.rejected("closed", Slo(ttft, 0.5))
    metrics.rejected("closed", Slo(9.0, 9.0))
    metrics.rejected("closed")
    seen = told(metrics)
    name = "kairos_requests_rejected_total"
    classes = {sample.labels["class"] for sample in seen.samples if sample.name == name}
    assert len(classes) == MAX_CLASSES + 2
    for known, count in (
        ("ttft=9s tpot=9s", 1),
        ("unknown", 1),
        ("ttft=1s tpot=0.5s", 1),
        ("other", 99 - MAX_CLASSES + 1),
    ):
        assert seen(name, **{"class": known}) == count


def test_it_is_told_in_the_form_that_is_asked_for():
    metrics = Metrics("a model")
    text, content_type = metrics.render(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    families = list(openmetrics_families(text.decode()))
    names = {family.name for family in families}
    assert {"kairos_requests", "vllm:time_to_first_token_seconds"} <= names
    samples = {sample.name for family in families for sample in family.samples}
    assert "vllm:inter_token_latency_seconds_bucket" in samples


@served
async def test_scrapers_get_it_over_http_also_while_the_server_is_shut(harness):
    await harness.generate([1, 2], 2)
    gate = harness.server.gate
    app = make_app(gate, HttpOptions(0))
    await harness.server.shut("no worker")
    status, headers, body = await fetch(app, "GET", "/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert Told(body.decode())("kairos_requests_total") == 1
    status, headers, _ = await fetch(app, "HEAD", "/metrics", accept=OPENMETRICS)
    assert status == 200
    assert headers["content-type"].startswith("application/openmetrics-text")
    gate.backend = None
    status, _, _ = await fetch(app, "GET", "/metrics")
    assert status == 503


def test_a_tally_counts_up_to_each_bound():
    tally = Tally([1, 2.5])
    for value in (0.5, 1, 2, 2.5, 3):
        tally.add(value)
    assert collectors.buckets(tally) == [("1.0", 2), ("2.5", 4), ("+Inf", 5)]
    assert (len(tally), tally.sum) == (5, 9.0)


def test_a_step_that_nothing_was_predicted_of_has_no_ratio():
    steps = Steps()
    steps.add(0.5, 0.0, 1)
    assert (len(steps.seconds), len(steps.ratio)) == (1, 0)


def test_a_worker_of_its_own_process_is_told_on_a_port():
    workers = []
    server = metrics_port.serve_workers("127.0.0.1", 0, workers)
    try:
        port = server.server_port
        with pytest.raises(UsageError, match=f"--metrics_port={port}: cannot listen on 127.0.0.1"):
            metrics_port.serve_workers("127.0.0.1", port, workers)
        cost, transport = CostModel.from_profile(fakes.PROFILE), LocalTransport()
        workers += build_workers(
            fakes.CONFIG, fakes.fake_engines(fakes.CONFIG), cost, transport, lambda event: None
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            seen = Told(answer.read().decode())
        assert seen("kairos_worker_kv_pages", worker="decode-0", state="free") == 1024 / 8
        transport.close()
    finally:
        server.shutdown()
        server.server_close()


def test_a_metrics_port_in_use_is_one_line_and_code_2():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = ("--config=tests/support/tiny_config.py", "--port=0", f"--metrics_port={port}")
        done = subprocess.run(
            [sys.executable, "-m", "kairos_jax.decode", *flags],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: --metrics_port={port}: cannot listen on .*\n", done.stderr)


def test_the_dashboard_shows_what_is_told():
    """Whatever it asks for, a router and its workers tell."""
    dashboard = json.loads((ROOT / "deploy/grafana/kairos.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    used = {name for expr in asked for name in re.findall(r"(?:kairos_|vllm:)\w+", expr)}
    seen = asyncio.run(all_told())
    assert used
    assert used <= seen.names
    labels = {label for expr in asked for label in re.findall(r'(\w+)(?:=|!=|=~)"', expr)}
    for expr in asked:
        labels |= {label for by in re.findall(r"by \((.*?)\)", expr) for label in by.split(", ")}
    of_scraper = {"instance"}
    assert labels - of_scraper <= {label for sample in seen.samples for label in sample.labels}
    for prefix in ("kairos_request_", "kairos_slo_", "kairos_worker_", "kairos_laxity_"):
        assert any(name.startswith(prefix) for name in used), prefix


async def all_told() -> Told:
    """All that a server tells once everything has happened to it."""
    async with fakes.running() as harness:
        await harness.generate([1, 2, 3], 4)
        metrics = harness.metrics
        metrics.rejected("closed")
        metrics.recovered(Stream("one", Request("", 0.0, [1], 1, Slo(1, 1))), "worker_lost")
        metrics.lost(Role.DECODE)
        return told(metrics)
