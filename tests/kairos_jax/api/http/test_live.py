"""The live page without a browser: who is sent snapshots, at what cost, and its files."""

import asyncio
import json
import re
from importlib import resources
from pathlib import PurePath

import http_fakes
import pytest
from http_fakes import fetch

from kairos_jax.api.gate import Gate
from kairos_jax.api.http.app import make_app
from kairos_jax.api.http.live import Live
from kairos_jax.api.http.server import HttpOptions
from kairos_jax.api.keys import digest

FILES = resources.files("kairos_jax.api.http") / "page"
PAGE = {file.name: file.read_text() for file in FILES.iterdir()}


def run(main):
    asyncio.run(asyncio.wait_for(main(), 60))


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
    return live, make_app(gate, HttpOptions(0), live.routes())


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
        app = make_app(gate, HttpOptions(0), live.routes())
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
        app = make_app(gate, HttpOptions(0), Live(gate).routes())
        viewer = Viewer(app)
        assert (await viewer.frames.get())["closed"] == "the server is starting"
        await viewer.leave()

    run(main)


def test_data_needs_the_key_and_the_page_does_not():
    async def main():
        gate = Gate(lambda: 0.0)
        live = Live(gate)
        app = make_app(gate, HttpOptions(0, (digest(b"secret"),)), live.routes())
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
        assert status == 401, "an unknown path needs the key too"

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
