"""HTTP/1.1 on one connection. A request to upgrade is answered as if it had not asked; and what
follows a request does not spoil its answer.

A server may ignore `Upgrade` (RFC 9110, section 7.8). Java's HTTP client asks for h2c with each
first request. The parser takes all bytes after the headers of such a request for the new protocol,
so they would be lost as its body.
"""

from collections.abc import Iterable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle


class PlainProtocol(HttpToolsProtocol):
    """uvicorn's protocol, for a server that never upgrades a connection."""

    # The head of a request to upgrade, without `Upgrade`, until it is parsed again.
    _head: bytes | None = None
    # The request that is being answered. `cycle` is the one that came last, which may have to wait.
    _answered: RequestResponseCycle | None = None
    # What came while it is answered is no HTTP: the connection ends with the answer.
    _is_spoilt = False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells the request that is being answered, and not only the one that came last."""
        if (answered := self._answered) and not answered.response_complete:
            answered.disconnected = True
            answered.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._is_spoilt:
            return
        try:
            self._parse(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):  # the latter: CONNECT
            message = "Invalid HTTP request received."
            self.logger.warning(message)
            answered = self._answered
            if answered and answered.response_started and not answered.response_complete:
                # Written now, the refusal would be in the middle of that answer.
                answered.keep_alive, self._is_spoilt = False, True
            else:
                self.send_400_response(message)

    def on_headers_complete(self) -> None:
        """Keeps back a request to upgrade."""
        method = self.parser.get_method()
        if self.parser.should_upgrade() and method != b"CONNECT":
            version = self.parser.get_http_version().encode()
            self._head = _head_of(method, self.url, version, self.headers)
        else:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The end of a request; nothing for one that is kept back."""
        if self._head is None:
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _parse(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self._head is None:
                    raise
                data, self._head = self._head + data[upgrade.args[0] :], None
                # A new one: the old one has met the end of HTTP.
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)


def _head_of(
    method: bytes, url: bytes, version: bytes, headers: Iterable[tuple[bytes, bytes]]
) -> bytes:
    lines = [b"%s %s HTTP/%s" % (method, url, version)]
    lines += [b"%s: %s" % (name, value) for name, value in headers if name != b"upgrade"]
    return b"\r\n".join([*lines, b"", b""])
