"""The fields of a JSON body by type. What `Validator` checks too is left to it; here is what only
JSON can get wrong, so that whatever a client sends is answered by a `BadField` and nothing else.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from kairos_jax.api.json_text import read_json
from kairos_jax.api.refusal import BadField

_INT32 = 2**31
_INT64 = 2**63


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that is a body. Raises BadField."""
    value = read_json(raw, "body")
    if not isinstance(value, dict):
        raise BadField("body", f"must be a JSON object, got {shown(value)}")
    return value


class Fields:
    """A JSON object's fields by type. null is as good as left out. Each method raises BadField.

    path: of the object within the body, such as "slo."; "" for the body itself.
    """

    def __init__(self, values: dict[str, Any], path: str = ""):
        self.values, self.path = values, path

    def integer(self, name: str, low: int = -_INT32, high: int = _INT32 - 1) -> int | None:
        """Within these limits, both included."""
        value = self.values.get(name)
        if value is None:
            return None
        # 5.0 is an integer in JSON.
        whole = isinstance(value, float) and value.is_integer()
        if not (whole or isinstance(value, int)) or isinstance(value, bool):
            raise self._bad(name, "an integer", value)
        if not low <= value <= high:
            raise self._bad(name, f"from {low} to {high}", value)
        return int(value)

    def seed(self, name: str) -> int | None:
        """An integer of 64 bits."""
        return self.integer(name, -_INT64, _INT64 - 1)

    def number(self, name: str) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._bad(name, "a number", value)
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf

    def flag(self, name: str) -> bool | None:
        value = self.values.get(name)
        if not isinstance(value, bool | None):
            raise self._bad(name, "true or false", value)
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.flag(name)
        return default if value is None else value

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None:
            check_text(self.path + name, value)
        return value

    def part(self, name: str) -> "Fields":
        """An object within this one; an empty one if it is left out."""
        value = self.values.get(name)
        if not isinstance(value, dict | None):
            raise self._bad(name, "an object", value)
        return Fields(value or {}, f"{self.path}{name}.")

    def ids(self, name: str) -> list[int]:
        value = self.values.get(name)
        if value is not None and not is_ids(value):
            raise self._bad(name, "a list of token ids", value)
        check_int32(self.path + name, value or [])
        return value or []

    def refuse_all_but(self, name: str, *neutral: Any) -> None:
        """Raises BadField unless the field is left out or has a neutral value: it is not served."""
        value = self.values.get(name)
        if value is not None and not is_one_of(value, neutral):
            served = " or ".join(map(json.dumps, neutral or (None,)))
            raise self._bad(name, f"{served}, as nothing else is served", value)

    def _bad(self, name: str, limit: str, value: Any) -> BadField:
        return BadField(self.path + name, f"must be {limit}, got {shown(value)}")


def is_one_of(value: Any, others: Sequence[Any]) -> bool:
    """As `in`, but that true is not 1, nor false 0."""
    flag = isinstance(value, bool)
    return any(value == other and isinstance(other, bool) is flag for other in others)


def check_text(field: str, value: Any) -> None:
    """Raises BadField for what is no text, or could not be sent on as such."""
    if not isinstance(value, str):
        raise BadField(field, f"must be a string, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        surrogate = ascii(value[error.start])
        raise BadField(field, f"holds the lone surrogate {surrogate}, which is no text") from error


def is_ids(value: Any) -> bool:
    """Whether this is a list of integers, which may be empty."""
    return isinstance(value, list) and all(type(each) is int for each in value)


def check_int32(field: str, ids: Sequence[int]) -> None:
    """Raises BadField for an id that cannot even be sent on, to be looked at by `Validator`."""
    for index, id in enumerate(ids):
        if not 0 <= id < _INT32:
            raise BadField(f"{field}[{index}]", f"must be a token id, got {shown(id)}")


def shown(value: Any) -> str:
    """A value as it stands in an error, cut."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, int) and abs(value) >= _INT64:
        return "an integer of more than 64 bits"
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:80] + "..."
