"""Requests that no well-behaved client sends, for both public APIs.

hypothesis makes the first of them, from strategies; that takes milliseconds for each, so all others
are those, varied at random: fields swapped between bodies, bytes cut, doubled, flipped and spliced.
Both are drawn by one seed: the same seed makes the same requests in the same order.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpc_health.v1 import health_pb2
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from kairos_jax.api.http.body import known
from kairos_jax.rpc import kairos_pb2 as pb

HOST = "127.0.0.1"
# Of the tiny model.
_VOCAB, _CONTEXT = 264, 128
_GENERATED = ("/v1/completions", "/v1/chat/completions")
_POSTED = (*_GENERATED, "/tokenize", "/detokenize")


@dataclass(frozen=True, slots=True)
class Json:
    """A token of a JSON text, as it is to be sent."""

    text: str


@dataclass(frozen=True, slots=True)
class Pairs:
    """A JSON object by its members in order, which may have one name twice."""

    members: tuple[tuple[str, Any], ...]


def text_of(value: Any, ascii: bool = True) -> str:
    """JSON, or what looks like it."""
    match value:
        case Json():
            return value.text
        case Pairs():
            parts = (f"{json.dumps(name, ensure_ascii=ascii)}:" for name, _ in value.members)
            each = (text_of(member, ascii) for _, member in value.members)
            return "{" + ",".join(map("".join, zip(parts, each, strict=True))) + "}"
        case list() | tuple():
            return "[" + ",".join(text_of(each, ascii) for each in value) + "]"
    return json.dumps(value, ensure_ascii=ascii)


@dataclass(frozen=True, slots=True)
class Body:
    """A JSON request. ascii: other characters are escaped. leave_at: so many bytes of the answer
    are read, and no more.
    """

    path: str
    pairs: Pairs
    headers: tuple[tuple[bytes, bytes], ...] = ()
    ascii: bool = True
    leave_at: int | None = None
    method: str = "POST"

    def sent(self) -> "Sent":
        """As bytes."""
        return Sent("json" if self.leave_at is None else "leaver", self._raw(), self.leave_at)

    def _raw(self) -> bytes:
        body = text_of(self.pairs, self.ascii).encode("utf-8", "surrogatepass")
        lines = [f"{self.method} {self.path} HTTP/1.1".encode(), b"host: " + HOST.encode()]
        lines += [b"content-length: %d" % len(body)]
        lines += [name + b": " + value for name, value in self.headers]
        return b"\r\n".join([*lines, b"", body])


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes for one connection: to the gRPC port if the kind is "http2", else to that of HTTP.

    leave_at: so many bytes of the answer are read, and no more. cuts: where the bytes are cut into
    writes. between: so many bytes of an answer are read before the last write. abrupt: the client
    resets the connection when it is done.
    """

    kind: str
    raw: bytes
    leave_at: int | None = None
    cuts: tuple[int, ...] = ()
    between: int = 0
    abrupt: bool = False

    def sent(self) -> "Sent":
        """Itself."""
        return self


@dataclass(frozen=True, slots=True)
class Call:
    """A gRPC call whose messages are bytes. deadline_s: None for a long one. cancel_at: after so
    many messages of the answer the client cancels.
    """

    method: str
    messages: tuple[bytes, ...]
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    deadline_s: float | None = None
    cancel_at: int | None = None


Case = Body | Sent | Call

# Values of fields.

_TEXTS = (
    *(
        "",
        "a",
        "hello",
        "\0",
        "\U0001f600" * 2000,
        "\ud800",
        "a\udfff",
        "\u2028\u0085",
        "\U0001f600" * 40,
        "é" * 300,
    ),
    *("x" * 257, "x" * 5000, "<s>", "</s>", "{{ 1 }}", "{% for", "1", "nan", "true", "\r\nx: y"),
)
_NUMBERS = (
    *(0, 1, -1, 2, 20, 21, 64, 65, 127, 128, 129, _VOCAB, 2**31 - 1, 2**31, -(2**31) - 1),
    *(2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 10**30, 10**400),
    *(0.5, 1.0, -0.0, 2.5, 1e308, -1e308, 5e-324, 1e-46, 1e39, 3.4028235e38),
    *(float("nan"), float("inf"), float("-inf")),
)
_TOKENS = (
    *("1e400", "-1e400", "01", "-", "+1", "1.", ".5", "0x10", "1_0", "tru", "nul", "'a'", '"'),
    *('"\\x"', '"\\ud800"', '"\\ud83d\\ude00"', '"\n"', "", "[", "{", "[1,]", '{"a":1,}', "/**/1"),
    *("NaN", "-Infinity", "undefined", "9" * 4300, "9" * 5000, "1" + "0" * 400 + ".0"),
)


