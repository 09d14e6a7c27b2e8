"""What a process tells of itself to who tunes it, and to nobody else."""

import asyncio
import contextlib
import json
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import fakes
import pytest
from http_fakes import fetch

from kairos_jax.api.gate import Gate
from kairos_jax.api.http import debug
from kairos_jax.api.http.app import make_app
from kairos_jax.api.http.debug import Debug, answer_beside, routes
from kairos_jax.api.http.errors import ApiError
from kairos_jax.api.http.server import HttpOptions
from kairos_jax.api.keys import digest
from kairos_jax.observe import metrics_port
from kairos_jax.observe.perfetto import RecentTrace, trace_events
from kairos_jax.process.command import UsageError
from kairos_jax.worker.tally import Steps
from schedulers.ledger.journal import Journal

PROFILE, SCHEDULE = "/debug/profile", "/debug/schedule"


class Profiler:
    """Stands in for JAX's. begun: a profile is being taken; ended: it was written."""

    def __init__(self, monkeypatch):
        self.begun, self.ended = threading.Event(), threading.Event()
        monkeypatch.setattr(debug.jax.profiler, "start_trace", self._start)
        monkeypatch.setattr(debug.jax.profiler, "stop_trace", self.ended.set)

    def _start(self, directory, profiler_options):
        self.directory = directory
        self.begun.set()


@pytest.fixture
def profiler(monkeypatch):
    return Profiler(monkeypatch)


