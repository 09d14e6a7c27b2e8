"""The devices that an engine gets: how JAX starts, alone or as one of the processes of a mesh."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from kairos_jax.net import address
from kairos_jax.net.address import split_address
from kairos_jax.process.cache import NotPrivate, private_cache_dir, say_unusable
from kairos_jax.process.command import UsageError

# JAX's own watch over the processes of a mesh is for what happens before ours begins, and for when
# ours fails (kairos_jax.engine.followers): it kills a process to which one of the others was lost.
_HEARTBEAT_TIMEOUT_S = 60


_INITIALIZATION_TIMEOUT_S = 300


_SHUTDOWN_TIMEOUT_S = 10


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes that one mesh spans, which run one program together. address: of the first,
    "host:port"; count: how many; id: which of them this is.
    """

    address: str
    count: int
    id: int

    @property
    def several(self) -> bool:
        return self.count > 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that decides what all of them run."""
        return self.id == 0


ALONE = Processes("", 1, 0)


def define_distributed_flags() -> None:
    """Of the roles whose mesh may span processes."""
    flags.DEFINE_string(
        "coordinator_address", "", "host:port of process 0, if the mesh spans processes."
    )
    flags.DEFINE_integer("num_processes", 1, "Number of processes that the mesh spans.", 1)
    flags.DEFINE_integer("process_id", 0, "Number of this process in the mesh, from 0.", 0)


def start_distributed() -> Processes:
    """Meets the other processes that the flags tell of. To be called before `start_jax`.

    Raises:
        UsageError: the flags contradict each other, or the others did not come.
    """
    values = flags.FLAGS
    processes = Processes(values.coordinator_address, values.num_processes, values.process_id)
    if processes.id >= processes.count:
        raise UsageError(
            f"--process_id must be below --num_processes, {processes.count}, got {processes.id}"
        )
    if processes.several != bool(processes.address):
        raise UsageError(
            "--coordinator_address and --num_processes above 1 need each other: got "
            f"{processes.address!r} and {processes.count}"
        )
    if processes.several:
        try:
            where = split_address(processes.address)
            if processes.leads:  # JAX would end the process, and not say why
                address.listen(*where).close()
        except (OSError, ValueError) as error:
            raise UsageError(f"--coordinator_address: {error}") from error
        connect(processes)
    return processes


def connect(processes: Processes) -> None:
    """Makes this process one of `processes`. Raises UsageError if they do not come together."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself, which is what drains a server.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            processes.address,
            processes.count,
            processes.id,
            # JAX would listen on every address of the host.
            coordinator_bind_address=processes.address,
            cluster_detection_method="deactivate",
            initialization_timeout=_INITIALIZATION_TIMEOUT_S,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_S,
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--coordinator_address={processes.address}: {error}") from error


def agree(processes: Processes, told: Mapping[str, Any]) -> None:
    """Compares what all processes of a mesh must have in common; each calls it, after `start_jax`.

    told: values that JSON can carry, by the names by which a user knows them.

    Raises:
        UsageError: one tells another value than the first. All processes raise it then.
    """
    mine = np.frombuffer(json.dumps(_named(told)).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([mine.size], np.int32)).reshape(-1)
    padded = np.zeros(sizes.max(), np.int32)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded).reshape(processes.count, -1)
    texts = [row[:size].astype(np.uint8).tobytes() for row, size in zip(rows, sizes, strict=True)]
    first, *others = map(json.loads, texts)
    for id, other in enumerate(others, 1):
        differing = [
            f"{name} is {other.get(name)!r}, and {first.get(name)!r} of process 0"
            for name in first | other
            if other.get(name) != first.get(name)
        ]
        if differing:
            raise _common_error(
                f"process {id} of the mesh is not like the first: its {'; its '.join(differing)}"
            )


def _common_error(message: str) -> UsageError:
    """One that every process of a mesh finds. None is to end while another still looks for it."""
    jax.distributed.shutdown()
    return UsageError(message)


def _named(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values within values by their dotted names, as a user writes them."""
    named = {}
    for key, value in values.items():
        deeper = isinstance(value, Mapping)
        named |= _named(value, f"{prefix}{key}.") if deeper else {f"{prefix}{key}": value}
    return named


def find_devices(cpu_devices: int) -> list[Any]:
    """The devices of this host; where the CPU is all that JAX finds, so many are made of it."""
    _make_cpu_devices(cpu_devices)
    return jax.local_devices()


def _make_cpu_devices(count: int) -> None:
    # That a platform is not there is no news.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    if jax.config.values["jax_num_cpu_devices"] != count:  # JAX refuses changes once it has looked
        jax.config.update("jax_num_cpu_devices", count)


def start_jax(num_devices: int, cpu_devices: int = 0, processes: Processes = ALONE) -> list[Any]:
    """Turns the compilation cache on and returns the first `num_devices` devices, as many of each
    process.

    Where the CPU is all that JAX finds, it makes `cpu_devices` of it, or as many as are asked for.

    Raises:
        UsageError: there are not so many.
    """
    if num_devices % processes.count:
        raise UsageError(
            f"{num_devices} devices cannot be spread evenly over --num_processes={processes.count}"
        )
    each = num_devices // processes.count
    _make_cpu_devices(cpu_devices or each)
    try:
        jax.config.update("jax_compilation_cache_dir", str(private_cache_dir("xla")))
    except NotPrivate as error:
        say_unusable(error)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    local = [jax.local_devices(id) for id in range(processes.count)]
    if len({len(of_process) for of_process in local}) > 1:
        raise _common_error(
            "every process of a mesh must have as many devices as the first, and they have "
            f"{', '.join(str(len(of_process)) for of_process in local)}: --cpu_devices and the "
            "config's devices must be the same for all"
        )
    devices = [device for of_process in local for device in of_process[:each]]
    if len(devices) < num_devices:
        raise UsageError(
            f"the instances of the config need {num_devices} devices, and there are "
            f"{len(devices)} {devices[0].platform} devices"
        )
    return devices