def _nested(depth: int, kind: str) -> Json:
    opening, inner, closing = {"list": ("[", "1", "]"), "object": ('{"a":', "1", "}")}[kind]
    return Json(opening * depth + inner + closing * depth)


# Around the depth at which Python's own reader and writer of JSON give up, and far beyond it.
_depths = st.one_of(st.integers(1, 30), st.integers(850, 1010), st.sampled_from((5000, 100_000)))
_deep = st.builds(_nested, _depths, st.sampled_from(("list", "object")))
_texts = st.one_of(
    st.sampled_from(_TEXTS), st.text(st.characters(exclude_categories=()), max_size=12)
)
_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(_NUMBERS),
    st.integers(-3, 40),
    st.floats(),
    _texts,
)
_odd = st.one_of(
    _scalars,
    _scalars,
    _deep,
    st.sampled_from(_TOKENS).map(Json),
    st.lists(_scalars, max_size=4),
    st.lists(st.tuples(_texts, _scalars), max_size=3).map(lambda each: Pairs(tuple(each))),
    st.lists(st.lists(_scalars, max_size=2), max_size=3),
)

# What a field is sent for, by name; among the odd values, so that requests are served too.
_PLAUSIBLE: dict[str, tuple[Any, ...]] = {
    "model": (None,),
    "n": (1, 2, 3, 16, 17),
    "best_of": (1, 2),
    "max_tokens": (0, 1, 2, 5, 64, 65),
    "max_completion_tokens": (1, 2, 64),
    "min_tokens": (0, 1, 2),
    "temperature": (0, 0.7, 1, 100.0, 1e-8),
    "top_p": (1, 0.5, 1e-7),
    "top_k": (-1, 0, 1, 5, 10**6),
    "min_p": (0, 0.1, 1),
    "seed": (0, 7, -1, 2**63 - 1),
    "stop": ("a", ["a", "\n"], "", ["x"] * 17, "s" * 256),
    "stop_token_ids": ([], [5], [_VOCAB - 1], [_VOCAB], [-1], list(range(200))),
    "logprobs": (0, 1, 20, True, False),
    "top_logprobs": (0, 2, 20),
    "stream_options": (
        Pairs((("include_usage", True),)),
        Pairs((("include_usage", True), ("continuous_usage_stats", True), ("include_usag", 1))),
    ),
    "slo": (
        Pairs((("ttft_ms", 1000), ("tpot_ms", 100))),
        Pairs((("ttft_ms", 0.1),)),
        Pairs((("ttft_ms", 1e300), ("tpot_ms", -1))),
        Pairs((("ttft", 1),)),
    ),
    "truncate_prompt_tokens": (-1, 1, 5, 127, 128, 0),
    "request_id": ("same", "other", "é", "x" * 256, "x" * 257),
    "chat_template": (
        "{{ messages[0].content }}",
        "{{ messages[0].content * 100000000 }}",
        "{{ raise_exception('no') }}",
        "{{ messages.x.y }}",
        "{% set ns = namespace() %}{{ ns.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "x" * 65537,
        "{{ '\\ud800' }}",
        "{% include 'a' %}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ x }}",
    ),
    "chat_template_kwargs": (
        Pairs((("x", 1),)),
        Pairs((("messages", 1), ("add_generation_prompt", "no"))),
        Pairs((("x", Json("[" * 900 + "]" * 900)),)),
        Pairs((("bos_token", Pairs(())),)),
    ),
}
_FLAGS = (True, False)

_contents = st.one_of(
    st.sampled_from(("hi", "", "long " * 200)),
    _texts,
    st.lists(
        st.one_of(
            st.just(Pairs((("type", "text"), ("text", "hi")))),
            st.tuples(_scalars, _scalars).map(
                lambda each: Pairs((("type", each[0]), ("text", each[1])))
            ),
            _odd,
        ),
        max_size=3,
    ),
    _odd,
)
_roles = st.one_of(st.sampled_from(("user", "assistant", "system", "developer", "tool")), _scalars)
_HI = [Pairs((("role", "user"), ("content", "hi")))]
_messages = st.one_of(
    st.just([Pairs((("role", "user"), ("content", "hi")))]),
    st.lists(
        st.tuples(
            _roles, _contents, st.sampled_from((*known.NEUTRAL_OF_MESSAGE, "name")), _odd
        ).map(lambda each: Pairs((("role", each[0]), ("content", each[1]), (each[2], each[3])))),
        max_size=3,
    ),
    st.lists(st.tuples(_roles, _contents), max_size=3).map(
        lambda turns: [Pairs((("role", role), ("content", said))) for role, said in turns]
    ),
    _odd,
)
_good_prompts = st.sampled_from(("hello", [5, 6, 7], [[5], [6, 7]], ["a", "b"]))
_prompts = st.one_of(
    st.sampled_from(("hello", [5, 6, 7], [[5], [6, 7]], ["a", "b"], ["a", [5]], [[]], [], [True])),
    st.lists(st.integers(-1, _VOCAB), max_size=140),
    st.lists(st.sampled_from(_NUMBERS[:21]), min_size=1, max_size=3),
    _texts,
    _odd,
)

