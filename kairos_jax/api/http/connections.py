"""HTTP connections: how many there are, how long one may take to ask, and how one is cut off."""

import asyncio
import logging
from typing import Any

from starlette.types import Scope

from kairos_jax.api.http.protocol import PlainProtocol

log = logging.getLogger(__name__)

# From the opening of a connection, or the first byte of a request, to the end of its head.
HEAD_S = 10.0
_MAX_HEADER_BYTES = 64 << 10
_ABORT = "kairos.abort"


class Connections:
    """Those of one server. limit: more than so many are closed as they come."""

    def __init__(self, limit: int, head_s: float = HEAD_S):
        self.limit, self.head_s, self.num_open = limit, head_s, 0
        self._full = False

    def admit(self) -> bool:
        """Counts a connection that has come; False where it is to be closed."""
        self.num_open += 1
        full = self.num_open > self.limit
        if full and not self._full:  # once, until there is room again
            log.warning("%d HTTP connections are open, the most: others are closed", self.limit)
        self._full = full
        return not full

    def left(self) -> None:
        """A connection is gone."""
        self.num_open -= 1
        self._full = self._full and self.num_open >= self.limit


class Protocol(PlainProtocol):
    """Bounds the head of a request in bytes and in time: the parser would wait and gather without
    end.
    """

    def __init__(self, connections: Connections, **arguments: Any):
        super().__init__(**arguments)
        self._connections = connections
        self._num_header_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self._connections.admit():
            self._await_head()
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.left()
        self._end_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._num_header_bytes = 0
        self._await_head()
        super().on_message_begin()
        self.scope["extensions"] = {_ABORT: {"call": self.transport.abort}}  # type: ignore[typeddict-unknown-key]

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(name + value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._end_timer()
        super().on_headers_complete()

    def _count(self, data: bytes) -> None:
        self._num_header_bytes += len(data)
        if self._num_header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"the headers have more than {_MAX_HEADER_BYTES} bytes")

    def _await_head(self) -> None:
        self._end_timer()
        self._timer = self.loop.call_later(self._connections.head_s, self.transport.abort)

    def _end_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None


def abort(scope: Scope) -> None:
    """Cuts the connection of a request off, with what is not sent yet. Nothing happens behind a
    server that is not ours.
    """
    if call := scope.get("extensions", {}).get(_ABORT):
        call["call"]()
