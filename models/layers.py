"""The layers of a transformer of the Llama kind, each with the declarations of its weights.

Dimension letters: T tokens, D hidden size, N q heads, K kv heads, H head dim,
F mlp size. Weights lie as [in, out], for x @ W.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.ops.linear import Linear
from models.rope import Rope, rotate
from models.weights import declare

Attend = Callable[
    [Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]],
    Float[Array, "T N H"],
]


class RMSNorm(nnx.Module):
    """Scales the last dimension to a root mean square of 1, in f32. axis: its logical name;
    hugging_face, gguf: see `models.weights.declare`.
    """

    def __init__(
        self, config: ModelConfig, axis: str, dtype: DTypeLike, *, hugging_face: str, gguf: str
    ):
        self.scale = declare(
            config, (axis,), dtype, None, stddev=None, hugging_face=hugging_face, gguf=gguf
        )
        self.eps = config.norm_eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(mean + self.eps)).astype(x.dtype)
        return normed * jnp.expand_dims(self.scale[...], tuple(range(x.ndim - 1)))


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; what attends is passed in."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        axes = {"q": "heads", "k": "kv_heads", "v": "kv_heads"}

        def projection(part: str) -> nnx.Param:
            return declare(
                config,
                ("embed", axes[part], "head_dim"),
                dtype,
                rngs,
                stddev=config.hidden_size**-0.5,
                num_inputs=1,
                rotated=part != "v",
                hugging_face=f"self_attn.{part}_proj.weight",
                gguf=f"attn_{part}.weight",
            )

        def bias(part: str) -> nnx.Param:
            return declare(
                config,
                (axes[part], "head_dim"),
                dtype,
                rngs,
                stddev=0.02,
                rotated=part != "v",
                hugging_face=f"self_attn.{part}_proj.bias",
                gguf=f"attn_{part}.bias",
            )

        def norm(part: str) -> RMSNorm:
            names = {"hugging_face": f"self_attn.{part}_norm.weight"}
            return RMSNorm(config, "head_dim", dtype, **names, gguf=f"attn_{part}_norm.weight")

        self.q, self.k, self.v = projection("q"), projection("k"), projection("v")
        self.o = declare(
            config,
            ("heads", "head_dim", "embed"),
            dtype,
            rngs,
            stddev=(config.num_heads * config.head_dim) ** -0.5,
            num_inputs=2,
            hugging_face="self_attn.o_proj.weight",
            gguf="attn_output.weight",
        )
        self.heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.has_bias, self.has_norm = config.qkv_bias, config.qk_norm
        if config.qkv_bias:
            self.q_bias, self.k_bias, self.v_bias = bias("q"), bias("k"), bias("v")
        if config.qk_norm:
            self.q_norm, self.k_norm = norm("q"), norm("k")

    def __call__(
        self, x: Float[Array, "T D"], rope: Rope, attend: Attend, linear: Linear
    ) -> Float[Array, "T D"]:
        parts = zip((self.q, self.k, self.v), self.heads, strict=True)
        q, k, v = (linear(x, w[...], count, self.head_dim) for w, count in parts)
        if self.has_bias:
            biases = (self.q_bias, self.k_bias, self.v_bias)
            q, k, v = (y + b[...][None] for y, b in zip((q, k, v), biases, strict=True))
        if self.has_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attend(rotate(q, rope), rotate(k, rope), v)
        return linear(out.reshape(x.shape[0], -1), self.o[...], x.shape[-1])


class Mlp(nnx.Module):
    """The gated feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        def matrix(name: str, source: str, target: str, num_inputs: int) -> nnx.Param:
            return declare(
                config,
                (source, target),
                dtype,
                rngs,
                stddev=num_inputs**-0.5,
                num_inputs=1,
                hugging_face=f"mlp.{name}_proj.weight",
                gguf=f"ffn_{name}.weight",
            )

        self.gate = matrix("gate", "embed", "mlp", config.hidden_size)
        self.up = matrix("up", "embed", "mlp", config.hidden_size)
        self.down = matrix("down", "mlp", "embed", config.mlp_size)
        self.size = config.mlp_size

    def __call__(self, x: Float[Array, "T D"], linear: Linear) -> Float[Array, "T D"]:
        gate, up = linear(x, self.gate[...], self.size), linear(x, self.up[...], self.size)
        return linear(jax.nn.silu(gate) * up, self.down[...], x.shape[-1])


class Block(nnx.Module):
    """One layer: attention, then the mlp, each normed before and added to the residual."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        names = {"hugging_face": "input_layernorm.weight", "gguf": "attn_norm.weight"}
        self.attention_norm = RMSNorm(config, "embed", dtype, **names)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        names = {"hugging_face": "post_attention_layernorm.weight", "gguf": "ffn_norm.weight"}
        self.mlp_norm = RMSNorm(config, "embed", dtype, **names)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "T D"], rope: Rope, attend: Attend, linear: Linear
    ) -> Float[Array, "T D"]:
        with jax.named_scope("attention"):
            x = x + self.attention(self.attention_norm(x), rope, attend, linear)
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x), linear)
