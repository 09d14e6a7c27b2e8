"""The live page without a browser: what a snapshot tells, who is sent it, and at what cost."""

import asyncio
import json
import re
from importlib import resources
from pathlib import PurePath

import cluster
import fakes
import http_fakes
import pytest
from http_fakes import fetch

from kairos_jax import snapshot as snapshots
from kairos_jax.edge import Edge
from kairos_jax.engine import Token
from kairos_jax.gate import Backend, Gate
from kairos_jax.http_guard import Options, digest
from kairos_jax.instances import build_workers
from kairos_jax.live import Live
from kairos_jax.messages import Output
from kairos_jax.openai_api import make_app
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.snapshot import MAX_INSTANCES, MAX_NAME, MAX_ROWS, snapshot
from kairos_jax.streams import Router
from kairos_jax.tally import Recent
from kairos_jax.transfer import LocalTransport
from schedulers.cost import CostModel
from schedulers.request import Request, Slo

PAGE = {file.name: file.read_text() for file in (resources.files("kairos_jax") / "page").iterdir()}
NOW = 1000.0


def run(main):
    asyncio.run(asyncio.wait_for(main(), 60))


def at_rest(max_requests=4000, config=fakes.CONFIG):
    """What answers requests, with workers that have not been started."""
    cost, loop = CostModel.from_profile(fakes.PROFILE), asyncio.get_running_loop()
    router = Router(loop, max_requests, cost, lambda: NOW)
    workers = build_workers(config, fakes.fake_engines(config), cost, LocalTransport(), router.emit)
    router.connect(workers)
    edge = Edge("fake", fakes.VOCAB, frozenset({0}), config, None)
    return Backend(edge, router, pb.Model()), workers


def asked(ttft=2.0, tpot=0.1, name="", arrival=NOW, length=10):
    return Request(name, arrival, [1] * length, 50, Slo(ttft, tpot))


def has_tokens(stream, times):
    """Books a token at each of these times."""
    for at in times:
        stream.put(Output(stream.request.id, Token(1), NOW - 5.0, at))


# What is told.


def test_of_a_thousand_queued_the_most_urgent_are_told_and_the_rest_counted():
    async def main():
        backend, _ = at_rest()
        # One in ten can no longer make it; the others are due one after another.
        for index in range(1000):
            ttft = 0.001 if index % 10 == 0 else 0.05 * (1000 - index)
            backend.router.submit(asked(ttft, name=f"request-{index}", arrival=NOW - 0.01))
        told = snapshot(backend, NOW)
        queued = told["queued"]
        assert (queued["count"], queued["late"], queued["begun"]) == (1000, 100, 0)
        assert (sum(queued["counts"]), queued["counts"][0]) == (1000, 100)
        assert len(queued["counts"]) == len(queued["bounds"]) + 1
        names = [row["name"] for row in queued["rows"]]
        assert names[:3] == ["request-999", "request-998", "request-997"]
        assert len(names) == MAX_ROWS
        first = queued["rows"][0]
        assert first["waited_s"] == pytest.approx(0.01)
        assert first["due_s"] == pytest.approx(0.04)
        prefill_s = backend.router.cost.prefill_s(10)
        assert first["laxity_s"] == pytest.approx(0.04 - prefill_s, abs=1e-4)
        assert first["at"] == "prefill-0"
        assert len(json.dumps(told, allow_nan=False)) < 10_000

    run(main)


def test_whoever_is_computed_comes_first_and_the_hopeless_last():
    async def main():
        backend, (prefill, _) = at_rest()
        for name, ttft in (("late", 0.0001), ("soon", 1.0), ("begun", 9.0)):
            stream = backend.router.submit(asked(ttft, name=name, arrival=NOW - 0.01))
        ledger = prefill.instance
        ledger.add(stream.request)
        ledger.begin(prefill.policy(ledger, NOW), NOW)
        rows = snapshot(backend, NOW)["queued"]["rows"]
        states = [(row["name"], row["state"]) for row in rows]
        assert states == [("begun", "prefill"), ("soon", "queued"), ("late", "queued")]

    run(main)


def test_running_ones_are_told_by_slack():
    async def main():
        backend, _ = at_rest()
        ahead, behind = (backend.router.submit(asked(name=name)) for name in ("ahead", "behind"))
        has_tokens(ahead, [NOW - 0.1, NOW - 0.05, NOW])  # the next is due at -0.1 + 3 * 0.1
        has_tokens(behind, [NOW - 0.5, NOW - 0.3])  # the next was due at -0.5 + 2 * 0.1
        running = snapshot(backend, NOW)["running"]
        assert (running["count"], running["late"], sum(running["counts"])) == (2, 1, 2)
        first, second = running["rows"]
        assert (first["name"], second["name"]) == ("behind", "ahead")
        assert first["slack_s"] == pytest.approx(-0.3)
        assert second["slack_s"] == pytest.approx(0.2)
        assert (first["tokens"], first["max_tokens"]) == (2, 50)
        assert first["tpot_s"] == pytest.approx(0.2)
        assert (first["queue_s"], first["prefill_s"]) == pytest.approx((-5.0, 4.5))

    run(main)


