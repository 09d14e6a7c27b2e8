"""A config for a model on the devices that are here, for when the flags name none."""

import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import AbstractMesh, AxisType

from kairos_jax.config import ServerConfig
from kairos_jax.engine.devices import find_devices
from kairos_jax.process import hub, launch
from kairos_jax.process.command import UsageError
from models import kv_cache
from models.checkpoint import open_checkpoint
from models.config import ModelConfig
from models.ops import KERNELS
from models.params import abstract_params, pack_config
from models.sharding import MESH_AXES, Rules

_PAGES = 64  # of a pool whose size is computed: layouts may pad small ones


@dataclass(frozen=True, slots=True)
class Machine:
    """platform: of the devices; devices: how many; memory: bytes to use of each of them, or of the
    host where the devices are its CPU.
    """

    platform: str
    devices: int
    memory: int

    def __str__(self) -> str:
        memory = f"{self.memory / 2**30:.1f} GiB to use"
        if self.platform == "cpu":
            return f"a CPU with {memory}"
        if self.devices == 1:
            return f"a {self.platform} device with {memory}"
        return f"{self.devices} {self.platform} devices with {memory} each"


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What suits a kind of devices. share: of the memory, for weights and KV."""

    dtype: str
    share: float
    max_batch: int
    max_chunk: int
    slo: tuple[float, float]


# As in configs/smollm2_135m_cpu.py and configs/llama3_8b.py. A CPU's memory is for others too.
_CPU = _Sizes("float32", 0.25, 32, 256, (2.0, 0.15))
_ACCELERATOR = _Sizes("bfloat16", 0.85, 64, 2048, (1.0, 0.05))
# Weights may take so much of a device's share; a larger model is split over more devices.
_MOST_WEIGHTS = 0.7
# Of the KV of an instance that hands over, what waits for decode.
_PARKED = 0.25


def read_config() -> ServerConfig:
    """The config that the flags name; if they name none, one for the model and the devices, which
    is printed. Raises ConfigError, ModelNotAvailable or UsageError.
    """
    if launch.has_config():
        return launch.read_config()
    wanted = launch.overrides()
    name = wanted.get("model", hub.DEFAULT_MODEL)
    try:
        model = open_checkpoint(hub.resolve_model(name)).config
    except ValueError as error:
        raise UsageError(str(error)) from error
    cpu = Machine("cpu", flags.FLAGS.cpu_devices or 1, _host_memory())
    # JAX must know how many devices to make of a CPU before it looks for others.
    on_cpu = _num_devices(suggest(name, model, replace(cpu, memory=2**60), wanted))
    found = find_devices(flags.FLAGS.cpu_devices or on_cpu)
    machine = cpu
    if found[0].platform != "cpu":
        stats = found[0].memory_stats() or {}
        free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
        machine = Machine(found[0].platform, len(found), free)
    config = launch.with_overrides(suggest(name, model, machine, wanted))
    print(f"no --config: for {machine}, {_describe(config)}", flush=True)
    return config


def suggest(
    name: str, model: ModelConfig, machine: Machine, wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of a config for a model. wanted: values that overrides will give to some keys, by
    their dotted names; the others go by them.

    Sizes of pools are powers of two, so that two starts with nearly the same memory share their
    compiled programs and measured step times.

    Raises:
        UsageError: the model does not fit.
    """
    sizes = _CPU if machine.platform == "cpu" else _ACCELERATOR
    dtype, page = wanted.get("dtype", sizes.dtype), wanted.get("page_size", 64)
    mesh = wanted.get("prefill.devices") or _mesh_size(name, model, machine, dtype)
    count = max(machine.devices // mesh, 1)
    colocated = wanted.get("colocated", count < 2)
    alike = wanted.get("decode.devices", mesh) == mesh
    fluid = wanted.get("fluid", alike and not colocated)
    # Where roles flow, a third begins with decode; more take part as the load needs.
    begin_with_decode = max(count // 3, 1) if fluid else count - max(count // 2, 1)
    prefills = wanted.get("prefill.instances", count if colocated else count - begin_with_decode)
    prefills = max(prefills, 1)
    decodes = wanted.get("decode.instances", 1 if colocated else max(count - prefills, 1))
    room = machine.memory * sizes.share
    if machine.platform == "cpu":  # whose memory all instances share
        room /= prefills if colocated else prefills + decodes
    kernels = "cpu" if machine.platform == "cpu" else machine.platform
    try:
        of_weights, of_token = device_bytes(model, dtype, mesh, kernels, page)
    except ValueError as error:
        raise UsageError(f"{name} on meshes of {mesh} devices: {error}") from error
    tokens = (room - of_weights) / of_token
    if tokens < 4 * page:
        raise _too_large(name, model, machine, dtype)
    # More would serve no batch of the longest requests.
    longest = wanted.get("max_context", model.exact_context)
    tokens = min(tokens, wanted.get("decode.max_batch", sizes.max_batch) * max(longest, page))
    beside_parked = _power_of_two(tokens * (1 - _PARKED))
    decode_tokens = beside_parked if fluid else _power_of_two(tokens)
    prefill_tokens = decode_tokens if colocated else beside_parked
    parked = decode_tokens if colocated else _power_of_two(tokens * _PARKED)
    # Two of the longest requests at once, at least.
    most = min(decode_tokens // 2, prefill_tokens // 2, parked)
    max_context = wanted.get("max_context", min(model.exact_context, most))
    ttft, tpot = sizes.slo
    return {
        "model": name,
        "dtype": dtype,
        "max_context": max_context,
        "max_tokens": max(max_context // 2, 1),
        "page_size": page,
        "colocated": colocated,
        "fluid": fluid,
        "prefill": {
            "instances": prefills,
            "devices": mesh,
            "kv_tokens": prefill_tokens,
            "parked_tokens": parked,
            "max_chunk": min(sizes.max_chunk, max_context),
        },
        "decode": {
            "instances": decodes,
            "devices": mesh,
            "kv_tokens": decode_tokens,
            "max_batch": sizes.max_batch,
        },
        "slo": {"ttft": ttft, "tpot": tpot},
    }


def _mesh_size(name: str, model: ModelConfig, machine: Machine, dtype: str) -> int:
    """The fewest devices over which the weights fit. 1 on a CPU, whose devices share its memory."""
    if machine.platform == "cpu":
        return 1
    for size in itertools.takewhile(lambda n: n <= machine.devices, (2**i for i in range(16))):
        try:
            of_weights, _ = device_bytes(model, dtype, size, machine.platform, 64)
        except ValueError:  # the heads do not divide
            continue
        if of_weights <= _MOST_WEIGHTS * _ACCELERATOR.share * machine.memory:
            return size
    raise _too_large(name, model, machine, dtype)


def _too_large(name: str, model: ModelConfig, machine: Machine, dtype: str) -> UsageError:
    needed, _ = device_bytes(model, dtype, 1, "cpu", 64)
    return UsageError(
        f"{name} does not fit: its weights take {needed / 2**30:.1f} GiB as {dtype}, and there is "
        f"{machine}; give a smaller model, another --config.dtype, or a --config of your own"
    )


def device_bytes(
    model: ModelConfig,
    dtype: str,
    devices: int,
    kernels: str,
    page_size: int,
    rules: Rules | None = None,
) -> tuple[int, float]:
    """What the weights and the KV of one token take of each device of a mesh. kernels: by name.

    Raises:
        ValueError: the model cannot be split over so many, or the kernels do not take it.
    """
    rules, own = rules or Rules(), KERNELS[kernels]
    mesh = AbstractMesh((devices,), MESH_AXES, axis_types=(AxisType.Auto,))
    packed = pack_config(model, own, mesh, rules)
    weights = abstract_params(packed, dtype, mesh, rules).values()
    shardings = own.layout.shardings(packed, mesh, rules)
    pool = kv_cache.abstract(packed, own.layout, _PAGES, page_size, dtype, shardings)
    of_pool = sum(map(_on_device, jax.tree.leaves(pool)))
    return sum(map(_on_device, weights)), of_pool / (_PAGES * page_size)


def _on_device(array: Any) -> int:
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _power_of_two(value: float) -> int:
    """The largest that is not above."""
    return 2 ** math.floor(math.log2(value))


def _num_devices(values: Mapping[str, Any]) -> int:
    prefill, decode = values["prefill"], values["decode"]
    of_prefill = prefill["instances"] * prefill["devices"]
    if values["colocated"]:
        return of_prefill
    return of_prefill + decode["instances"] * decode["devices"]


def _describe(config: ServerConfig) -> str:
    """What was chosen, in short."""
    pools = f"{config.decode.kv_tokens} tokens of KV"
    if not config.colocated:
        pools = f"{config.prefill.kv_tokens} + {pools}"
    return (
        f"{config.layout}, {config.dtype}, max_context {config.max_context}, {pools}, "
        f"max_batch {config.decode.max_batch}, max_chunk {config.prefill.max_chunk} "
        "(--dump_config=FILE writes all keys)"
    )


def _host_memory() -> int:
    """Bytes that this process may use: what is free of the host and of its control group, and half
    of the host at most, so that the number is mostly the same at the next start.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        parts = (line.partition(":") for line in lines)
        sizes = {name: 1024 * int(rest.split()[0]) for name, _, rest in parts}
        memory = min(sizes["MemAvailable"], sizes["MemTotal"] // 2)
    except (OSError, KeyError, ValueError):  # not Linux
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        return min(memory, int(limit) - int(used))
    except (OSError, ValueError):  # no group, or "max": no limit
        return memory
