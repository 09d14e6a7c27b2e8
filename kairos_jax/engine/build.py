"""Builds what a config describes: the model on every mesh, the compiled engines, the workers."""

import functools
import logging
import threading
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kairos_jax.config import ServerConfig
from kairos_jax.engine.engine import JaxEngine
from kairos_jax.engine.functions import Shapes
from kairos_jax.engine.model import Model
from kairos_jax.engine.programs import Programs
from kairos_jax.process.cache import NotPrivate, cache_or_temporary, private_cache_dir, say_unusable
from kairos_jax.process.command import UsageError
from kairos_jax.process.logs import ONCE
from kairos_jax.process.parallel import parallel
from kairos_jax.process.progress import Progress
from models.ops import native
from models.sharding import make_mesh
from models.transformer import Params
from schedulers.ledger.instance import Role

log = logging.getLogger(__name__)

_HOPPER = "9.0"  # the compute capability of H100, H200 and GH200


def build_engines(
    config: ServerConfig, model: Model, devices: Sequence[Any], progress: Progress
) -> list[JaxEngine]:
    """One for each of the config's roles: the weights loaded, every shape compiled.

    Raises:
        UsageError: the model cannot be split over so many devices, or its files are broken.
    """
    engines: list[JaxEngine] = []
    programs = open_programs(config, model, config.roles, devices)
    first, names = 0, config.names
    for role, name in zip(config.roles, names, strict=True):
        mine = devices[first : first + config.devices(role)]
        first += len(mine)
        # What an engine has made of its weights suits meshes of that size.
        alike = next((each.params for each in engines if each.mesh.size == len(mine)), None)
        params = load_weights(config, model, name, mine, progress, alike)
        packed = alike is not None
        engines.append(build_engine(config, model, role, mine, params, packed, programs))
    named = zip(engines, names, strict=True)
    parallel([functools.partial(warm_up, engine, name, progress) for engine, name in named])
    return engines


def load_weights(
    config: ServerConfig,
    model: Model,
    name: str,
    devices: Sequence[Any],
    progress: Progress,
    loaded: Params | None = None,
) -> Params:
    """The weights on one engine's mesh. loaded: those of an engine on another mesh of that size,
    which are copied as they are, packed perhaps, rather than read again.

    Raises:
        UsageError: the model cannot be split over so many devices, or its files are broken.
    """
    progress(f"load {name} weights", 0, 1)
    mesh = make_mesh(devices)
    if loaded is None:
        try:
            params = model.checkpoint.load(mesh, config.rules, config.dtype)
        except ValueError as error:
            raise UsageError(str(error)) from error
    else:
        params = {path: jax.device_put(w, _on(mesh, w)) for path, w in loaded.items()}
    progress(f"load {name} weights", 1, 1)
    return params


def _on(mesh: Mesh, like: jax.Array) -> NamedSharding:
    """As that array lies on its own mesh; what packed it for one device may not say how."""
    lies = like.sharding
    return NamedSharding(mesh, lies.spec if isinstance(lies, NamedSharding) else PartitionSpec())


def build_engine(
    config: ServerConfig,
    model: Model,
    role: Role,
    devices: Sequence[Any],
    params: Params,
    packed: bool = False,
    programs: Programs | None = None,
) -> JaxEngine:
    """One engine, nothing compiled yet. params: from `load_weights` for the same devices; packed,
    programs: as of `JaxEngine`.

    Raises:
        UsageError: the kernels that the config asks for cannot be had, or do not take the model's
            heads or the config's pages.
    """
    limits = config.limits(role)
    mesh, kernels = make_mesh(devices), choose_kernels(config, devices)
    shapes = Shapes.for_role(role, limits, kernels)
    described = model.checkpoint.config
    try:
        return JaxEngine(
            described,
            params,
            mesh,
            config.rules,
            limits,
            shapes,
            config.dtype,
            kernels,
            packed,
            programs,
        )
    except ValueError as error:
        raise UsageError(f"kernels {kernels}: {error}") from error


def open_programs(
    config: ServerConfig, model: Model, roles: Sequence[Role], devices: Sequence[Any]
) -> Programs | None:
    """The kept programs of engines of these roles on these devices, which begin to load. None where
    JAX's own cache serves: on accelerators, and where a mesh spans processes.

    Raises:
        UsageError: as `choose_kernels`.
    """
    if devices[0].platform != "cpu" or jax.process_count() > 1:
        return None
    each = [devices[: config.devices(role)] for role in roles]
    # First of all: what is loaded may call the kernels in C++.
    kernels = [choose_kernels(config, of_one) for of_one in each]
    limits = [config.limits(role) for role in roles]
    about = (model.checkpoint.config, config.rules, config.dtype, roles, kernels, limits)
    try:
        return Programs(private_cache_dir("programs"), repr(about), devices)
    except NotPrivate as error:
        say_unusable(error)
        return None


def choose_kernels(config: ServerConfig, devices: Sequence[Any]) -> str:
    """The name of the kernels that an engine on these devices gets.

    Raises:
        UsageError: the config names some that cannot be had.
    """
    asked, platform = config.kernels, devices[0].platform
    if asked == "auto" and platform == "gpu":
        return "gpu_hopper" if _is_hopper(devices[0]) else "gpu"
    if asked == "auto" and platform == "tpu":
        return "tpu"
    if asked == "gpu_hopper" and platform == "gpu" and not _is_hopper(devices[0]):
        raise UsageError(
            f"config.kernels=gpu_hopper needs GPUs of compute capability {_HOPPER}, got "
            f"{devices[0].device_kind}"
        )
    for kind in ("gpu", "tpu"):
        if asked.startswith(kind) and platform != kind:
            raise UsageError(f"config.kernels={asked} needs devices of {kind}, got {platform}")
    if asked not in ("auto", "native"):
        return asked
    if platform != "cpu" or len(devices) > 1:
        if asked == "native":
            raise UsageError(
                "config.kernels=native needs meshes of one CPU device, "
                f"got {len(devices)} of {platform}"
            )
        return "cpu"
    try:
        with cache_or_temporary("native") as folder:  # needed no longer once it is loaded
            native.load(folder)
    except native.NotAvailable as error:
        if asked == "native":
            raise UsageError(f"config.kernels=native: {error}") from error
        # Once, though each instance asks.
        text = "the kernels in C++ are not used, which is slower: %s"
        log.warning(text, error, extra=ONCE)
        return "cpu"
    return "native"


def _is_hopper(device: Any) -> bool:
    return str(getattr(device, "compute_capability", "")) == _HOPPER


def warm_up(engine: JaxEngine, name: str, progress: Progress) -> None:
    """Compiles every shape."""
    total = len(list(engine.shapes)) + 1
    started, lock = 0, threading.Lock()

    def step(what: str) -> None:
        nonlocal started
        with lock:  # several are compiled at a time
            progress(f"compile {name} steps", started, total)
            started += 1

    engine.warm_up(step)
    progress(f"compile {name} steps", total, total)