@contextlib.contextmanager
def profiling(debugged: Debug, profiler: Profiler, **query: str):
    """A profile that is being taken, as what it will answer."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(debugged.answer, "POST", PROFILE, query)
        assert profiler.begun.wait(30)
        try:
            yield answer
        finally:
            debugged.close()


def working(*steps: Steps) -> Any:
    return [SimpleNamespace(ran=each) for each in steps]


def test_a_profile_ends_with_the_steps_that_were_asked_for(tmp_path, profiler):
    debugged, steps = Debug(tmp_path), Steps()
    debugged.workers = working(Steps(), steps)
    with profiling(debugged, profiler, steps="3", seconds="60") as answer:
        while not answer.done():  # those before it looked for the first time do not count
            steps.add(0.01, 0.01, 1)
        told = json.loads(answer.result(30))
    assert profiler.ended.is_set()
    assert profiler.directory == tmp_path
    assert told["steps"] >= 3
    assert told["seconds"] < 60
    assert told["directory"] == str(tmp_path)


def test_a_profile_ends_after_its_time_though_nothing_runs(tmp_path, profiler):
    told = json.loads(Debug(tmp_path).answer("POST", PROFILE, {"seconds": "1"}))
    assert told["steps"] == 0
    assert 1 <= told["seconds"] < 30
    assert profiler.ended.is_set()


def test_profiles_are_taken_one_at_a_time_and_end_with_the_server(tmp_path, profiler):
    debugged = Debug(tmp_path)
    with profiling(debugged, profiler, seconds="60") as answer:
        with pytest.raises(ApiError, match="one at a time") as error:
            debugged.answer("POST", PROFILE, {})
        assert error.value.status == 409
        assert not answer.done()
    assert json.loads(answer.result(30))["seconds"] < 60


def test_a_profile_that_cannot_begin_leaves_room_for_the_next(tmp_path, profiler, monkeypatch):
    def fail(directory, profiler_options):
        raise RuntimeError("another has begun")

    debugged = Debug(tmp_path)
    debugged.close()
    with monkeypatch.context() as broken:
        broken.setattr(debug.jax.profiler, "start_trace", fail)
        with pytest.raises(RuntimeError):
            debugged.answer("POST", PROFILE, {})
    assert debugged.answer("POST", PROFILE, {})


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"steps": "0"}, 'steps must be a whole number from 1 to 1000, got "0"'),
        ({"steps": "1001"}, "from 1 to 1000"),
        ({"steps": "9" * 5000}, "from 1 to 1000"),
        ({"steps": "-1"}, "from 1 to 1000"),
        ({"seconds": "61"}, 'seconds must be a whole number from 1 to 60, got "61"'),
        ({"seconds": "1.5"}, "from 1 to 60"),
        ({"seconds": ""}, "from 1 to 60"),
    ],
)
def test_a_profile_is_bounded(tmp_path, profiler, query, words):
    with pytest.raises(ApiError, match=words) as error:
        Debug(tmp_path).answer("POST", PROFILE, query)
    assert error.value.status == 400
    assert not profiler.begun.is_set()


async def ran(num_requests: int) -> list:
    """The records of a server that has answered so many requests."""
    journal = Journal(lambda: 0.0)
    async with fakes.running(journal=journal) as harness:
        journal._clock = harness.server.gate.clock
        prompts = [[id % 90 + 1] * (id % 40 + 1) for id in range(num_requests)]
        await asyncio.gather(*(harness.generate(prompt, 8) for prompt in prompts))
        await asyncio.wait_for(harness.router.drained(), 30)
    return list(journal.take())


def check_whole(events: list) -> None:
    """Every end has a beginning, and every beginning an end."""
    begun, arrows = [], set()
    for event in events:
        key = event.get("id"), event["name"]
        if event["ph"] == "b":
            begun.append(key)
        elif event["ph"] == "e":
            begun.remove(key)
        elif event["ph"] == "s":
            arrows.add(key)
        elif event["ph"] == "f":
            assert key in arrows
    assert not begun


def test_the_last_decisions_are_told_as_a_trace(tmp_path):
    records = asyncio.run(ran(20))
    debugged = Debug(tmp_path)
    for first in range(0, len(records), 7):
        debugged.watch(records[first : first + 7])
    told = json.loads(debugged.answer("GET", SCHEDULE, {}))
    assert told == json.loads(json.dumps(trace_events(records)))
    few = RecentTrace(100)
    for record in records[:-3]:
        few.add([record])
    events = few.trace()["traceEvents"]
    assert events == few.trace()["traceEvents"], "to look changes nothing"
    check_whole(events)
    kept = [event for event in trace_events(records[:-3])["traceEvents"] if event["ph"] == "X"]
    shown = [event for event in events if event["ph"] == "X"]
    assert shown
    assert shown == kept[-len(shown) :]
    few.add(records[-3:])
    check_whole(few.trace()["traceEvents"])
    check_prefill_alone([record for record in records if record[0] == "prefill-0"])


def check_prefill_alone(records: list) -> None:
    """As in a process of its own, where what was handed over is heard of no more."""
    alone = RecentTrace()
    alone.add(records)
    ends = [
        event["args"].get("end") for event in alone.trace()["traceEvents"] if event["ph"] == "e"
    ]
    assert ends.count("handed over") == 20
    assert "unfinished" not in ends


def test_records_that_make_no_sense_end_the_trace_and_nothing_else(tmp_path, caplog):
    debugged = Debug(tmp_path)
    debugged.watch([("nobody", "cancel", 1.0, "x")])
    debugged.watch([("nobody", "cancel", 1.0, "x")])
    assert caplog.text.count("/debug/schedule stays as it is") == 1
    assert debugged.answer("GET", SCHEDULE, {})


def test_over_http_it_is_for_who_has_a_key_and_only_if_it_is_on(tmp_path):
    gate = Gate(lambda: 0.0)

    async def asked(app, method: str, path: str, **headers: str) -> tuple[int, dict]:
        status, _, body = await fetch(app, method, path, **headers)
        return status, json.loads(body)

    async def run() -> None:
        off = make_app(gate, HttpOptions(0), routes(None, "it is off"))
        status, told = await asked(off, "GET", SCHEDULE)
        assert (status, told["error"]["message"]) == (404, "it is off")
        app = make_app(gate, HttpOptions(0, keys=(digest(b"key"),)), routes(Debug(tmp_path), ""))
        assert (await asked(app, "GET", SCHEDULE))[0] == 401
        key = {"authorization": "Bearer key"}
        for method, path, expected in (
            ("GET", SCHEDULE, 200),
            ("POST", SCHEDULE, 405),
            ("GET", PROFILE, 405),
            ("GET", "/debug/other", 404),
        ):
            assert (await asked(app, method, path, **key))[0] == expected

    asyncio.run(run())


def test_a_worker_of_its_own_process_answers_beside_its_metrics(tmp_path, profiler):
    server = metrics_port.serve_workers("127.0.0.1", 0, [])
    debugged = Debug(tmp_path)
    debugged.close()
    answer_beside(server, debugged)
    url = f"http://127.0.0.1:{server.server_port}"

    def ask(path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
        request = urllib.request.Request(url + path, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    try:
        assert b"process_cpu_seconds" in ask("/metrics")[1]
        status, told = ask(SCHEDULE)
        assert (status, json.loads(told)["displayTimeUnit"]) == (200, "ms")
        assert ask(f"{PROFILE}?steps=5", "POST")[0] == 200
        status, told = ask(f"{PROFILE}?steps=x", "POST")
        assert (status, json.loads(told)["error"]["param"]) == (400, "steps")
        assert ask("/debug/other")[0] == 404
        assert ask(f"{PROFILE}?steps=5", "POST", Origin="https://page.example")[0] == 403
    finally:
        server.shutdown()
        server.server_close()


def test_it_is_off_without_a_directory_that_can_be_written(tmp_path, monkeypatch):
    def from_flags(path):
        monkeypatch.setattr(debug.flags, "FLAGS", SimpleNamespace(debug_dir=path))
        return Debug.from_flags()

    assert from_flags(None) is None
    assert from_flags(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--debug_dir=.*/file: File exists"):
        from_flags(str(tmp_path / "file"))
