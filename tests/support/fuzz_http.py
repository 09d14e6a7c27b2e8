"""HTTP by hand, for requests that no client library would send: what a server owes for some bytes,
and whether what it answers is HTTP and strict JSON.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import httptools

_STATUS = re.compile(rb"HTTP/1\.1 ([1-5]\d\d) [\t -~]*\Z")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([\t -~\x80-\xff]*)\Z")
_CHUNK = re.compile(rb"([0-9a-fA-F]+)\Z")
_UPGRADE = re.compile(rb"^upgrade[ \t]*:.*?\n", re.IGNORECASE | re.MULTILINE)

# What the live page's events have for `cache-control`, and those of other streams have not.
_LIVE = "no-store"


class NotHttp(Exception):
    """An answer is not what HTTP, or JSON, allows."""


@dataclass(slots=True)
class Answer:
    """One answer. headers: by name in lower case; of those that are repeated, the last."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def kind(self) -> str:
        """Its content type, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0]

    def check(self, whole: bool = True) -> None:
        """Raises NotHttp for JSON, or an event, that is none. whole: the body came to its end."""
        try:
            if self.kind == "application/json" and self.body:
                said = strict(self.body)
                if self.status >= 400:
                    _check_error(said)
            elif self.kind == "text/event-stream":
                *blocks, rest = self.body.decode("utf-8", "strict" if whole else "ignore").split(
                    "\n\n"
                )
                if whole and rest:
                    raise ValueError(f"an event without end: {rest[:200]!r}")
                for block in blocks:
                    _check_event(block)
        except (ValueError, KeyError, TypeError) as error:
            raise NotHttp(f"{self.status} {self.kind}: {error}: {self.body[:300]!r}") from error


def strict(body: bytes | str) -> object:
    """JSON as the standard has it: no NaN, no infinity. Raises ValueError."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    text = body.decode() if isinstance(body, bytes) else body
    return json.loads(text, parse_constant=refuse)


def _check_error(said: object) -> None:
    assert isinstance(said, dict)
    error = said["error"]
    if not isinstance(error["message"], str) or not error["message"] or not error["type"]:
        raise ValueError("an error without words")


def _check_event(block: str) -> None:
    if block.startswith(":") or block == "data: [DONE]":
        return
    if not block.startswith("data: ") or len(block.splitlines()) > 1:
        raise ValueError(f"no event: {block[:200]!r}")
    strict(block.removeprefix("data: "))


@dataclass(slots=True)
class Owed:
    """What a server owes for the bytes of one connection, by the parser that it uses too.

    methods: of the requests that are complete, as far as answers are due. ends: the connection is
    closed after the last answer, or at what is no HTTP.
    """

    methods: list[str] = field(default_factory=list)
    ends: bool = False


class _Requests:
    """Callbacks of httptools."""

    def __init__(self, owed: Owed):
        self.owed = owed
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def on_message_complete(self) -> None:
        if self.owed.ends:
            return
        self.owed.methods.append(self.parser.get_method().decode())
        kept = self.parser.should_keep_alive() and self.parser.get_http_version() != "1.0"
        self.owed.ends = not kept


def owed_for(raw: bytes) -> Owed:
    """What is owed for these bytes. `Upgrade` counts as if it were not there: this server never
    upgrades.
    """
    owed = Owed()
    requests = _Requests(owed)
    try:
        requests.parser.feed_data(_UPGRADE.sub(b"", raw))
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        owed.ends = True
    return owed


class Answers:
    """Reads the answers of one connection as their bytes come. methods: of the requests, in order;
    what comes beyond them is read as if it answered a GET.
    """

    def __init__(self, methods: Sequence[str]):
        self.done: list[Answer] = []
        self.num_bytes = 0
        self._methods, self._data = methods, b""
        self._partial: Answer | None = None

    def feed(self, data: bytes) -> None:
        """Raises NotHttp."""
        self.num_bytes += len(data)
        self._data += data
        while self._step():
            pass

    def end(self) -> None:
        """The server has closed the connection. Raises NotHttp where an answer is cut short."""
        if self._partial or self._data:
            raise NotHttp(f"an answer is cut short: {self._partial} {self._data[-300:]!r}")

    @property
    def has_no_end(self) -> bool:
        """Whether an answer has begun that goes on for ever: the events of the live page."""
        return self._partial is not None and self._partial.headers.get("cache-control") == _LIVE

    def left(self) -> None:
        """The client has left. Raises NotHttp where what it has got is wrong already."""
        if self._partial and self._partial.kind == "text/event-stream":
            self._partial.check(whole=False)

    def _step(self) -> bool:
        """Whether it has got any further."""
        if self._partial is None:
            return self._read_head()
        answer = self._partial
        if self._has_no_body(answer) or self._read_body(answer):
            self._partial = None
            if answer.status >= 200:
                answer.check()
                self.done.append(answer)
            return True
        return False

    def _read_head(self) -> bool:
        head, end, rest = self._data.partition(b"\r\n\r\n")
        if not end:
            if self._data and not b"HTTP/1.1 ".startswith(self._data[:9]):
                raise NotHttp(f"no status line: {self._data[:300]!r}")
            return False
        line, *lines = head.split(b"\r\n")
        found = _STATUS.match(line)
        headers = [_HEADER.match(each) for each in lines]
        if not found or not all(headers):
            raise NotHttp(f"no head: {head[:600]!r}")
        pairs = ((each[1].decode().lower(), each[2].decode("latin-1")) for each in headers if each)
        self._partial, self._data = Answer(int(found[1]), dict(pairs), b""), rest
        return True

    def _has_no_body(self, answer: Answer) -> bool:
        at = len(self.done)
        if at < len(self._methods) and self._methods[at] == "HEAD":
            # Not to HEAD, but to the connection, which is no HTTP any more.
            return not (answer.status == 400 and answer.kind == "text/plain")
        return answer.status < 200 or answer.status in (204, 304)

    def _read_body(self, answer: Answer) -> bool:
        """Whether it is complete."""
        if answer.headers.get("transfer-encoding") == "chunked":
            return self._read_chunks(answer)
        size = int(answer.headers.get("content-length", "-1"))
        if size < 0:
            raise NotHttp(f"a body of no known size: {answer}")
        if len(self._data) < size:
            return False
        answer.body, self._data = self._data[:size], self._data[size:]
        return True

    def _read_chunks(self, answer: Answer) -> bool:
        while True:
            line, end, rest = self._data.partition(b"\r\n")
            if not end:
                if len(line) > 16:
                    raise NotHttp(f"no chunk: {line[:300]!r}")
                return False
            if not (found := _CHUNK.match(line)):
                raise NotHttp(f"no chunk: {line[:300]!r}")
            size = int(found[1], 16)
            if len(rest) < size + 2:
                return False
            if rest[size : size + 2] != b"\r\n":
                raise NotHttp(f"a chunk without end: {rest[: size + 20][-300:]!r}")
            answer.body += rest[:size]
            self._data = rest[size + 2 :]
            if size == 0:
                return True
