"""The live page: a few static files, and the events by which it is kept up to date.

Once a second, while a page is open, one snapshot is made and sent to every open page.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kairos_jax.api.gate import Closed, Gate
from kairos_jax.api.http.errors import ApiError
from kairos_jax.api.http.guard import OpenRoute
from kairos_jax.api.http.snapshot import snapshot
from kairos_jax.api.http.to_json import to_bytes

MAX_VIEWERS = 64
_PERIOD_S = 1.0
# When a page for which there was no place may try again.
_RETRY_S = 10

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
# Nothing from elsewhere, nothing inline, nobody's frame; and no text becomes markup.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_FILE_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_EVENTS = "text/event-stream"
_EVENT_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


class Live:
    """The page of one server, and the open pages. period_s: between two snapshots."""

    def __init__(
        self,
        gate: Gate,
        max_viewers: int = MAX_VIEWERS,
        period_s: float = _PERIOD_S,
        look: Callable[[Gate], dict[str, Any]] | None = None,
    ):
        self._gate, self._max_viewers, self._period_s = gate, max_viewers, period_s
        self._look = look or _look
        self._viewers: set[asyncio.Queue[bytes | None]] = set()
        self._latest: bytes | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._closed = False

    def routes(self) -> list[BaseRoute]:
        """What is at which path."""
        files = (resources.files("kairos_jax.api.http") / "page").iterdir()
        served = {each.name: _file(each.name, each.read_bytes()) for each in files}
        open_to_all = {"/": served["index.html"]}
        open_to_all |= {f"/page/{name}": file for name, file in served.items()}
        opened = [OpenRoute(path, file) for path, file in open_to_all.items()]
        return [Route("/live", self.events), *opened]

    async def events(self, request: Request) -> ASGIApp:
        """Snapshots as server-sent events, without end. HEAD takes no place among the viewers."""
        if request.method == "HEAD":
            return Response(headers=_EVENT_HEADERS, media_type=_EVENTS)
        return self._watch

    @property
    def num_viewers(self) -> int:
        """Pages that are open now."""
        return len(self._viewers)

    def close(self) -> None:
        """Ends what is sent to open pages, and takes no others."""
        self._closed = True
        if self._ticking:
            self._ticking.cancel()

    async def _watch(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI. Raises ApiError where there is no place left, and Closed."""
        if self._closed:
            raise Closed("the server has ended")
        if len(self._viewers) >= self._max_viewers:
            most = self._max_viewers
            error = ApiError(503, f"{most} pages are open, the most that are kept up to date")
            error.headers["retry-after"] = str(_RETRY_S)
            raise error
        viewer: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        self._viewers.add(viewer)
        if self._ticking is None:
            self._ticking = asyncio.ensure_future(self._tick())
        elif self._latest:
            viewer.put_nowait(self._latest)
        try:
            frames = StreamingResponse(_frames(viewer), 200, _EVENT_HEADERS, _EVENTS)
            await frames(scope, receive, send)
        finally:
            self._viewers.discard(viewer)

    async def _tick(self) -> None:
        """Makes snapshots while a page is open."""
        try:
            while self._viewers:
                # In a thread: of many requests it takes longer than a token should wait.
                self._latest = await asyncio.to_thread(self._frame)
                for viewer in self._viewers:
                    _hand(viewer, self._latest)
                await asyncio.sleep(self._period_s)
        finally:
            self._ticking = self._latest = None
            for viewer in self._viewers:
                _hand(viewer, None)

    def _frame(self) -> bytes:
        begun = time.perf_counter()
        told = self._look(self._gate)
        told["took_s"] = round(time.perf_counter() - begun, 6)
        return b"data: " + to_bytes(told, compact=True) + b"\n\n"


def _look(gate: Gate) -> dict[str, Any]:
    """closed: why requests are not taken, where they are not; all else once there is a backend."""
    told = {"closed": gate.closed}
    return told | snapshot(gate.backend, gate.clock()) if gate.backend else told


def _hand(viewer: asyncio.Queue[bytes | None], frame: bytes | None) -> None:
    """In place of one that it has not read yet."""
    if viewer.full():
        viewer.get_nowait()
    viewer.put_nowait(frame)


async def _frames(viewer: asyncio.Queue[bytes | None]) -> AsyncIterator[bytes]:
    while (frame := await viewer.get()) is not None:
        yield frame


def _file(name: str, content: bytes) -> Callable[[Request], Any]:
    kind = _TYPES[name[name.rindex(".") :]]
    headers = _FILE_HEADERS | {"content-type": kind}

    async def answer(request: Request) -> Response:
        return Response(content, headers=headers)

    return answer
