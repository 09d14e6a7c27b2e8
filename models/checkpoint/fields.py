"""The values of a description file, each checked for its type as it is read."""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Sizes and ids above it are damage, and would overflow 32 bits further on.
_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Fields:
    """Values by key, as JSON or GGUF metadata have them. A null value is None.

    Every method raises a ValueError that names the file, the key, the value and what is accepted.

    where: the file, as errors name it. prefix: of the keys, as errors name them.
    """

    where: str
    values: Mapping[str, Any]
    prefix: str = ""

    def integer(self, key: str, least: int = 1) -> int:
        """A whole number that must be there."""
        value: Any = self.values.get(key)
        if type(value) is not int or not least <= value <= _MOST:
            raise self.error(key, f"a whole number from {least} to {_MOST}")
        return value

    def number(self, key: str) -> float:
        """A finite number that must be there."""
        value: Any = self.values.get(key)
        if type(value) not in (int, float) or not _is_finite(value):
            raise self.error(key, "a number")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; false where the key is missing."""
        value = self.values.get(key, False)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def optional_integer(self, key: str, least: int = 1) -> int | None:
        """None where the key is missing or null."""
        return None if self.values.get(key) is None else self.integer(key, least)

    def object(self, key: str) -> Mapping[str, Any]:
        """A JSON object; empty where the key is missing or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(key, "an object")
        return value or {}

    def strings(self, key: str) -> list[str]:
        """A list of strings; empty where the key is missing or null."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of strings")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids: one or a list of them; empty where the key is missing or null."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(id) is int and 0 <= id <= _MOST for id in ids):
            raise self.error(key, "a token id or a list of token ids")
        return tuple(dict.fromkeys(ids))

    def one_of(self, key: str, accepted: tuple[Any, ...]) -> Any:
        """One of the accepted values; the first of them where the key is missing."""
        value = self.values.get(key, accepted[0])
        # 1 == True, which would let a boolean pass for a number.
        if isinstance(value, bool) or value not in accepted:
            raise self.error(key, f"in {accepted}")
        return value

    def error(self, key: str, accepted: str) -> ValueError:
        """That the value of `key` is not what is accepted."""
        name = f"{self.where}: {self.prefix}{key}"
        if key not in self.values:
            return ValueError(f"{name} is missing: it must be {accepted}")
        value = self.values[key]
        shown = "null" if value is None else reprlib.repr(value)
        return ValueError(f"{name} must be {accepted}, got {shown}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int past the range of floats
        return False
