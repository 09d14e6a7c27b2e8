"""JSON that every client can read: no NaN, no infinity, and no line break in a string."""

import json
import math
from typing import Any

from starlette.responses import Response

# Line breaks to `str.splitlines`, by which some clients cut a stream into events. JSON itself has
# the others escaped.
_BREAKS = {"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_encode_compact = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":")
).encode


def to_json(value: Any, compact: bool = False) -> str:
    """A value as JSON, in one line. Numbers that are not finite become null."""
    encode = _encode_compact if compact else _encode
    try:
        text = encode(value)
    except ValueError:
        text = encode(_finite(value))
    if not text.isascii():
        for character, escaped in _BREAKS.items():
            if character in text:
                text = text.replace(character, escaped)
    return text


def to_bytes(value: Any, compact: bool = False) -> bytes:
    """The same in UTF-8. Lone surrogates, which are no text, are escaped."""
    return to_json(value, compact).encode("utf-8", "backslashreplace")


class Json(Response):
    """A response whose body is JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """See `Response`."""
        return to_bytes(content)


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
    return value
