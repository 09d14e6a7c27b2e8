"""Tells a client of fields that were ignored though they look like known ones."""

import json
import logging
from collections.abc import Iterable

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-kairos-warning"
_KEY = "kairos_jax.near_misses"  # of a request's scope
# Names are the clients' own: that many are logged, each once.
_MOST_LOGGED = 100

_log = logging.getLogger(__name__)


def warn(request: Request, near_misses: Iterable[tuple[str, str]]) -> None:
    """Has the answer to a request, be it an error, say which fields are near known ones."""
    request.scope[_KEY] += near_misses


class Warned:
    """The middleware that puts these warnings into answers, and each name once into the log."""

    def __init__(self, app: ASGIApp):
        self._app = app
        self._logged: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        near: list[tuple[str, str]] = []
        scope[_KEY] = near

        async def with_header(message: Message) -> None:
            if near and message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = "; ".join(self._words(near))
            await send(message)

        await self._app(scope, receive, with_header)

    def _words(self, near: Iterable[tuple[str, str]]) -> list[str]:
        words = []
        for name, known in near:
            # As JSON, which has no character that a header may not.
            quoted, ours = json.dumps(name), json.dumps(known)
            words.append(f"field {quoted} is not known and was ignored: {ours} is known")
            if name not in self._logged and len(self._logged) < _MOST_LOGGED:
                self._logged.add(name)
                _log.warning("of a request, %s", words[-1])
        return words
