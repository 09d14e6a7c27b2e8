"""Accelerators for which a deployment can be planned: what their vendors state of one device."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Chip:
    """One device.

    Attributes:
        name: as --chip takes it.
        title: in words.
        platform: JAX's.
        memory: bytes that programs and arrays may take together, after what the platform keeps.
        bandwidth: bytes a second from that memory.
        flops: operations a second of products, by dtype.
        link: bytes a second to the other devices of its mesh, in one direction.
        most: devices of one host.
        cache: bytes of a cache before that memory. A TPU has none: its programs say what they bring
            into fast memory.
    """

    name: str
    title: str
    platform: Literal["gpu", "tpu"]
    memory: int
    bandwidth: float
    flops: Mapping[str, float]
    link: float
    most: int = 8
    cache: int = 0


# Of a GPU JAX takes three quarters by default (XLA_PYTHON_CLIENT_MEM_FRACTION), of a TPU all but
# what its runtime keeps. A TPU computes products of float32 in three passes or six of bfloat16, as
# asked for; by default in one, which is what is counted.
_GPU_SHARE = 0.75
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            *("v5e", "TPU v5e", "tpu", int(15.75 * GIB), 819e9),
            *({"bfloat16": 197e12, "float32": 197e12}, 100e9),
        ),
        Chip(
            *("v6e", "TPU v6e", "tpu", int(31.25 * GIB), 1640e9),
            *({"bfloat16": 918e12, "float32": 918e12}, 224e9),
        ),
        Chip(
            *("h100", "NVIDIA H100 SXM, 80 GB", "gpu", int(_GPU_SHARE * 79.1 * GIB), 3352e9),
            *({"bfloat16": 989e12, "float32": 67e12}, 450e9, 8, 50 << 20),
        ),
        Chip(
            *("h200", "NVIDIA H200 SXM, 141 GB", "gpu", int(_GPU_SHARE * 139.8 * GIB), 4800e9),
            *({"bfloat16": 989e12, "float32": 67e12}, 450e9, 8, 50 << 20),
        ),
    )
}
