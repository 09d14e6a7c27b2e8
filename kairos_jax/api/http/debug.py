"""What a process tells of itself for tuning: a profile of its next steps by JAX's profiler,
and its last decisions as a trace for Perfetto. Off unless --debug_dir says where profiles go.

  POST /debug/profile?steps=20&seconds=10   a profile of so many steps, or of so long
  GET  /debug/schedule                      the last decisions
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl
from wsgiref.simple_server import WSGIServer

import jax
from absl import flags
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from kairos_jax.api.http.body.fields import shown
from kairos_jax.api.http.errors import ApiError, error_object
from kairos_jax.api.http.to_json import to_bytes
from kairos_jax.observe.perfetto import RecentTrace
from kairos_jax.process.command import UsageError
from kairos_jax.worker.worker import Worker
from schedulers.ledger.journal import Record

log = logging.getLogger(__name__)

MAX_STEPS, MAX_SECONDS = 1000, 60
_STEPS, _SECONDS = 20, 10
# How often it looks whether the steps are over.
_PERIOD_S = 0.005


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    flags.DEFINE_string(
        "debug_dir",
        None,
        "Serve /debug/profile and /debug/schedule; profiles go to this directory.",
    )


class Debug:
    """Answers for the workers of this process, on any thread. workers: as they are when asked."""

    def __init__(self, directory: Path):
        self.workers: Sequence[Worker] = ()
        self._directory, self._recent = directory, RecentTrace()
        self._busy, self._ended = threading.Lock(), threading.Event()
        self._watches = True
        self._jobs: dict[tuple[str, str], Callable[[Mapping[str, str]], Any]] = {
            ("POST", "/debug/profile"): self._profile,
            ("GET", "/debug/schedule"): lambda query: self._recent.trace(),
        }

    @classmethod
    def from_flags(cls) -> "Debug | None":
        """None: it is off. Raises UsageError."""
        path = flags.FLAGS.debug_dir
        if path is None:
            return None
        directory = Path(path).absolute()
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--debug_dir={path}: {error.strerror}") from error
        if not os.access(directory, os.W_OK):
            raise UsageError(f"--debug_dir={path} cannot be written to")
        return cls(directory)

    def watch(self, records: Iterable[Record]) -> None:
        """Takes what happened to the workers' ledgers, from the beginning on."""
        if not self._watches:
            return
        try:
            self._recent.add(records)
        except ValueError:  # whatever else is done with the records goes on
            self._watches = False
            log.exception("/debug/schedule stays as it is")

    def answer(self, method: str, path: str, query: Mapping[str, str]) -> bytes:
        """A JSON object. Raises ApiError."""
        if job := self._jobs.get((method, path)):
            return to_bytes(job(query))
        if any(path == known for _, known in self._jobs):
            raise ApiError(405, "this path does not take this method")
        raise ApiError(404, "there is nothing at this path")

    def close(self) -> None:
        """Ends the profile that is being taken, if one is."""
        self._ended.set()

    def _profile(self, query: Mapping[str, str]) -> dict[str, Any]:
        steps = _number(query, "steps", _STEPS, MAX_STEPS)
        seconds = _number(query, "seconds", _SECONDS, MAX_SECONDS)
        if not self._busy.acquire(blocking=False):
            raise ApiError(409, "a profile is being taken, and there is one at a time")
        try:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it would slow down all that it looks at
            jax.profiler.start_trace(self._directory, profiler_options=options)
            try:
                first, begun = self._num_steps(), time.monotonic()
                until = begun + seconds
                while self._num_steps() - first < steps and time.monotonic() < until:
                    if self._ended.wait(_PERIOD_S):
                        break
                found = {"steps": self._num_steps() - first, "seconds": time.monotonic() - begun}
            finally:
                jax.profiler.stop_trace()
        finally:
            self._busy.release()
        return found | {"directory": str(self._directory)}

    def _num_steps(self) -> int:
        """Of all workers, so far."""
        return sum(len(worker.ran.seconds) for worker in self.workers)


def routes(debug: Debug | None, missing: str) -> list[BaseRoute]:
    """For the HTTP API. missing: what is said without any."""

    async def answer(request: Request) -> Response:
        if debug is None:
            raise ApiError(404, missing)
        asked = request.method, request.url.path, request.query_params
        told = await asyncio.to_thread(debug.answer, *asked)
        return Response(told, media_type="application/json")

    return [Route("/debug/{what}", answer, methods=["GET", "POST"])]


def answer_beside(server: WSGIServer, debug: Debug) -> None:
    """Has a WSGI server answer for `debug` too; all else is for the app that it has."""
    app: Any = server.get_app()

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if not path.startswith("/debug/"):
            return app(environ, start)
        status = HTTPStatus.OK
        try:
            if "HTTP_ORIGIN" in environ and method != "GET":
                raise ApiError(403, "a profile is not for pages: the request has an Origin")
            body = debug.answer(method, path, dict(parse_qsl(environ["QUERY_STRING"])))
        except ApiError as error:
            status, body = HTTPStatus(error.status), to_bytes(error_object(error))
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        start(f"{status.value} {status.phrase}", headers)
        return [body]

    server.set_app(answer)


def _number(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = query.get(name, str(default))
    if len(text) > len(str(most)) or not text.isdecimal() or not 1 <= int(text) <= most:
        limits = f"a whole number from 1 to {most}"
        raise ApiError(400, f"{name} must be {limits}, got {shown(text)}", name)
    return int(text)
