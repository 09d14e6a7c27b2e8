"""The reference of the keys of a config, made from their declarations in `server.py`."""

import dataclasses
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, replace
from typing import Any, get_args

from kairos_jax.config.server import Key, ServerConfig
from models.sharding import Rules

CHOSEN = "chosen"
_INTRODUCTION = """\
# Config keys

<!-- Made from kairos_jax/config/server.py: `kairos config --output=markdown` prints this page. -->

A config says what is served: the model, its meshes, limits, policies and SLOs.

- Without `--config`, `kairos serve MODEL` makes a config from the model and the devices. It chooses
  the keys whose default is "chosen" in the table, and `--dump_config=FILE` writes the config to a
  file to edit.
- `--config=FILE` reads a Python file whose `get_config` returns the values, as a `ConfigDict` or a
  `dict`. It must give the keys whose default is "chosen", and may leave out the others. If it gives
  `rules`, those that it does not name are empty.
- `--config=NAME` finds a config that comes with the package, such as `smollm2_135m_cpu`. What
  follows a colon goes to `get_config`: `--config=llama3_8b:gpu4`.
- `--config.KEY=VALUE` overrides a key, with or without `--config`.

`kairos config` prints the keys, `kairos config --config=NAME` prints the values of a config.

| key | type | default | range | meaning |
|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """A key by its dotted name. kind: its type; default: None if there is none."""

    name: str
    kind: type
    default: Any
    key: Key

    @property
    def default_text(self) -> str:
        """As it is written on a command line."""
        if self.default is None:
            return CHOSEN
        return str(self.default).lower() if self.kind is bool else str(self.default)


def config_keys() -> list[ConfigKey]:
    """All keys, in the order of their declarations."""
    return list(_keys_of(ServerConfig, ""))


def _keys_of(cls: type, path: str) -> Iterator[ConfigKey]:
    for field in dataclasses.fields(cls):
        name = path + field.name
        if not get_args(field.type):  # a table of keys
            assert isinstance(field.type, type)
            yield from _keys_of(field.type, name + ".")
            continue
        kind, key = get_args(field.type)
        if kind is Rules:
            for axis in dataclasses.fields(Rules):
                of_axis = replace(key, meaning=key.meaning.format(axis=axis.name))
                yield ConfigKey(f"{name}.{axis.name}", str, axis.default or "", of_axis)
        else:
            yield ConfigKey(name, kind, None if field.default is MISSING else field.default, key)


def markdown() -> str:
    """The page docs/reference/config.md."""
    return _INTRODUCTION + "".join(_row(each) for each in config_keys())


def _row(each: ConfigKey) -> str:
    default = each.default_text
    if default != CHOSEN and default:
        default = f"`{default}`"
    choices = [f"`{choice}`" if choice else "empty" for choice in each.key.choices]
    allowed = ", ".join(choices) or each.key.range
    return (
        f"| `{each.name}` | {each.kind.__name__} | {default} | {allowed} | {each.key.meaning} |\n"
    )


def plain(width: int) -> str:
    """The keys for a terminal."""
    lines = []
    for each in config_keys():
        facts = [each.kind.__name__]
        if each.key.range:
            facts.append(each.key.range.removeprefix(", "))
        facts.append(f"default {each.default_text}" if each.default_text else "default empty")
        lines.append(f"{each.name}  ({'; '.join(facts)})")
        lines += textwrap.wrap(
            each.key.meaning, width, initial_indent="    ", subsequent_indent="    "
        )
    return "\n".join(lines)
