"""Devices that are not here, described well enough for their compilers.

The compiler of a TPU comes with the package libtpu, that of an NVIDIA GPU with jax-cuda12-plugin
and jax-cuda12-pjrt; neither needs a device or a driver. Both in one process do not go together.

JAX asks the device at hand in a few places what it is compiling for. There is none, so those places
are told here, by names that JAX keeps to itself: one that is gone is an error, not passed over.
"""

import importlib
import os
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
from jax.experimental import topologies

from kairos_jax.config.chips import Chip
from kairos_jax.process.command import UsageError

_INSTALL = {
    "tpu": "libtpu",
    "gpu": "jax-cuda12-plugin and jax-cuda12-pjrt, of the version of jax, with --no-deps",
}
# Chips of one host in the torus, by how many there are of them.
_HOSTS = {1: (1, 1), 4: (2, 2), 8: (2, 4)}
# What a driver would say: bytes of level-2 cache and of memory, and bytes a second.
_GPUS = {
    "h100": (52428800, 84978434048, 3352320000000),
    "h200": (62914560, 150109880320, 4800000000000),
}
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 9 patch: 0 }}
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
device_description_str: "{title}"
"""


def prepare() -> None:
    """To be called before JAX looks for devices: it is to find the CPU alone, and to wait for
    nothing that only a machine with an accelerator has.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no metadata server
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no lock on a device
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL"):
        os.environ.setdefault(name, "3")
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # what kernels take: see ahead.spills
    # Autotuning runs kernels.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()


def describe(chip: Chip, count: int) -> Sequence[Any]:
    """The devices of one host with so many of a chip.

    Raises:
        UsageError: a host has not so many, or the compiler is not installed.
    """
    if count > chip.most:
        raise UsageError(
            f"the config needs {count} devices, and a host of {chip.title} has {chip.most}"
        )
    try:
        devices = _tpus(chip, count) if chip.platform == "tpu" else _gpus(chip, count)
    except Exception as error:
        raise UsageError(
            f"there is no compiler for {chip.title} here: install {_INSTALL[chip.platform]}, or "
            f"give --fast ({' '.join(str(error).split())[:200]})"
        ) from error
    return devices


def _tpus(chip: Chip, count: int) -> Sequence[Any]:
    size = min(each for each in _HOSTS if each >= count)
    shape = _HOSTS[size]
    topology = topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{chip.name}:{shape[0]}x{shape[1]}",
        chips_per_host_bounds=(*shape, 1),
    )
    devices = topology.devices
    kind, cores = devices[0].device_kind, devices[0].num_cores
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import tuned_block_sizes

    told = SimpleNamespace(**vars(jax) | {"devices": lambda *_: devices})
    _tell(tuned_block_sizes, jax=told)
    # JAX 0.12, and 0.10: the newer one also has the older name, for a copy of what is in it.
    info = _first("jax._src.tpu_info", "jax._src.pallas.mosaic.tpu_info")
    _tell(info, get_device_kind=lambda: kind, get_num_device_cores=lambda: cores)
    return devices[:count]


def _gpus(chip: Chip, count: int) -> Sequence[Any]:
    cache, memory, bandwidth = _GPUS[chip.name]
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=chip.name,
        topology=f"1x1x{count}",
        target_config=_GPU.format(
            title=chip.title, cache=cache, memory=memory, bandwidth=bandwidth
        ),
    )
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    # JAX asks the driver before it lowers to cuDNN.
    _tell(cudnn, check_cudnn_version=lambda: 91200, check_compute_capability=lambda *_: True)
    return topology.devices[:count]


def _first(*names: str) -> ModuleType:
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError(f"none of {', '.join(names)} is there")


def _tell(module: ModuleType, **answers: Any) -> None:
    """Replaces names of a module. Raises AttributeError for one that is not there."""
    for name, answer in answers.items():
        getattr(module, name)
        setattr(module, name, answer)
