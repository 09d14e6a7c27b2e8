"""Rotary positions: how fast each pair of a head's dimensions turns, and the turning.

Dimension letters: T tokens, N heads, H head dim.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rope's frequencies are stretched for contexts longer than those trained on.

    'linear' divides all of them by `factor`. 'llama3' divides those whose wavelength is longer than
    original_max_position / low_freq_factor, keeps those shorter than original_max_position /
    high_freq_factor, and blends in between.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope_scaling.kind must be 'linear' or 'llama3', got {self.kind!r}")
        if not self.factor >= 1:
            raise ValueError(f"rope_scaling.factor must be at least 1, got {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "rope_scaling.low_freq_factor must be above 0 and below high_freq_factor "
                f"{self.high_freq_factor}, got {self.low_freq_factor}"
            )
        if self.original_max_position < 1:
            raise ValueError(
                "rope_scaling.original_max_position must be at least 1, "
                f"got {self.original_max_position}"
            )


def rope_frequencies(theta: float, head_dim: int, scaling: RopeScaling | None) -> np.ndarray:
    """Radians a position for each pair of a head's dimensions: [head_dim / 2] f32.

    In f32 throughout, as Hugging Face does: late positions see the rounding.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = np.float32(1) / np.float32(theta) ** exponents
    if scaling is None:
        return plain
    stretched = plain / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return stretched
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position * plain / np.float32(2 * np.pi)
    keep = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return keep * plain + (1 - keep) * stretched


Rope = tuple[Float[Array, "T 1 H/2"], Float[Array, "T 1 H/2"]]
"""Cosine and sine of each token's rope angles."""


def rope_angles(frequencies: np.ndarray, positions: Int[Array, "T"]) -> Rope:
    """Cosine and sine of position times frequency, in f32: bf16 cannot tell 4097 from 4096.

    frequencies: of `rope_frequencies`.
    """
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies[None, None, :]

    def both() -> Rope:
        return jnp.cos(angles), jnp.sin(angles)

    def apart() -> Rope:
        none = jnp.zeros_like(angles)
        return jax.lax.cond(positions[0] >= 0, both, lambda: (none, none))

    # On a CPU, XLA would compute them anew for each head of each layer: a twentieth of a step. It
    # does not look into a condition.
    return jax.lax.platform_dependent(cpu=apart, default=both)


def rotate(x: Float[Array, "T N H"], rope: Rope) -> Float[Array, "T N H"]:
    """Rotates the pairs (i, i + H/2) of each head: the half-rotation form of Hugging Face."""
    cos, sin = rope
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return turned.astype(x.dtype)
