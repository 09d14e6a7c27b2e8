"""What the binaries that run a model share: the config's flags, and how they start and end."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from absl import flags

from kairos_jax.config import ConfigError, ServerConfig, files
from kairos_jax.config.keys import config_keys
from kairos_jax.process import command
from kairos_jax.process.command import UsageError, fail
from kairos_jax.process.hub import ModelNotAvailable
from models.sharding import Rules

_OVERRIDE = "config."
_DEFINE = {
    bool: flags.DEFINE_boolean,
    float: flags.DEFINE_float,
    int: flags.DEFINE_integer,
    str: flags.DEFINE_string,
}


def define_config_flag() -> None:
    """--config=FILE with --config.KEY=VALUE overrides, and --model in short."""
    flags.DEFINE_string("model", None, "Path, hub id or name of a model: config.model.")
    flags.DEFINE_integer(
        "cpu_devices", 0, "CPU devices to create; 0: as many as the config needs.", 0
    )
    flags.DEFINE_string(
        "config",
        None,
        "Config file, or name of a packaged one, such as smollm2_135m_cpu or llama3_8b:gpu4.",
    )
    flags.DEFINE_string("dump_config", None, "Write the config to this new file and exit.")
    for each in config_keys():
        _DEFINE[each.kind](_OVERRIDE + each.name, None, each.key.meaning)


def has_config() -> bool:
    """Whether the flags name a config."""
    return flags.FLAGS.config is not None


def read_config() -> ServerConfig:
    """The config that the flags name, checked. Raises ConfigError or UsageError."""
    if not has_config():
        raise UsageError(
            "--config is missing: the processes of a server share one. Name a file or one of "
            f"{', '.join(files.packaged())}; or write one: "
            "kairos serve MODEL --config.colocated=false --dump_config=FILE"
        )
    return with_overrides(files.read_file(flags.FLAGS.config))


def with_overrides(values: Mapping[str, Any]) -> ServerConfig:
    """The config of these values and of the flags that override them; --dump_config writes it, and
    ends the process. Raises ConfigError or UsageError.
    """
    changed = deepcopy(dict(values))
    for name, value in overrides().items():
        *path, last = name.split(".")
        table = changed
        for part in path:
            table = table.setdefault(part, asdict(Rules()) if part == "rules" else {})
            if not isinstance(table, dict):
                raise ConfigError(f"config.{part} must be a table of keys, got {table!r}")
        table[last] = value
    config = ServerConfig.from_dict(changed)
    if path := flags.FLAGS.dump_config:
        _dump(config, Path(path))
        sys.exit(0)
    return config


def make_config(path: Path, *arguments: str) -> None:
    """Has another process make a config for the model and the devices, as `serve` does, and makes
    it the one that the flags name. Another process: only one can have an accelerator at a time.
    Ends this process if the other fails, which says why.
    """
    values = flags.FLAGS
    given = [
        values[name].serialize()
        for name in sorted(values)
        if (name.startswith(_OVERRIDE) or name in ("model", "cpu_devices")) and values[name].present
    ]
    command = [sys.executable, "-m", "kairos_jax.serve", f"--dump_config={path}"]
    done = subprocess.run([*command, *given, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    values["config"].parse(str(path))


def overrides() -> dict[str, Any]:
    """The values that flags give to keys, by the keys' dotted names. Raises ConfigError."""
    values = flags.FLAGS
    given = {}
    for each in config_keys():
        flag = values[_OVERRIDE + each.name]
        if flag.present:
            given[each.name] = flag.value
            if not each.name.startswith("rules."):  # which `from_dict` checks together
                each.key.check(flag.value, each.name)
    return given if values.model is None else given | {"model": values.model}


def _dump(config: ServerConfig, path: Path) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(files.as_text(config, f"{config.layout}, {config.dtype}."))
    except OSError as error:
        raise UsageError(f"--dump_config={path}: {error.strerror}") from error
    print(f"wrote {path}: edit it, and serve it with --config={path}")


def run(
    main: Callable[[list[str]], int | None], serves: bool = False, positional: str = "model"
) -> None:
    """Runs a binary's `main`: wrong flags, config or model end it with one line and code 2. serves:
    see `command.run`. positional: the flag whose value may be given without its name.
    """

    def checked(argv: list[str]) -> int | None:
        try:
            return main(argv)
        except (ConfigError, ModelNotAvailable) as error:
            raise UsageError(str(error)) from error

    def parse(argv: list[str]) -> list[str]:
        rest, flag = command.parse_flags(argv, positional), flags.FLAGS[positional]
        if len(rest) == 1:
            return rest
        name, value, *others = rest
        if flag.present:
            sys.exit(fail(UsageError(f"unexpected argument {value!r} beside --{positional}")))
        flag.parse(value)
        return [name, *others]

    command.run(checked, parse, serves)