def test_instances_tell_of_their_pools_and_steps(monkeypatch):
    async def main():
        backend, (prefill, decode) = at_rest()
        stream = backend.router.submit(asked(length=20))
        ledger = prefill.instance
        ledger.add(stream.request)
        ledger.begin(prefill.policy(ledger, NOW), NOW)
        decode.ran.add(0.03, 0.02, 4)
        told = snapshot(backend, NOW)
        one, other = told["instances"]
        assert (one["id"], one["role"], one["taking"]) == ("prefill-0", "prefill", True)
        assert (one["status"]["used_pages"], one["status"]["num_pages"]) == (3, 512 / 8)
        assert one["status"]["parked_limit"] == 4096
        assert other["status"] == {
            "waiting": 0,
            "running": 0,
            "parked": 0,
            "used_pages": 0,
            "num_pages": 1024 / 8,
            "parked_tokens": 0,
            "parked_limit": None,
            "steps": 1,
            "measured_s": 0.03,
            "predicted_s": 0.02,
            "sequences": 4,
        }
        monkeypatch.setattr(snapshots, "MAX_INSTANCES", 1)
        told = snapshot(backend, NOW)
        assert (len(told["instances"]), told["num_instances"]) == (1, 2)

    assert MAX_INSTANCES > 1
    run(main)


def test_long_names_are_cut():
    async def main():
        backend, _ = at_rest()
        backend.router.submit(asked(name="x" * 256))
        (row,) = snapshot(backend, NOW)["queued"]["rows"]
        assert row["name"] == "x" * MAX_NAME

    run(main)


def test_workers_in_other_processes_are_told_of_too():
    async def main():
        async with cluster.running() as (_, front, _):
            while not all(peer.look() for peer in front.router.peers):
                await asyncio.sleep(0)
            edge = Edge("fake", fakes.VOCAB, frozenset(), fakes.CONFIG, None)
            told = snapshot(Backend(edge, front.router, pb.Model()), front.router.clock())
            pools = {each["role"]: each["status"]["num_pages"] for each in told["instances"]}
            assert pools == {"prefill": 512 / 8, "decode": 1024 / 8}
            assert not any("@" in each["id"] for each in told["instances"])

    run(main)


def test_the_last_minutes_are_counted_by_slots():
    recent = Recent(2, slot_s=5.0, num_slots=3)
    for now, counts in ((1.0, (1, 0)), (6.0, (1, 1)), (9.0, (1, True)), (16.0, (1, 0))):
        recent.add(now, counts)
    assert recent.slots(16.0) == [[2, 2], [0, 0], [1, 0]]
    assert recent.slots(22.0) == [[0, 0], [1, 0], [0, 0]]
    assert recent.slots(99.0) == [[0, 0]] * 3


@fakes.served_as(fakes.CONFIG)
async def test_who_kept_their_slo_is_told(harness):
    for tpot in (30.0, 1e-9):
        await harness.generate([1, 2, 3], 4, slo=pb.Slo(ttft_s=30.0, tpot_s=tpot))
    slots = snapshot(harness.server.gate.backend, harness.router.clock())["judged"]["slots"]
    assert [sum(column) for column in zip(*slots, strict=True)] == [2, 2, 1, 1]


# Who is sent it.


class Viewer:
    """One who follows an app's events."""

    def __init__(self, app, **headers: str):
        self.frames: asyncio.Queue[dict | None] = asyncio.Queue()
        self._leave, self.may_read = asyncio.Event(), asyncio.Event()
        self.may_read.set()
        self.task = asyncio.ensure_future(self._look(app, headers))
        self.status = 0

    async def _look(self, app, headers):
        async def receive():
            await self._leave.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if message["type"] == "http.response.start":
                self.status = message["status"]
            elif body := message["body"]:
                await self.may_read.wait()
                self.frames.put_nowait(json.loads(body.removeprefix(b"data: ")))

        named = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "GET", "path": "/live", "headers": named}
        scope |= {"query_string": b"", "root_path": "", "raw_path": b"/live"}
        await app(scope, receive, send)

    async def leave(self):
        self._leave.set()
        await self.task


def looked_at(**options):
    """A page whose snapshots are counted, and its app."""
    count = 0

    def look(gate):
        nonlocal count
        count += 1
        return {"count": count}

    gate = Gate(lambda: 0.0)
    live = Live(gate, look=look, **options)
    return live, make_app(gate, Options(), live.routes())


def test_one_snapshot_a_tick_is_made_for_all_and_none_for_nobody():
    async def main():
        live, app = looked_at(period_s=0.001)
        viewers = [Viewer(app) for _ in range(5)]
        seen = [[(await viewer.frames.get())["count"] for _ in range(4)] for viewer in viewers]
        assert all(counts == seen[0] for counts in seen)
        assert (live.num_viewers, viewers[0].status) == (5, 200)
        ticking = live._ticking
        for viewer in viewers:
            await viewer.leave()
        await ticking
        assert (live.num_viewers, live._ticking) == (0, None)
        last = live._look(None)["count"]  # one more than were made
        again = Viewer(app)
        assert (await again.frames.get())["count"] == last + 1
        await again.leave()

    run(main)


