"""Compiled programs, kept between runs: a start then neither traces nor compiles them again.

JAX's own cache is asked by what a program says, which has to be traced and lowered to be known, for
longer than it takes to load. Here a folder stands for all that the programs of one deployment
depend on, the code among it, so that loading them can begin before the weights are there.

The files are unpickled, and what they hold is run: the folder is for its owner alone, and one that
others can write is not used.
"""

import concurrent.futures
import hashlib
import logging
import os
import pickle
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from kairos_jax.process.cache import make_private

log = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[2]
# Whatever a program is made by.
_SOURCES = (
    *("models/**/*.py", "models/**/*.cc"),
    *(
        f"kairos_jax/engine/{name}.py"
        for name in ("engine", "functions", "calls", "lanes", "programs")
    ),
)
_SETTINGS = ("JAX_", "XLA_")
_KEPT_DAYS = 30.0


class Programs:
    """The programs of one deployment. Turns JAX's own cache off: XLA for CPU writes programs that
    do not run, if it is to write what it has itself read from there.

    folder: for those of all deployments. about: what tells this one's programs from others', but
    for versions, code and machine. devices: all that they may run on.

    Raises:
        NotPrivate: the folder is open to others, or cannot be made.
    """

    def __init__(self, folder: Path, about: str, devices: Sequence[Any]):
        make_private(folder)
        self._folder = folder / _digest(about, *_surroundings(devices))
        make_private(self._folder)
        os.utime(self._folder)
        _remove_old(folder)
        logging.getLogger(compilation_cache.reset_cache.__module__).setLevel(logging.WARNING)
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # it looks at that setting only once
        self._devices = {device.id: device for device in devices}
        threads = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        paths = sorted(self._folder.glob("*.program"))
        self._loading = {path.name: threads.submit(self._load, path) for path in paths}
        threads.shutdown(wait=False)

    def compiled(self, name: str, function: Any, *args: Any) -> jax.stages.Compiled:
        """`function`, which is jitted, compiled for arguments like these. name: of this program
        and these arguments, the same at each start.
        """
        # A sharding does not say in words which devices it is on.
        devices = [str(device.id) for device in _devices(args)]
        like = map(_like, jax.tree.leaves(args))
        file = f"{_digest(name, *devices, '', *like)}.program"
        loading = self._loading.pop(file, None)
        program = loading.result() if loading else None
        if program is None:
            program = function.lower(*args).compile()
            self._keep(self._folder / file, program, args)
        return program

    def _load(self, path: Path) -> jax.stages.Compiled | None:
        try:
            data = path.read_bytes()
            if hashlib.sha256(data[32:]).digest() != data[:32]:
                raise ValueError("it is damaged")
            ids, *parts = pickle.loads(data[32:])
            devices = [self._devices[id] for id in ids]
            return serialize_executable.deserialize_and_load(*parts, execution_devices=devices)
        except Exception as error:  # whatever it is, compiling will do
            reason = str(error).partition("\n")[0]
            log.warning("the kept program %s is compiled anew: %s", path, reason)
            return None

    def _keep(self, path: Path, program: jax.stages.Compiled, args: Any) -> None:
        try:
            ids = [device.id for device in _devices(args)]
            content = pickle.dumps((ids, *serialize_executable.serialize(program)))
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                file.write(hashlib.sha256(content).digest() + content)
            os.replace(file.name, path)  # whole, or not at all
        except Exception as error:  # of a disk, or of a program that cannot be written
            log.warning("the program %s is not kept: %s", path, str(error).partition("\n")[0])


def _remove_old(folder: Path) -> None:
    """Removes what no start has used for a month: other versions' programs."""
    for each in folder.iterdir():
        if time.time() - each.stat().st_mtime > _KEPT_DAYS * 86400:
            shutil.rmtree(each, ignore_errors=True)


def _surroundings(devices: Sequence[Any]) -> list[str]:
    """Versions, settings, the machine and the code."""
    told = [sys.version, platform.machine(), _cpu()]
    told += [metadata.version(package) for package in ("jax", "jaxlib", "flax")]
    told += [f"{device.id} {device.device_kind}" for device in devices]
    told += [f"{key}={os.environ[key]}" for key in sorted(os.environ) if key.startswith(_SETTINGS)]
    return [*told, *map(_digest, sources(_ROOT))]


def sources(root: Path) -> list[str]:
    """The text of each file by which programs are made. Raises FileNotFoundError for a pattern
    without a match: a file that has moved would drop out of the key, and stale programs would run.
    """
    texts = []
    for pattern in _SOURCES:
        paths = sorted(root.glob(pattern))
        if not paths:
            raise FileNotFoundError(
                f"no file matches {pattern!r} in {root}: the key of the kept "
                "programs would leave its code out"
            )
        texts += [path.read_text("utf-8") for path in paths]
    return texts


def _cpu() -> str:
    """The CPU's model and instructions, as far as they can be told."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features")))


def _devices(args: Any) -> list[Any]:
    """Those of the mesh on which a program's arguments lie."""
    arrays = [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array)]
    mesh: Any = arrays[0].sharding.mesh  # type: ignore[attr-defined]
    return list(mesh.devices.flat)


def _like(leaf: Any) -> str:
    return f"{leaf.dtype}{leaf.shape}{getattr(leaf, 'sharding', '')}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
