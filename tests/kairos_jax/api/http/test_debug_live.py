"""Profiles, decisions and traces of processes that serve."""

import json
import re
import signal
import threading
import time
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from processes import Process

pytestmark = pytest.mark.slow

TRACE = "0af7651916cd43dd8448eb211c80319c"


def http(line: str) -> str:
    """Where the HTTP API is, from a line that says it."""
    found = re.search(r"HTTP on (\S+),", line)
    assert found, line
    return f"http://{found[1]}"


def ask(url: str, body: dict | None = None, method: str = "POST", **headers: str) -> dict:
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", **headers}
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def complete(url: str, **headers: str) -> dict:
    body = {"prompt": [1, 2, 3], "max_tokens": 40, "ignore_eos": True}
    return ask(f"{url}/v1/completions", body, **headers)


def test_a_server_takes_a_profile_and_tells_its_decisions(optimized_environment, profile, tmp_path):
    given = (profile, f"--debug_dir={tmp_path}", "--http_port=0")
    server = Process("serve", *given, env=optimized_environment)
    try:
        url = http(server.line("ready", 300))
        with ThreadPoolExecutor(1) as pool:
            asked = f"{url}/debug/profile?steps=10&seconds=60"
            told = pool.submit(ask, asked)
            while not told.done():
                complete(url)
            assert told.result()["steps"] >= 10
        (written,) = (tmp_path / "plugins" / "profile").glob("*/*.xplane.pb")
        named = b"attention" in written.read_bytes()
        assert named, "parts of the compiled steps have their names"
        by, names = time.monotonic() + 30, set()
        while not {"queued", "prefill 1", "decode 1"} <= names:  # it may be half a second old
            assert time.monotonic() < by, names
            schedule = ask(f"{url}/debug/schedule", method="GET")
            names = {event["name"] for event in schedule["traceEvents"]}
        server.send(signal.SIGTERM)
        assert server.wait() == 0
        said = server.errors().splitlines()
        assert [line for line in said if " INFO    serve " not in line] == [], "of the profiler"
    finally:
        server.end()


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans. by_service: (trace, name, id, parent) of each, by the name of who made it."""

    def __init__(self):
        self.by_service = defaultdict(list)
        self.came = threading.Condition()

    def Export(self, request, context):
        with self.came:
            for of in request.resource_spans:
                (name,) = (
                    each.value.string_value
                    for each in of.resource.attributes
                    if each.key == "service.name"
                )
                self.by_service[name] += [
                    (span.trace_id.hex(), span.name, span.span_id, span.parent_span_id)
                    for scope in of.scope_spans
                    for span in scope.spans
                ]
            self.came.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()


def test_all_processes_of_a_cluster_export_one_trace(environment, profile):
    collector, receiver = Collector(), grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, receiver)
    port = receiver.add_insecure_port("127.0.0.1:0")
    receiver.start()
    counts = ("--num_prefill=1", "--num_decode=1")
    where = (f"--otlp_endpoint=http://127.0.0.1:{port}", "--http_port=0")
    cluster = Process("cluster", profile, *counts, *where, env=environment)
    try:
        complete(http(cluster.line("ready", 300)), traceparent=f"00-{TRACE}-b7ad6b7169203331-01")
        cluster.send(signal.SIGTERM)  # what is not exported yet is, before they end
        assert cluster.wait(120) == 0
        spans = collector.by_service
        assert {*spans} == {"kairos", "kairos-prefill", "kairos-decode"}
        assert {trace for of in spans.values() for trace, *_ in of} == {TRACE}
        (root,) = (id for _, name, id, _ in spans["kairos"] if name == "generate")
        for role, parts in (("prefill", 2), ("decode", 3)):
            ((_, name, _, parent), *_), inner = (
                [span for span in spans[f"kairos-{role}"] if "worker" in span[1]],
                [span for span in spans[f"kairos-{role}"] if "worker" not in span[1]],
            )
            assert (name, parent, len(inner)) == (f"{role} worker", root, parts)
    finally:
        cluster.end()
        receiver.stop(None)
