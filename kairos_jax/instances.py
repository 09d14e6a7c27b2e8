"""Builds what a config describes: the model on every mesh, the compiled engines, the workers."""

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from kairos_jax.config import ServerConfig
from kairos_jax.engine import Engine, JaxEngine, Shapes
from kairos_jax.hub import resolve_model
from kairos_jax.launch import UsageError
from kairos_jax.messages import Event
from kairos_jax.progress import Progress
from kairos_jax.tokenizer import Tokenizer, load_tokenizer
from kairos_jax.transfer import KVTransport
from kairos_jax.worker import Worker
from models.checkpoint import Checkpoint, open_checkpoint
from models.checkpoint.gguf import GgufCheckpoint
from models.llama import Params, abstract_params
from models.sharding import Rules, make_mesh
from schedulers import prefill
from schedulers.colocated import policy_for
from schedulers.core import Instance, Policy, Role
from schedulers.cost import CostModel
from schedulers.journal import Journal
from schedulers.routing import Summary, outline


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
    first, names = 0, _names(config)
    for role, name in zip(config.roles, names, strict=True):
        mine = devices[first : first + config.devices(role)]
        first += len(mine)
        loaded = engines[0].params if engines else None
        engines.append(build_engine(config, model, role, name, mine, progress, loaded))
    # XLA compiles mostly on one thread: two at once take little longer than one.
    named = zip(engines, names, strict=True)
    parallel([functools.partial(warm_up, engine, name, progress) for engine, name in named])
    return engines


def build_engine(
    config: ServerConfig,
    model: Model,
    role: Role,
    name: str,
    devices: Sequence[Any],
    progress: Progress,
    loaded: Params | None = None,
) -> JaxEngine:
    """One engine, nothing compiled yet. loaded: the weights on another mesh, from where they are
    copied rather than read again.

    Raises:
        UsageError: the model cannot be split over so many devices, or its files are broken.
    """
    progress(f"load {name} weights", 0, 1)
    try:
        engine = _build_engine(config, model, role, devices, loaded)
    except ValueError as error:
        raise UsageError(str(error)) from error
    progress(f"load {name} weights", 1, 1)
    return engine


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
    return Worker(instance, policy, engine, transport, emit, summed_up)


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


def _build_engine(
    config: ServerConfig,
    model: Model,
    role: Role,
    devices: Sequence[Any],
    loaded: Params | None,
) -> JaxEngine:
    mesh, rules, description = make_mesh(devices), Rules(), model.checkpoint.config
    if loaded is None:
        params = model.checkpoint.load(mesh, rules, config.dtype)
    else:
        wanted = abstract_params(description, config.dtype, mesh, rules)
        params = jax.device_put(dict(loaded), {path: w.sharding for path, w in wanted.items()})
    limits = config.limits(role)
    shapes = Shapes.for_role(role, limits, config.prefill.row_tokens)
    return JaxEngine(
        description, params, mesh, rules, limits, shapes, config.dtype, config.attention
    )


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
