"""Builds what a config describes: the model on every mesh, the compiled engines, the workers."""

import functools
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kairos_jax.config import ServerConfig
from kairos_jax.engine import Engine, JaxEngine, Shapes
from kairos_jax.hub import cache_dir, resolve_model
from kairos_jax.launch import UsageError
from kairos_jax.messages import Event
from kairos_jax.page_keys import page_keys
from kairos_jax.programs import NotKept, Programs
from kairos_jax.progress import Progress
from kairos_jax.tokenizer import Tokenizer, load_tokenizer
from kairos_jax.transfer import KVTransport
from kairos_jax.worker import Worker
from models.checkpoint import Checkpoint, open_checkpoint
from models.checkpoint.gguf import GgufCheckpoint
from models.llama import Params
from models.ops import native
from models.sharding import make_mesh
from schedulers import prefill
from schedulers.colocated import policy_for
from schedulers.core import Instance, Policy, Role
from schedulers.cost import CostModel
from schedulers.journal import Journal
from schedulers.routing import Summary, outline

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Model:
    """A model on disk. tokenizer: None if it came without one."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer | None

    @property
    def eos_ids(self) -> frozenset[int]:
        ids = frozenset(self.checkpoint.config.eos_token_ids)
        return ids | self.tokenizer.eos_ids if self.tokenizer else ids


def open_model(config: ServerConfig) -> Model:
    """Finds the model and reads its description.

    Raises:
        ModelNotAvailable, UsageError: it is not to be had, or cannot be served so.
    """
    path = resolve_model(config.model)
    try:
        checkpoint = open_checkpoint(path)
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        fields = checkpoint.fields if isinstance(checkpoint, GgufCheckpoint) else None
        tokenizer = load_tokenizer(checkpoint.path, fields)
    except FileNotFoundError:
        tokenizer = None
    except ValueError as error:
        raise UsageError(str(error)) from error
    if config.max_context > checkpoint.config.max_context:
        raise UsageError(
            f"config.max_context must be at most the model's {checkpoint.config.max_context}, "
            f"got {config.max_context}"
        )
    return Model(checkpoint, tokenizer)


def build_engines(
    config: ServerConfig, model: Model, devices: Sequence[Any], progress: Progress
) -> list[JaxEngine]:
    """One for each of the config's roles: the weights loaded, every shape compiled.

    Raises:
        UsageError: the model cannot be split over so many devices, or its files are broken.
    """
    engines: list[JaxEngine] = []
    programs = open_programs(config, model, config.roles, devices)
    first, names = 0, _names(config)
    for role, name in zip(config.roles, names, strict=True):
        mine = devices[first : first + config.devices(role)]
        first += len(mine)
        # What an engine has made of its weights suits meshes of that size.
        alike = next((each.params for each in engines if each.mesh.size == len(mine)), None)
        params = load_weights(config, model, name, mine, progress, alike)
        packed = alike is not None
        engines.append(build_engine(config, model, role, mine, params, packed, programs))
    # XLA compiles mostly on one thread: two at once take little longer than one.
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
    shapes = Shapes.for_role(role, limits, config.prefill.row_tokens)
    mesh, kernels = make_mesh(devices), choose_kernels(config, devices)
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
    limits, row_tokens = [config.limits(role) for role in roles], config.prefill.row_tokens
    described, rules = model.checkpoint.config, config.rules
    about = (described, rules, config.dtype, roles, kernels, limits, row_tokens)
    try:
        return Programs(cache_dir("programs"), repr(about), devices)
    except NotKept as error:
        log.warning("compiled programs are not kept: %s", error)
        return None


def choose_kernels(config: ServerConfig, devices: Sequence[Any]) -> str:
    """The name of the kernels that an engine on these devices gets.

    Raises:
        UsageError: the config names some that cannot be had.
    """
    asked, platform = config.kernels, devices[0].platform
    if asked == "auto" and platform in ("gpu", "tpu"):
        return platform
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
        native.load(cache_dir("native"))
    except native.NotAvailable as error:
        if asked == "native":
            raise UsageError(f"config.kernels=native: {error}") from error
        log.warning("the kernels in C++ are not used, which is slower: %s", error)
        return "cpu"
    return "native"


def build_workers(
    config: ServerConfig,
    engines: Sequence[Engine],
    cost: CostModel,
    transport: KVTransport,
    emit: Callable[[Event], None],
    journal: Journal | None = None,
) -> list[Worker]:
    """One for each of the config's roles, not yet started. journal: told of all that happens to
    their ledgers.
    """
    return [
        build_worker(config, role, name, engine, cost, transport, emit, journal)
        for role, name, engine in zip(config.roles, _names(config), engines, strict=True)
    ]


def build_worker(
    config: ServerConfig,
    role: Role,
    name: str,
    engine: Engine,
    cost: CostModel,
    transport: KVTransport,
    emit: Callable[[Event], None],
    journal: Journal | None = None,
) -> Worker:
    """One worker, not yet started."""
    instance = Instance(name, role, engine.limits)
    if journal:
        instance.journal = journal.recorder(instance)
    policy = build_policy(config, role, cost)
    demotes = config.prefill.policy in prefill.DEMOTING
    summed_up = functools.partial(_outline, cost, demotes)
    keys = None
    part = config.decode if role is Role.DECODE else config.prefill
    if part.prefix_cache:
        keys = functools.partial(page_keys, engine.limits.page_size, secrets.token_bytes(32))
    return Worker(instance, policy, engine, transport, emit, summed_up, page_keys=keys)


def build_policy(config: ServerConfig, role: Role, cost: CostModel) -> Policy:
    """Who decides on an instance of this role."""
    return policy_for(role, cost, config.prefill.policy, config.decode.policy, config.prefill.pack)


def _outline(cost: CostModel, demotes: bool, instance: Instance, now: float) -> Summary:
    return outline(instance, cost, now, demotes)


def _names(config: ServerConfig) -> list[str]:
    """An id for each instance: its role, and its number among those of its role."""
    roles = config.roles
    words = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.BOTH: "colocated"}
    return [f"{words[role]}-{roles[:index].count(role)}" for index, role in enumerate(roles)]


def warm_up(engine: JaxEngine, name: str, progress: Progress) -> None:
    """Compiles every shape."""
    total = len(list(engine.shapes)) + 1
    started = 0

    def step(what: str) -> None:
        nonlocal started
        progress(f"compile {name} steps", started, total)
        started += 1

    engine.warm_up(step)
    progress(f"compile {name} steps", total, total)


def parallel(jobs: Sequence[Callable[[], None]]) -> None:
    """Runs the jobs on a thread each; the first error of any is raised here.

    Daemon threads, so that a Ctrl-C need not wait for a compilation.
    """
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