def test_who_comes_later_is_sent_the_latest_at_once():
    async def main():
        live, app = looked_at(period_s=3600.0)
        one = Viewer(app)
        first = await one.frames.get()
        other = Viewer(app)
        assert await other.frames.get() == first
        live.close()
        await asyncio.gather(one.task, other.task)

    run(main)


def test_who_reads_slowly_gets_the_latest_and_holds_up_nobody():
    async def main():
        _, app = looked_at(period_s=0.001)
        slow, quick = Viewer(app), Viewer(app)
        slow.may_read.clear()
        counts = [(await quick.frames.get())["count"] for _ in range(20)]
        slow.may_read.set()
        seen = [(await slow.frames.get())["count"] for _ in range(2)]
        assert seen[0] == counts[0]
        assert seen[1] >= counts[-1]
        for viewer in (slow, quick):
            await viewer.leave()

    run(main)


def test_viewers_are_bounded():
    async def main():
        live, app = looked_at(period_s=3600.0, max_viewers=1)
        one = Viewer(app)
        await one.frames.get()
        status, headers, body = await fetch(app, "GET", "/live")
        assert (status, headers["retry-after"]) == (503, "10")
        assert json.loads(body)["error"]["message"].startswith("1 pages are open")
        await one.leave()
        other = Viewer(app)
        await other.frames.get()
        live.close()
        await other.task
        status, _, _ = await fetch(app, "GET", "/live")
        assert status == 503

    run(main)


def test_a_snapshot_that_fails_ends_the_streams_and_the_next_viewer_starts_anew():
    async def main():
        def look(gate):
            raise RuntimeError("planted")

        gate = Gate(lambda: 0.0)
        live = Live(gate, look=look)
        app = make_app(gate, Options(), live.routes())
        viewer = Viewer(app)
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="planted"):
            await live._ticking
        await viewer.task
        assert live._ticking is None
        live._look = lambda gate: {"fine": True}
        again = Viewer(app)
        assert (await again.frames.get())["fine"]
        await again.leave()

    run(main)


def test_a_server_that_starts_says_so():
    async def main():
        gate = Gate(lambda: 0.0)
        app = make_app(gate, Options(), Live(gate).routes())
        viewer = Viewer(app)
        assert (await viewer.frames.get())["closed"] == "the server is starting"
        await viewer.leave()

    run(main)


def test_data_needs_the_key_and_the_page_does_not():
    async def main():
        gate = Gate(lambda: 0.0)
        live = Live(gate)
        app = make_app(gate, Options((digest(b"secret"),)), live.routes())
        status, _, body = await fetch(app, "GET", "/live")
        assert (status, b"API key is missing" in body) == (401, True)
        viewer = Viewer(app, authorization="Bearer secret")
        await viewer.frames.get()
        await viewer.leave()
        for path in ("/", "/page/page.css", "/page/live.js"):
            status, headers, _ = await fetch(app, "GET", path)
            assert status == 200
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
        status, headers, body = await fetch(app, "GET", "/")
        assert headers["content-type"] == "text/html; charset=utf-8"
        assert body.decode() == PAGE["index.html"]
        status, _, _ = await fetch(app, "GET", "/page/../live.py")
        assert status == 404

    run(main)


def test_a_server_that_ends_ends_what_it_sends():
    async def main():
        async with http_fakes.serving() as api, api.client.stream("GET", "/live") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = aiter(answer.aiter_lines())
            told = json.loads((await anext(lines)).removeprefix("data: "))
            assert (told["model"], told["closed"]) == ("fake", None)
            draining = asyncio.ensure_future(api.harness.server.drain(30.0))
            assert not [line async for line in lines if line and not line.startswith("data: ")]
            assert await draining

    run(main)


# The files of the page.


def test_the_page_takes_nothing_from_elsewhere_and_makes_no_markup():
    for name, text in PAGE.items():
        bare = text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]", bare), name
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert way not in text, f"{way} in {name}"
    assert {PurePath(name).suffix for name in PAGE} == {".html", ".css", ".js"}
    assert not re.search(
        r"\sstyle=|\son[a-z]+=|<style|<script(?! type=\"module\" src)", PAGE["index.html"]
    )


def test_what_scripts_look_for_is_there():
    ids = set(re.findall(r'id="([^"]+)"', PAGE["index.html"]))
    scripts = "".join(text for name, text in PAGE.items() if name.endswith(".js"))
    wanted = set(re.findall(r'(?:byId|rest|note)\("([^"]+)"', scripts))
    assert "model" in wanted
    assert wanted <= ids
    assert set(re.findall(r'for="([^"]+)"', PAGE["index.html"])) <= ids
    assert set(re.findall(r'labelledby="([^"]+)"', PAGE["index.html"])) <= ids
    files = set(re.findall(r'"page/([^"]+)"', PAGE["index.html"]))
    files |= set(re.findall(r'from "\./([^"]+)"', scripts))
    assert files == PAGE.keys() - {"index.html"}
