"""The layers of a transformer of the Llama kind.

Dimension letters: R rows, Q queries a row, D hidden size, N q heads, K kv heads, H head dim,
F mlp size, V vocabulary. Weights lie as [in, out], for x @ W.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.config import ModelConfig, rope_frequencies
from models.ops.linear import Linear
from models.sharding import Axes

Rope = tuple[Float[Array, "R Q 1 H/2"], Float[Array, "R Q 1 H/2"]]
"""Cosine and sine of each token's rope angles."""

Attend = Callable[
    [Float[Array, "R Q N H"], Float[Array, "R Q K H"], Float[Array, "R Q K H"]],
    Float[Array, "R Q N H"],
]


def weight(
    rngs: nnx.Rngs | None, axes: Axes, shape: tuple[int, ...], dtype: DTypeLike, stddev: float
) -> nnx.Param:
    """Declares a weight: its logical axes, shape, dtype and initial distribution. rngs: None for
    zeros, where only the declaration is wanted: to trace the rest took SmolLM2 a second.
    """
    if rngs is None:
        return nnx.Param(jnp.zeros(shape, dtype), axes=axes)
    value = nnx.initializers.normal(stddev)(rngs.params(), shape, dtype)
    return nnx.Param(value, axes=axes)


class RMSNorm(nnx.Module):
    """Scales the last dimension to a root mean square of 1, in f32."""

    def __init__(self, size: int, axis: str, *, eps: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((size,), dtype), axes=(axis,))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(mean + self.eps)).astype(x.dtype)
        return normed * jnp.expand_dims(self.scale[...], tuple(range(x.ndim - 1)))


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; what attends is passed in."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        hidden, head_dim = config.hidden_size, config.head_dim
        heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
        names = {"q": "heads", "k": "kv_heads", "v": "kv_heads"}

        def projection(part: str) -> nnx.Param:
            shape = (hidden, heads[part], head_dim)
            return weight(rngs, ("embed", names[part], "head_dim"), shape, dtype, hidden**-0.5)

        def bias(part: str) -> nnx.Param:
            return weight(rngs, (names[part], "head_dim"), (heads[part], head_dim), dtype, 0.02)

        self.q, self.k, self.v = projection("q"), projection("k"), projection("v")
        out_shape = (config.num_heads, head_dim, hidden)
        stddev = (config.num_heads * head_dim) ** -0.5
        self.o = weight(rngs, ("heads", "head_dim", "embed"), out_shape, dtype, stddev)
        self.num_heads, self.num_kv_heads, self.head_dim = heads["q"], heads["k"], head_dim
        self.has_bias, self.has_norm = config.qkv_bias, config.qk_norm
        if config.qkv_bias:
            self.q_bias, self.k_bias, self.v_bias = bias("q"), bias("k"), bias("v")
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, "head_dim", eps=config.norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(head_dim, "head_dim", eps=config.norm_eps, dtype=dtype)

    def __call__(
        self, x: Float[Array, "R Q D"], rope: Rope, attend: Attend, linear: Linear
    ) -> Float[Array, "R Q D"]:
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        parts = zip((self.q, self.k, self.v), heads, strict=True)
        q, k, v = (linear(x, w[...], count, self.head_dim) for w, count in parts)
        if self.has_bias:
            biases = (self.q_bias, self.k_bias, self.v_bias)
            q, k, v = (y + b[...][None, None] for y, b in zip((q, k, v), biases, strict=True))
        if self.has_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(rotate(q, rope), rotate(k, rope), v)
        return linear(out.reshape(*x.shape[:2], -1), self.o[...], x.shape[-1])


class Mlp(nnx.Module):
    """The gated feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        hidden, size = config.hidden_size, config.mlp_size
        into = (("embed", "mlp"), (hidden, size), dtype, hidden**-0.5)
        self.gate, self.up = weight(rngs, *into), weight(rngs, *into)
        self.down = weight(rngs, ("mlp", "embed"), (size, hidden), dtype, size**-0.5)

        self.size = size

    def __call__(self, x: Float[Array, "R Q D"], linear: Linear) -> Float[Array, "R Q D"]:
        gate, up = linear(x, self.gate[...], self.size), linear(x, self.up[...], self.size)
        return linear(jax.nn.silu(gate) * up, self.down[...], x.shape[-1])


class Block(nnx.Module):
    """One layer: attention, then the mlp, each normed before and added to the residual."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        hidden, eps = config.hidden_size, config.norm_eps
        self.attention_norm = RMSNorm(hidden, "embed", eps=eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(hidden, "embed", eps=eps, dtype=dtype)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "R Q D"], rope: Rope, attend: Attend, linear: Linear
    ) -> Float[Array, "R Q D"]:
        with jax.named_scope("attention"):
            x = x + self.attention(self.attention_norm(x), rope, attend, linear)
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x), linear)


def rope_angles(config: ModelConfig, positions: Int[Array, "R Q"]) -> Rope:
    """Cosine and sine of position times frequency, in f32: bf16 cannot tell 4097 from 4096."""
    frequencies = rope_frequencies(config.rope_theta, config.head_dim, config.rope_scaling)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "R Q N H"], rope: Rope) -> Float[Array, "R Q N H"]:
    """Rotates the pairs (i, i + H/2) of each head: the half-rotation form of Hugging Face."""
    cos, sin = rope
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return turned.astype(x.dtype)
