"""HTTP connections: how many there are, and how long a client may take for its part."""

import asyncio
import logging
from typing import Any

from kairos_jax.api.http.protocol import PlainProtocol
from kairos_jax.api.slots import WRITE_S

log = logging.getLogger(__name__)

# From the opening of a connection, or the first byte of a request, to the end of its head.
HEAD_S = 10.0
# From there to the end of its body. The reader of the body (`guard.py`) has a shorter limit, and
# answers the client; this one ends connections whose body nobody reads.
BODY_S = 65.0
_MAX_HEADER_BYTES = 64 << 10


class Connections:
    """Those of one server. limit: more than so many are closed as they come."""

    def __init__(self, limit: int):
        self.limit, self.num_open = limit, 0
        self.head_s, self.body_s, self.write_s = HEAD_S, BODY_S, WRITE_S
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
    """Bounds what a client may take for each thing that it must do, whatever it asks for: to send a
    head, in time and bytes, and a body, to read its answer, and to ask again. uvicorn would wait
    without end, and takes any byte for a sign of life.
    """

    def __init__(self, connections: Connections, **arguments: Any):
        super().__init__(**arguments)
        self._connections = connections
        self._num_header_bytes = 0
        # Of what the client sends at present, and of what it is to read.
        self._sending: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self._connections.admit():
            self._await(self._connections.head_s)
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.left()
        self._sending = _ended(self._sending)
        self._reading = _ended(self._reading)
        super().connection_lost(exc)

    # What it sends.

    def on_message_begin(self) -> None:
        self._unset_keepalive_if_required()
        self._num_header_bytes = 0
        self._await(self._connections.head_s)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(name + value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._await(self._connections.body_s)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._sending = _ended(self._sending)
        super().on_message_complete()

    def _count(self, data: bytes) -> None:
        self._num_header_bytes += len(data)
        if self._num_header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"the headers have more than {_MAX_HEADER_BYTES} bytes")

    def _await(self, seconds: float) -> None:
        _ended(self._sending)
        self._sending = self.loop.call_later(seconds, self._not_sent, seconds)

    def _not_sent(self, seconds: float) -> None:
        if self._is_spoilt:  # the connection ends with the answer
            return
        if self.flow.read_paused:  # it is this server that does not read on
            self._await(seconds)
        else:
            self.transport.abort()

    # What it reads.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._reading = _ended(self._reading)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._sending and self.cycle.response_complete and not self.cycle.more_body:
            self._unset_keepalive_if_required()  # the head of the next request has begun
        self._close_in_time()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._close_in_time()

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        self._close_in_time()

    def shutdown(self) -> None:
        super().shutdown()
        self._close_in_time()

    def _close_in_time(self) -> None:
        """A connection closes when its last bytes are read, so these have a limit too."""
        if self.transport.is_closing():
            self._await_reader()

    def _await_reader(self) -> None:
        if self._reading is None:
            limit_s = self._connections.write_s
            self._reading = self.loop.call_later(limit_s, self._not_read, limit_s)

    def _not_read(self, limit_s: float) -> None:
        if self.flow.write_paused:
            log.warning("a client has read nothing of its answer for %g s: it is cut off", limit_s)
        self.transport.abort()


def _ended(timer: asyncio.TimerHandle | None) -> None:
    if timer:
        timer.cancel()
