"""What a binary settles before JAX starts, and how it ends on wrong flags or a wrong model."""

import glob
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from kairos_jax.config import ConfigError, ServerConfig
from kairos_jax.hub import ModelNotAvailable

_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")

# XLA's CPU temporaries are mapped and unmapped at every call; kept in one arena instead, attention
# at batch 16 and context 200 went from 76 to 36 ms. glibc reads this at process start only.
_MALLOC = {
    "glibc.malloc.mmap_max": "0",
    "glibc.malloc.trim_threshold": str(16 << 30),
    "glibc.malloc.top_pad": str(256 << 20),
    "glibc.malloc.arena_max": "1",
}


class UsageError(Exception):
    """What was asked for cannot be done; the message says why."""


def on_cpu() -> bool:
    """Whether JAX will run on the CPU, told without starting it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return platforms == "cpu" or not (platforms or any(map(glob.glob, _ACCELERATORS)))


def tune_malloc() -> None:
    """Starts this process anew with glibc's allocator set for XLA on CPU, unless it is already."""
    if not on_cpu() or not sys.platform.startswith("linux") or os.environ.get("GLIBC_TUNABLES"):
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(f"{name}={value}" for name, value in _MALLOC.items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def cache_dir(name: str) -> Path:
    """A folder of ours in the user's cache, made if need be."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(root) / "kairos_jax" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def start_jax(num_devices: int, cpu_devices: int = 0) -> list[Any]:
    """Turns the compilation cache on and returns the first `num_devices` devices.

    On a CPU it makes them (`cpu_devices` of them, or as many as are asked for).

    Raises:
        UsageError: there are not so many.
    """
    if on_cpu():
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices or num_devices)
    jax.config.update("jax_compilation_cache_dir", str(cache_dir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    devices = jax.devices()
    if len(devices) < num_devices:
        raise UsageError(
            f"config.prefill.devices + config.decode.devices is {num_devices}, and there are "
            f"{len(devices)} {devices[0].platform} devices"
        )
    return devices[:num_devices]


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
    values = values.to_dict()
    if flags.FLAGS.model is not None:
        values["model"] = flags.FLAGS.model
    return ServerConfig.from_dict(values)


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a binary's `main`: wrong flags, config or model end it with one line and code 2."""

    def guarded(argv: list[str]) -> int | None:
        try:
            if len(argv) > 1:
                raise UsageError(f"unexpected argument {argv[1]!r}")
            return main(argv)
        except KeyboardInterrupt:
            return 130
        except (UsageError, ConfigError, ModelNotAvailable) as error:
            return fail(error)

    tune_malloc()
    app.run(guarded, flags_parser=_parse)


def fail(error: Exception) -> int:
    """Prints an error in one line; returns the exit code for wrong use."""
    print(f"error: {error}", file=sys.stderr)
    return 2


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    # The config file is read, and its overrides set, while flags are parsed.
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        sys.exit(fail(UsageError(message)))
