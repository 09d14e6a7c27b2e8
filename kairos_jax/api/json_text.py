"""JSON from clients, within bounds: the parser holds the interpreter, and with it every stream, to
the end of a text.
"""

import json
from typing import Any

from kairos_jax.api.refusal import BadField

# That many take 0.15 s: half of it for numbers, the rest for lists, objects and their keys, which
# cost ten times as much each.
MAX_VALUES = 1 << 20
MAX_OBJECTS = 1 << 16


def read_json(raw: bytes, field: str) -> Any:
    """What JSON in UTF-8 says. Raises BadField."""
    _check_number(raw, field)
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadField(field, f"must be UTF-8: byte {error.start} is not") from error
    except RecursionError as error:
        raise BadField(field, "is nested too deeply") from error
    except ValueError as error:
        raise BadField(field, f"must be JSON: {error}") from error


def _check_number(raw: bytes, field: str) -> None:
    """Raises BadField for more values, or lists, objects and keys, than are read."""
    values, objects = _counts(raw)
    if values <= MAX_VALUES and objects <= MAX_OBJECTS:
        return
    # Texts may hold any number of commas and brackets, and do not count. Nothing here takes a step
    # of Python for each of them.
    unescaped = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    if unescaped.count(b'"') <= 4 * MAX_VALUES:  # more are too many values in any case
        values, objects = _counts(b"".join(unescaped.split(b'"')[::2]))
        if values <= MAX_VALUES and objects <= MAX_OBJECTS:
            return
    raise BadField(
        field,
        f"has too many values: at most {MAX_VALUES} are read, and {MAX_OBJECTS} lists, objects and "
        "their keys",
    )


def _counts(raw: bytes) -> tuple[int, int]:
    """The most values, and the most lists, objects and keys, that there can be."""
    return raw.count(b",") + 1, raw.count(b"[") + raw.count(b"{") + raw.count(b":")
