"""Config files: found by path or by the name of a packaged one, read, and written."""

import dataclasses
import json
import math
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from kairos_jax.config.server import ConfigError, ServerConfig

# Beside this package both in a checkout and where the wheel is installed.
PACKAGED = Path(__file__).parents[2] / "configs"

_TEMPLATE = '''\
"""{title}

  kairos serve --config=FILE

`kairos config` explains every key.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every key can be overridden: --config.decode.policy=continuous, --config.slo.ttft=2."""
    return ConfigDict(
        {values}
    )
'''


def packaged() -> list[str]:
    """The names of the configs that come with this package."""
    return sorted(path.stem for path in PACKAGED.glob("*.py"))


def read_file(name: str) -> dict[str, Any]:
    """The values of a config file.

    Args:
      name: the path of a file or the name of a packaged one; what follows a colon goes to its
        `get_config`.

    Raises:
      ConfigError: there is no such file, or it does not make a config; the message says where.
    """
    where, colon, variant = name.partition(":")
    path = PACKAGED / f"{where}.py" if where in packaged() else Path(where)
    if where and path.exists() and not path.is_file():  # to open a FIFO would wait for a writer
        raise ConfigError(f"--config={name}: not a regular file")
    try:
        source = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ConfigError(
            f"--config={name}: there is no such file and no packaged config of that name; "
            f"packaged are {', '.join(packaged())}"
        ) from error
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    _guarded(path, lambda: exec(compile(source, path, "exec"), module.__dict__))
    get_config, layouts = (module.__dict__.get(each) for each in ("get_config", "LAYOUTS"))
    if not callable(get_config):
        raise ConfigError(f"--config: {path} has no function get_config")
    if colon and layouts is not None and variant not in layouts:
        raise ConfigError(
            f"--config={name}: {path.stem} has no variant {variant!r}; known: {', '.join(layouts)}"
        )
    values = _guarded(path, lambda: get_config(variant) if colon else get_config())
    if isinstance(values, ConfigDict):
        values = values.to_dict()
    if not isinstance(values, Mapping):
        line = getattr(getattr(get_config, "__code__", None), "co_firstlineno", 1)
        raise ConfigError(
            f"--config: {path}:{line}: get_config must return a ConfigDict or a dict, "
            f"got {type(values).__name__}"
        )
    return dict(values)


def _guarded(path: Path, run: Callable[[], Any]) -> Any:
    """What `run` returns, which executes code of a config file. Raises ConfigError for anything
    that is raised there.
    """
    try:
        return run()
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError) and error.filename == str(path):
            line, words = error.lineno, error.msg
        else:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((f.lineno for f in reversed(frames) if f.filename == str(path)), None)
            words = str(error)
        place = f"{path}:{line}" if line else str(path)
        raise ConfigError(f"--config: {place}: {type(error).__name__}: {words}") from error


def as_text(config: ServerConfig, title: str) -> str:
    """A config file that reads back as `config`."""
    return _TEMPLATE.format(title=title, values=_literal(dataclasses.asdict(config), " " * 8))


def _literal(value: Any, indent: str) -> str:
    """A value in Python."""
    if isinstance(value, dict):
        deeper = indent + "    "
        lines = [
            f"{deeper}{_literal(key, '')}: {_literal(of_key, deeper)},\n"
            for key, of_key in value.items()
        ]
        return "{\n" + "".join(lines) + indent + "}"
    if isinstance(value, str):
        return json.dumps(value)
    return 'float("inf")' if value == math.inf else repr(value)