_NAMES = tuple(
    sorted({*known.SERVED, *known.OF_COMPLETIONS, *known.OF_CHAT, *known.NEUTRAL, *known.HARMLESS})
)
_UNKNOWN = ("max_token", "temprature", "stream_option", "streem", "\ud800stop", "", "x" * 64, "é")


@st.composite
def _fields(draw) -> tuple[str, Any]:
    """One field of a body, by name: often with a value that it is sent for."""
    name = draw(st.sampled_from((*_NAMES, *sorted(known.SERVED), *_UNKNOWN)))
    special = {"prompt": _prompts, "messages": _messages}.get(name, _odd)
    usual = (*_PLAUSIBLE.get(name, _FLAGS), *known.NEUTRAL.get(name, ()))
    return name, draw(st.one_of(st.sampled_from(usual), special))


def _members(value: Any) -> Any:
    """Objects among neutral values, as `Pairs`."""
    return Pairs(tuple(value.items())) if isinstance(value, dict) else value


# Headers of any request.

_HOSTS = (
    b"127.0.0.1",
    b"localhost:80",
    b"[::1]",
    b"evil.example",
    b"",
    b"a b",
    b"\xff",
    b"[",
    b":",
)
_ORIGINS = (
    b"null",
    b"http://127.0.0.1",
    b"https://evil.example",
    b"http://localhost:1",
    b"\xe9",
    b"",
)
_TYPES = (
    *(b"application/json", b"application/json; charset=utf-16", b"text/plain", b"", b";", b"\xff"),
    *(b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=", b"APPLICATION/JSON"),
)
_ACCEPTS = (
    b"*/*",
    b"application/openmetrics-text",
    b"application/openmetrics-text; version=1.0.0",
    b"application/openmetrics-text; version=x",
    b"application/openmetrics-text; version=",
    b"application/openmetrics-text; version=1=2; =",
    b"application/openmetrics-text; version=1.0.0; escaping=values",
    b"application/openmetrics-text; version=1.0.0; escaping=x; escaping",
    b"text/plain; version=1.0.0; escaping=",
    b"text/plain; version=9" + b"9" * 5000,
    b";=,",
)
_DURATIONS = (
    *(b"1", b"1e3", b"nan", b"inf", b"-1", b"1e400", b"1_0", b"", b"x", b"0x1", b" 5 ", b"0.0001"),
    *(b"9" * 400, b"\xb2", b"1,2", b"604800001"),
)
_NAMED: dict[bytes, tuple[bytes, ...]] = {
    b"host": _HOSTS,
    b"origin": _ORIGINS,
    b"content-type": _TYPES,
    b"accept": _ACCEPTS,
    b"x-request-id": (b"same", b"x" * 256, b"x" * 257, b"\xe9", b"", b"a\tb"),
    b"x-slo-ttft-ms": _DURATIONS,
    b"x-slo-tpot-ms": _DURATIONS,
    b"x-llm-d-slo-ttft-ms": _DURATIONS,
    b"x-llm-d-slo-tpot-ms": _DURATIONS,
    b"traceparent": (b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01", b"00-0-0-0", b"\xff", b""),
    b"tracestate": (b"a=b", b"=" * 600, b"\xe9=\xe9"),
    b"authorization": (b"Bearer x", b"Bearer \xff", b"Basic Og==", b""),
    b"expect": (b"100-continue", b"x"),
    b"connection": (b"close", b"keep-alive", b"upgrade", b"close, keep-alive", b"te", b"\xff"),
    b"sec-fetch-site": (b"cross-site", b"none", b"\xff"),
    b"content-encoding": (b"gzip", b"br", b"\xff"),
    b"range": (b"bytes=0-1", b"bytes=-", b"x"),
    b"cookie": (b"a=b", b"=" * 5000),
    b"x-forwarded-for": (b"1.2.3.4", b"x" * 300),
}
_HEADERS = tuple((name, value) for name, values in _NAMED.items() for value in values)
_headers = st.lists(st.sampled_from(_HEADERS), max_size=3).map(tuple)
_json_type = st.just(((b"content-type", b"application/json"),))
_json_headers = st.one_of(st.just(()), _json_type, _json_type, _headers)


@st.composite
def bodies(draw) -> Body:
    """A request to one of the routes that take a body."""
    path = draw(st.sampled_from((*_GENERATED, *_POSTED)))
    pairs: list[tuple[str, Any]] = []
    is_odd = draw(st.integers(0, 3)) == 0
    if path == "/detokenize":
        pairs.append(("tokens", draw(_prompts) if is_odd else [5, 6]))
    elif path == "/v1/chat/completions" or (path == "/tokenize" and draw(st.booleans())):
        pairs.append(("messages", draw(_messages) if is_odd else _HI))
    else:
        pairs.append(("prompt", draw(_prompts) if is_odd else draw(_good_prompts)))
    if path in _GENERATED:
        pairs += [("max_tokens", draw(st.integers(1, 3))), ("temperature", 0)]
        if draw(st.booleans()):
            pairs.append(("stream", True))
    count = draw(st.sampled_from((0, 1, 1, 1, 1, 2, 2, 3)))
    odd = draw(st.lists(_fields(), min_size=count, max_size=count))
    if draw(st.integers(0, 9)) == 0:
        del pairs[draw(st.integers(0, len(pairs) - 1))]
    pairs += [(name, _members(value)) for name, value in odd]
    leave_at = draw(st.integers(0, 700)) if draw(st.integers(0, 9)) == 0 else None
    if leave_at is not None:
        pairs += [("stream", True), ("max_tokens", draw(st.sampled_from((8, 64))))]
    return Body(
        path, Pairs(tuple(pairs)), draw(_json_headers), draw(st.integers(0, 3)) > 0, leave_at
    )


# Bytes.

_METHODS = (
    *(b"GET", b"POST", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE", b"CONNECT", b"PRI"),
    *(b"get", b"PATCH", b"G\0T", b"", b"M-SEARCH", b"QUERY", b"X" * 300, b"G\xc9T", b"PURGE"),
)
_VERSIONS = (
    *(b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.2", b"HTTP/9.9", b"HTTP/1.1 ", b"http/1.1"),
    *(b"", b"HTTP/1", b"HTTP/11.1", b"HTTP/-1.1", b"ICE/1.0", b"RTSP/1.0", b"HTTP/1.1\0"),
)
_TARGETS = (
    *(b"*", b"/", b"//", b"/../..", b"/page/../x", b"/page/%2e%2e/index.html", b"/v1/models/"),
    *(b"/%00", b"/%ff%fe", b"/\xc3\xa9", b"/ x", b"/a\tb", b"?", b"/?" + b"a=b&" * 300, b"", b"#"),
    *(
        b"http://127.0.0.1/health",
        b"http://evil.example/metrics",
        b"ftp://x/",
        b"http://[::1",
        b"x",
    ),
    *(b"/" + b"a" * 70_000, b"/v1/models/" + b"%f0%9f%98%80" * 50, b"/%", b"/%zz", b"/health/"),
    *(b"/health;x=1", b"/health?%", b"/HEALTH", b"/.git/config", b"http://a:b@127.0.0.1:99999/x"),
    *(b"/debug/profile?steps=0", b"/debug/profile?steps=1e3", b"/debug/profile?seconds=\xc2\xb2"),
    *(b"/debug/profile?steps=%D9%A1", b"/debug/schedule", b"/debug/", b"/debug/x/y"),
)
_FRAMINGS = (
    (b"content-length", b"0"),
    (b"content-length", b"1"),
    (b"content-length", b"100000"),
    (b"content-length", b"9000000"),
    (b"content-length", b"99999999999999999999999"),
    (b"content-length", b"18446744073709551615"),
    (b"content-length", b"-1"),
    (b"content-length", b"+5"),
    (b"content-length", b"0x10"),
    (b"content-length", b"1_0"),
    (b"content-length", b""),
    (b"content-length", b"5, 5"),
    (b"content-length", b" 5 "),
    (b"transfer-encoding", b"chunked"),
    (b"transfer-encoding", b"gzip, chunked"),
    (b"transfer-encoding", b"chunked, gzip"),
    (b"transfer-encoding", b"identity"),
    (b"transfer-encoding", b"xchunked"),
    (b"upgrade", b"websocket"),
    (b"upgrade", b"h2c"),
    (b"upgrade", b"\xff"),
    (b"http2-settings", b"AAMAAABkAAQAAP__"),
    (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="),
)
_BAD_HEADERS = (
    *(b"no colon", b": no name", b"a b: c", b"a\0: b", b"a: \0", b" folded", b"\tfolded", b"a :b"),
    *(
        b"x: " + b"y" * 70_000,
        b"z" * 70_000 + b": 1",
        b"\xff: 1",
        b"a: \x7f",
        b"(: 1",
        b"a: b\rc: d",
    ),
    b"\r\n".join(b"h%d: 1" % at for at in range(300)),
    b"\r\n".join(b"h%d: %s" % (at, b"v" * 60) for at in range(1200)),
)
_GARBAGE = (
    *(
        b"\0",
        b"\r\n",
        b"\r\n\r\n",
        b"\n" * 300,
        b"\xff" * 100,
        b"GET",
        b"GET /",
        b"GET / HTTP/1.1\r\n",
    ),
    *(
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x11" * 64,
        b"SSH-2.0-x\r\n",
        b"*1\r\n$4\r\n",
    ),
    *(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
        b"{" * 1000,
        b"HTTP/1.1 200 OK\r\n\r\n",
    ),
)
_CHUNKED = (
    b"0\r\n\r\n",
    b"5\r\nhello\r\n0\r\n\r\n",
    b"5;ext=1\r\nhello\r\n0\r\ntrailer: 1\r\n\r\n",
    b"5\r\nhel",
    b"5\r\nhelloXX0\r\n\r\n",
    b"-1\r\nx\r\n0\r\n\r\n",
    b"fffffffffffffffff\r\nx",
    b"7fffffff\r\nx",
    b"x\r\n\r\n",
    b"\r\n\r\n",
    b"5\nhello\n0\n\n",
    b"0\r\n" + b"t: 1\r\n" * 20 + b"\r\n",
    b"0\r\nt: " + b"x" * 70_000 + b"\r\n\r\n",
    b"1;" + b"e" * 20_000 + b"\r\nx\r\n0\r\n\r\n",
)
_GOOD = text_of(Pairs((("prompt", "hello"), ("max_tokens", 2)))).encode()
_STREAM = text_of(Pairs((("prompt", "hello"), ("max_tokens", 24), ("stream", True)))).encode()


_PLACES = ("method", "target", "version", "host", "head", "frame")


@st.composite
def requests(draw, paths: Sequence[str]) -> bytes:
    """One HTTP request, of which a few things are wrong."""
    wrong = draw(st.sets(st.sampled_from(_PLACES), max_size=2))
    target = draw(st.sampled_from(paths)).encode()
    posted = target.decode() in _POSTED and draw(st.integers(0, 4))
    method = b"POST" if posted else b"GET"
    if "method" in wrong:
        method = draw(st.sampled_from(_METHODS))
    if "target" in wrong:
        target = draw(
            st.one_of(st.sampled_from(_TARGETS), st.binary(max_size=20).map(b"/".__add__))
        )
    version = draw(st.sampled_from(_VERSIONS)) if "version" in wrong else b"HTTP/1.1"
    lines = [method + b" " + target + b" " + version]
    if "host" not in wrong or draw(st.booleans()):
        lines.append(
            b"host: " + (draw(st.sampled_from(_HOSTS)) if "host" in wrong else b"127.0.0.1")
        )
    lines += [name + b": " + value for name, value in draw(_headers)]
    body = draw(st.sampled_from((_GOOD, _STREAM, b"{}", b"", b"\xff\xfe{}"))) if posted else b""
    if "frame" in wrong:
        framing = draw(st.lists(st.sampled_from(_FRAMINGS), max_size=3))
        lines += [name + b": " + value for name, value in framing]
        if draw(st.booleans()):
            body = draw(st.one_of(st.sampled_from(_CHUNKED), st.binary(max_size=60)))
    elif body or posted:
        if draw(st.integers(0, 3)):
            lines.append(b"content-length: %d" % len(body))
        else:
            lines.append(b"transfer-encoding: chunked")
            body = (b"%x\r\n%s\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"
    if "head" in wrong:
        at = draw(st.integers(1, len(lines)))
        lines.insert(at, draw(st.one_of(st.sampled_from(_BAD_HEADERS), st.binary(max_size=40))))
    eol = draw(st.sampled_from((b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"\r\r\n")))
    return eol.join([*lines, b"", body])


# Until an answer has ended, or the middle of it.
_bytes_read = st.one_of(st.just(1 << 30), st.integers(1, 400))


@st.composite
def streams_of_bytes(draw, paths: Sequence[str]) -> Sent:
    """What one connection carries: a request, several, a part of one, or none at all."""
    shape = draw(st.sampled_from(("one", "one", "several", "cut", "garbage", "late")))
    one = requests(paths)
    if shape == "garbage":
        raw = draw(st.one_of(st.sampled_from(_GARBAGE), st.binary(max_size=300)))
    elif shape == "several":
        raw = b"".join(draw(st.lists(one, min_size=2, max_size=5)))
    else:
        raw = draw(one)
    if shape == "cut":
        raw = raw[: draw(st.integers(0, len(raw)))]
    abrupt, cuts, between = draw(st.integers(0, 3)) == 0, (), 0
    if shape == "late":  # While an answer is under way.
        first = Body("/v1/completions", Pairs((("prompt", "hi"), ("stream", True)))).sent().raw
        raw, cuts, between = first + raw, (len(first),), draw(_bytes_read)
    elif draw(st.integers(0, 3)) == 0:
        cuts = tuple(sorted(draw(st.sets(st.integers(0, len(raw)), max_size=3))))
    leave_at = draw(st.integers(0, 300)) if draw(st.integers(0, 19)) == 0 else None
    return Sent("bytes", raw, leave_at, cuts, between, abrupt)


_QUERIES = ("", "", "?", "?a=%zz", "?steps=1&seconds=1", "?steps=0", "?steps=x&seconds=1")


@st.composite
def plain(draw, paths: Sequence[str]) -> Sent:
    """A request without a body to each route there is. The live page has no end: it is left."""
    path = draw(st.sampled_from(paths))
    method = draw(st.sampled_from((b"GET", b"GET", b"GET", b"HEAD", b"OPTIONS", b"POST", b"PUT")))
    asked = draw(st.sampled_from(_QUERIES))
    lines = [method + b" " + (path + asked).encode() + b" HTTP/1.1", b"host: 127.0.0.1"]
    lines += [name + b": " + value for name, value in draw(_headers)]
    leave_at = draw(st.integers(1, 600)) if path == "/live" else None
    return Sent("bytes", b"\r\n".join([*lines, b"", b""]), leave_at)


# gRPC.

_GENERATE = "/kairos.v1.Kairos/Generate"
_OTHER_METHODS = (
    "/kairos.v1.Kairos/GetModel",
    "/kairos.v1.Kairos/Nope",
    "/kairos.v1.Kairos/generate",
    "/kairos.v1.Kairos/",
    "/kairos.v1.Nope/Generate",
    "/kairos.internal.v1.Worker/Link",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/x",
    "//",
    "/a/b/c",
    "/" + "a" * 3000,
    "/kairos.v1.Kairos/G%00",
)
_METADATA = (
    ("authorization", "Bearer x"),
    ("authorization", ""),
    ("traceparent", "00-" + "1" * 32 + "-" + "2" * 16 + "-01"),
    ("traceparent", "00-x"),
    ("tracestate", "=" * 600),
    ("x-bin", b"\0\xff" * 20),
    ("traceparent-bin", b"\xff"),
    ("grpc-encoding", "gzip"),
    ("grpc-accept-encoding", "x"),
    ("grpc-timeout", "1n"),
    ("content-type", "application/json"),
    ("te", "x"),
    ("user-agent", "x" * 300),
    ("x-long", "y" * 6000),
    ("x-longer", "y" * 20_000),
    ("retry-after-s", "nan"),
    ("host", "evil.example"),
)
_INT32 = (0, 1, -1, 2, 20, 21, 64, 65, 127, 128, _VOCAB - 1, _VOCAB, 2**31 - 1, -(2**31))
_int32 = st.one_of(st.sampled_from(_INT32), st.integers(-(2**31), 2**31 - 1))
_small = st.integers(1, 3)
_floats = st.one_of(
    st.sampled_from((0.0, 1.0, 0.5, -1.0, float("nan"), float("inf"), -float("inf"), 1e-45, 3e38)),
    st.floats(width=32),
)
_doubles = st.one_of(_floats, st.floats(), st.sampled_from((1e308, 5e-324, 1e-4, 604_800.0)))
_proto_texts = _texts.map(lambda text: text.encode(errors="replace").decode())
_ids = st.lists(st.one_of(st.integers(0, _VOCAB - 1), _int32), max_size=20)
_few_ids = st.lists(st.integers(0, _VOCAB - 1), min_size=1, max_size=8)

_samplings = st.builds(
    pb.Sampling,
    temperature=st.one_of(st.none(), st.just(0.0), _floats),
    top_k=st.one_of(st.none(), _int32),
    top_p=st.one_of(st.none(), st.just(1.0), _floats),
    min_p=st.one_of(st.none(), st.none(), _floats),
    seed=st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
    logprobs=st.one_of(st.none(), st.none(), _int32),
    stop_token_ids=st.one_of(st.just([]), _ids),
    ignore_eos=st.booleans(),
    prompt_logprobs=st.one_of(st.none(), st.none(), st.none(), _int32),
)
_usual_samplings = st.builds(
    pb.Sampling, temperature=st.sampled_from((0, 1)), logprobs=st.sampled_from((None, 0, 20))
)
_slos = st.builds(
    pb.Slo, ttft_s=st.one_of(st.none(), _doubles), tpot_s=st.one_of(st.none(), _doubles)
)
_turns = st.builds(pb.Message, role=_proto_texts, content=_proto_texts)
_kwargs = st.one_of(
    st.none(), _odd.map(text_of).map(lambda text: text.encode("utf-8", "replace").decode())
)
_chats = st.builds(
    pb.Chat,
    messages=st.lists(
        st.one_of(st.just(pb.Message(role="user", content="hi")), _turns), max_size=3
    ),
    add_generation_prompt=st.one_of(st.none(), st.booleans()),
    continue_final_message=st.booleans(),
    template=st.one_of(
        st.none(),
        st.none(),
        st.sampled_from([each for each in _PLAUSIBLE["chat_template"] if isinstance(each, str)]),
        _proto_texts,
    ),
    template_kwargs=_kwargs,
)


@st.composite
def messages(draw) -> bytes:
    """A GenerateRequest; a few have two prompts, of which by protobuf's rules the last counts."""
    asked = pb.GenerateRequest()
    for kind in draw(
        st.sampled_from((("ids",), ("ids",), ("text",), ("chat",), ("ids", "text"), ()))
    ):
        if kind == "ids":
            asked.token_ids.CopyFrom(pb.TokenIds(ids=draw(st.one_of(_few_ids, _few_ids, _ids))))
        elif kind == "text":
            asked.text = draw(_proto_texts)
        else:
            asked.chat.CopyFrom(draw(_chats))
    raw = b""
    if draw(st.integers(0, 9)) == 0:
        raw = pb.GenerateRequest(text="both").SerializeToString()
    if draw(st.integers(0, 9)):
        asked.max_tokens = draw(st.one_of(_small, _small, _small, _int32))
    if draw(st.booleans()):
        asked.sampling.CopyFrom(draw(st.one_of(_usual_samplings, _samplings)))
    if draw(st.integers(0, 3)) == 0:
        asked.slo.CopyFrom(draw(_slos))
    if draw(st.integers(0, 4)) == 0:
        asked.truncate_prompt_tokens = draw(_int32)
    if draw(st.integers(0, 4)) == 0:
        asked.request_id = draw(_proto_texts)
    if draw(st.integers(0, 9)) == 0:
        asked.model = draw(_proto_texts)
    if draw(st.integers(0, 9)) == 0:
        asked.add_special_tokens = draw(st.booleans())
    return raw + asked.SerializeToString()


@st.composite
def calls(draw) -> Call:
    """One gRPC call."""
    method = _GENERATE if draw(st.integers(0, 4)) else draw(st.sampled_from(_OTHER_METHODS))
    raw = draw(messages()) if draw(st.integers(0, 9)) else draw(st.binary(max_size=60))
    if method.startswith("/grpc.health"):
        name = draw(st.sampled_from(("", "kairos.v1.Kairos", "x")))
        raw = health_pb2.HealthCheckRequest(service=name).SerializeToString()
    count = draw(st.sampled_from((1,) * 18 + (0, 2)))
    metadata = draw(st.lists(st.sampled_from(_METADATA), max_size=2)) if draw(st.booleans()) else []
    deadline = draw(st.sampled_from((None,) * 6 + (0.0, 0.001, 0.005, 0.02)))
    if method.endswith("/Watch"):
        deadline = 0.02  # It has no end.
    cancel_at = draw(st.sampled_from((None,) * 8 + (0, 1, 2)))
    return Call(method, (raw,) * count, tuple(metadata), deadline, cancel_at)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@st.composite
def frames(draw) -> bytes:
    """A frame of HTTP/2, in which anything may be wrong."""
    payload = draw(st.one_of(st.just(b""), st.just(bytes(8)), st.binary(max_size=40)))
    size = draw(st.one_of(st.just(len(payload)), st.sampled_from((0, 1, 16_385, 2**24 - 1))))
    kind, flags = draw(st.integers(0, 12)), draw(st.sampled_from((0, 1, 4, 5, 8, 0x20, 0xFF)))
    stream = draw(st.sampled_from((0, 1, 2, 3, 2**31 - 1, 2**31)))
    return size.to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


@st.composite
def http2(draw) -> Sent:
    """Bytes for the gRPC port, which are hardly ever HTTP/2."""
    raw = draw(st.sampled_from((PREFACE, PREFACE, PREFACE + bytes(9), PREFACE[:9], b"")))
    raw += b"".join(draw(st.lists(frames(), max_size=5)))
    if draw(st.integers(0, 4)) == 0:
        raw = draw(st.one_of(st.sampled_from(_GARBAGE), st.binary(max_size=60)))
    return Sent("http2", raw, abrupt=draw(st.booleans()))


# All of them.


def made(count: int, of: int, paths: Sequence[str]) -> list[Case]:
    """So many by hypothesis. of: the seed. paths: of all routes."""
    kinds: list[tuple[int, st.SearchStrategy[Any]]] = [
        (45, bodies()),
        (25, streams_of_bytes(paths)),
        (8, plain(paths)),
        (18, calls()),
        (4, http2()),
    ]
    found: list[Case] = []
    for share, strategy in kinds:
        found += _examples(strategy, max(1, count * share // 100), of)
    random.Random(of).shuffle(found)
    return found


def _examples(strategy: st.SearchStrategy[Any], count: int, of: int) -> list[Any]:
    found: list[Any] = []

    @seed(of)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def take(case: Any) -> None:
        found.append(case)

    take()
    return found


# Takes all the processor time that a template may have; so only now and then.
_SLOW = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
_SLOW_EVERY = 20_000
# Of as many bytes as a body may have, and a few more.
_LARGE, _LARGE_EVERY = 8 << 20, 2000


def cases(count: int, of: int, paths: Sequence[str], num_made: int = 3000) -> Iterator[Case]:
    """So many requests. of: the seed. num_made: by hypothesis; the others are varied from those."""
    first = made(min(count, num_made), of, paths)
    rng, varied = random.Random(of), Varied(first)
    for at in range(count):
        if at % _SLOW_EVERY == _SLOW_EVERY // 25:
            slow = (("messages", _HI), ("chat_template", _SLOW), ("max_tokens", 1))
            yield Body("/v1/chat/completions", Pairs(slow))
        elif at % _LARGE_EVERY == _LARGE_EVERY // 25:
            yield _large(rng)
        elif at < len(first):
            yield first[at]
        else:
            yield varied.one(rng)


def _large(rng: random.Random) -> Case:
    size = _LARGE + rng.choice((-100, 1))
    value = rng.choice(("x" * size, Json("[" + "1," * (size // 2) + "1]"), Json("9" * size)))
    name = rng.choice(("prompt", "stop", "user", "tokens", "chat_template"))
    path = rng.choice(_POSTED)
    return Body(path, Pairs(((name, value), ("max_tokens", 1))))


class Varied:
    """Makes more requests of some, at random."""

    def __init__(self, first: Sequence[Case]):
        self._first = first
        self._members = [
            member for case in first if isinstance(case, Body) for member in case.pairs.members
        ]
        self._raw: dict[str, list[bytes]] = {}
        for case in first:
            if isinstance(case, Sent):
                self._raw.setdefault(case.kind, []).append(case.raw)
        self._messages = [raw for case in first if isinstance(case, Call) for raw in case.messages]

    def one(self, rng: random.Random) -> Case:
        """One more."""
        case = rng.choice(self._first)
        match case:
            case Body():
                return self._body(case, rng)
            case Sent():
                return self._sent(case, rng)
        return self._call(case, rng)

    def _body(self, case: Body, rng: random.Random) -> Case:
        members = list(case.pairs.members)
        for _ in range(rng.choice((1, 1, 2))):
            at, how = rng.randrange(len(members) + 1), rng.random()
            if how < 0.4 or at == len(members):
                members.insert(at, rng.choice(self._members))
            elif how < 0.7:
                name = members[at][0]
                members[at] = name, rng.choice(self._members)[1]
            elif how < 0.85:
                del members[at]
            else:
                members.append(members[at])
        varied = replace(case, pairs=Pairs(tuple(members)))
        if rng.random() < 0.05:
            return replace(varied, path=rng.choice(_POSTED))
        if rng.random() < 0.1:  # Broken as JSON, or as HTTP where its size is not the same.
            head, end, body = varied.sent().raw.partition(b"\r\n\r\n")
            flipped = bytearray(body)
            for _ in range(rng.randint(1, 4)):
                if flipped:
                    flipped[rng.randrange(len(flipped))] = rng.randrange(256)
            return Sent("json", head + end + bytes(flipped), case.leave_at)
        return varied

    def _sent(self, case: Sent, rng: random.Random) -> Sent:
        # The beginning stays where an answer to it is waited for.
        keep = case.cuts[0] if case.between else 0
        raw = case.raw[:keep] + _edited(case.raw[keep:], self._raw[case.kind], rng)
        return replace(case, raw=raw)

    def _call(self, case: Call, rng: random.Random) -> Call:
        how = rng.random()
        if not case.messages or case.method.startswith("/grpc.health"):
            return case
        (raw, *_), other = case.messages, rng.choice(self._messages)
        if how < 0.4:
            raw += other  # By protobuf's rules, both in one.
        elif how < 0.6:
            raw = other
        elif how < 0.8:
            raw = _edited(raw, self._messages, rng)
        return replace(case, messages=(raw,) * len(case.messages))


def _edited(raw: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """With some bytes cut, doubled, replaced or put in; or with another's end."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(raw) + 1)
        to = min(len(raw), at + rng.choice((1, 1, 2, 8, 64)))
        match rng.randrange(5):
            case 0:
                raw = raw[:at] + raw[to:]
            case 1:
                raw = raw[:to] + raw[at:]
            case 2:
                raw = raw[:at] + bytes((rng.randrange(256),)) + raw[at + 1 :]
            case 3:
                raw = raw[:at] + rng.choice(_PUT_IN) + raw[at:]
            case _:
                other = rng.choice(others)
                raw = raw[:at] + other[rng.randrange(len(other) + 1) :]
    return raw


_PUT_IN = (b"\r\n", b"\n", b"\0", b" ", b":", b"\xff")
