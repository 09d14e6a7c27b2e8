"""Builds what a config describes: the model on both meshes, the compiled engines, the workers."""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from kairos_jax.config import ServerConfig
from kairos_jax.engine import JaxEngine, Shapes
from kairos_jax.hub import resolve_model
from kairos_jax.launch import UsageError
from kairos_jax.progress import Progress
from kairos_jax.tokenizer import Tokenizer, load_tokenizer
from kairos_jax.transfer import LocalTransport
from kairos_jax.worker import Event, Worker
from models.checkpoint import Checkpoint, open_checkpoint
from models.checkpoint.gguf import GgufCheckpoint
from models.llama import Params, abstract_params
from models.sharding import Rules, make_mesh
from schedulers import decode, prefill
from schedulers.core import Instance, Role
from schedulers.cost import CostModel


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


@dataclass(frozen=True, slots=True)
class Engines:
    """The two engines of a disaggregated server, on disjoint devices."""

    prefill: JaxEngine
    decode: JaxEngine


def build_engines(
    config: ServerConfig, model: Model, devices: Sequence[Any], progress: Progress
) -> Engines:
    """Loads the weights onto both meshes and compiles every shape. Raises UsageError."""
    split = config.prefill.devices
    try:
        prefill_engine = _build_engine(config, model, Role.PREFILL, devices[:split], progress)
        decode_engine = _build_engine(
            config, model, Role.DECODE, devices[split:], progress, prefill_engine.params
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    # XLA compiles mostly on one thread: two at once take little longer than one.
    jobs = {"prefill": prefill_engine, "decode": decode_engine}
    parallel([functools.partial(_warm_up, jobs[name], name, progress) for name in jobs])
    return Engines(prefill_engine, decode_engine)


def build_workers(
    config: ServerConfig,
    engines: Engines,
    cost: CostModel,
    transport: LocalTransport,
    emit: Callable[[Event], None],
) -> tuple[Worker, Worker]:
    """The prefill and the decode worker, not yet started."""
    prefill_policy = prefill.POLICIES[config.prefill.policy](cost)
    decode_policy = decode.POLICIES[config.decode.policy](cost)
    prefill_ledger = Instance("prefill-0", Role.PREFILL, engines.prefill.limits)
    decode_ledger = Instance("decode-0", Role.DECODE, engines.decode.limits)
    return (
        Worker(prefill_ledger, prefill_policy, engines.prefill, transport, emit, time.monotonic),
        Worker(decode_ledger, decode_policy, engines.decode, transport, emit, time.monotonic),
    )


def _build_engine(
    config: ServerConfig,
    model: Model,
    role: Role,
    devices: Sequence[Any],
    progress: Progress,
    loaded: Params | None = None,
) -> JaxEngine:
    """loaded: the weights on another mesh, from where they are copied rather than read again."""
    stage = f"load {role.value} weights"
    progress(stage, 0, 1)
    mesh, rules, description = make_mesh(devices), Rules(), model.checkpoint.config
    if loaded is None:
        params = model.checkpoint.load(mesh, rules, config.dtype)
    else:
        wanted = abstract_params(description, config.dtype, mesh, rules)
        params = jax.device_put(dict(loaded), {path: w.sharding for path, w in wanted.items()})
    limits = config.limits(config.prefill if role is Role.PREFILL else config.decode)
    shapes = Shapes.for_role(role, limits, config.prefill.row_tokens)
    engine = JaxEngine(
        description, params, mesh, rules, limits, shapes, config.dtype, config.attention
    )
    progress(stage, 1, 1)
    return engine


def _warm_up(engine: JaxEngine, name: str, progress: Progress) -> None:
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
