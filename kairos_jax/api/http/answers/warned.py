"""Tells a client of fields that were ignored though they look like known ones."""

import json
import logging
from collections.abc import Sequence

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-kairos-warning"
# Names are the clients' own: that many are logged, each once.
_MOST_LOGGED = 100

_log = logging.getLogger(__name__)


class Warnings:
    """Puts warnings into answers, and each name once into the log."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def on(self, answer: ASGIApp, near_misses: Sequence[tuple[str, str]]) -> ASGIApp:
        """The same answer, with a header for fields that are near known ones, if there are any."""
        if not near_misses:
            return answer
        words = [_words(name, known) for name, known in near_misses]
        for (name, _), text in zip(near_misses, words, strict=True):
            if name not in self._logged and len(self._logged) < _MOST_LOGGED:
                self._logged.add(name)
                _log.warning("of a request, %s", text)

        async def warned(scope: Scope, receive: Receive, send: Send) -> None:
            async def with_header(message: Message) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message)[HEADER] = "; ".join(words)
                await send(message)

            await answer(scope, receive, with_header)

        return warned


def _words(name: str, known: str) -> str:
    # As JSON, which has no character that a header may not.
    return f"field {json.dumps(name)} is not known and was ignored: {json.dumps(known)} is known"
