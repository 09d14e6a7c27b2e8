"""HTTP/1.1 on one connection. A request to upgrade is answered as if it had not asked.

A server may ignore `Upgrade` (RFC 9110, section 7.8). Java's HTTP client asks for h2c with each
first request. The parser takes all bytes after the headers of such a request for the new protocol,
so they would be lost as its body.
"""

from collections.abc import Iterable

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class PlainProtocol(HttpToolsProtocol):
    """uvicorn's protocol, for a server that never upgrades a connection."""

    # The head of a request to upgrade, without `Upgrade`, until it is parsed again.
    _head: bytes | None = None

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):  # the latter: CONNECT
            message = "Invalid HTTP request received."
            self.logger.warning(message)
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
