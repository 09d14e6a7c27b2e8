"""What the binaries that run a model share: the config's flags, and how they start JAX."""

import sys
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import config_flags

from kairos_jax.config import ConfigError, ServerConfig
from kairos_jax.process import command
from kairos_jax.process.command import UsageError, fail
from kairos_jax.process.hub import ModelNotAvailable


def define_config_flag() -> Any:
    """--config=FILE with --config.KEY=VALUE overrides, and --model in short."""
    flags.DEFINE_string("model", None, "Path, hub id or name of a model, instead of config.model.")
    flags.DEFINE_integer("cpu_devices", 0, "CPU devices to make; 0: as many as the config asks.", 0)
    return config_flags.DEFINE_config_file("config", None, "Config file, such as configs/NAME.py.")


def read_config() -> ServerConfig:
    """The config that the flags name, checked. Raises ConfigError or UsageError."""
    values = flags.FLAGS.config
    if values is None:
        raise UsageError("--config is missing: give a file, such as configs/smollm2_135m_cpu.py")
    try:
        values = values.to_dict()
    except OSError as error:  # what went wrong with the file is told at its first use
        raise UsageError(f"--config: {str(error).splitlines()[-1].strip()}") from error
    if flags.FLAGS.model is not None:
        values["model"] = flags.FLAGS.model
    return ServerConfig.from_dict(values)


def run(main: Callable[[list[str]], int | None], serves: bool = False) -> None:
    """Runs a binary's `main`: wrong flags, config or model end it with one line and code 2. serves:
    see `command.run`.
    """

    def checked(argv: list[str]) -> int | None:
        try:
            return main(argv)
        except (ConfigError, ModelNotAvailable) as error:
            raise UsageError(str(error)) from error

    command.run(checked, _parse, serves)


def _parse(argv: list[str]) -> list[str]:
    try:
        return command.parse_flags(argv)
    except (AttributeError, KeyError) as error:  # from an override of a config's key
        key = str(error.args[0]).strip("'\"") if error.args else ""
        overrides = [each for each in argv if each.startswith("--config.") and key in each]
        sys.exit(fail(UsageError(f"no such config key: {overrides[0] if overrides else key}")))
    except (TypeError, ValueError) as error:
        sys.exit(fail(UsageError(f"--config: {error}")))
