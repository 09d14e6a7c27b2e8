"""The model that all families share: its layers, and one forward step.

Dimension letters: T tokens, S sequences, D hidden size, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from models.config import ModelConfig
from models.kv_cache import Cache, Layer, StepInput
from models.layers import Block, RMSNorm
from models.ops import Kernels
from models.ops.linear import Linear
from models.rope import Rope, rope_angles, rope_frequencies
from models.weights import Weight, declare, described

Params = Mapping[str, Array]
"""Weights by path: "embed", "layers.0.attention.q", ..., "norm.scale", and "head" if not tied."""


HEAD_NAMES = {"hugging_face": "lm_head.weight", "gguf": "output.weight"}
"""Of the tensor that is not there, or not needed, where the head is tied to the embedding."""


class Transformer(nnx.Module):
    """The whole model. Build it under `nnx.eval_shape` unless random weights are wanted."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.config = config
        self.embed = declare(
            config,
            ("vocab", "embed"),
            dtype,
            rngs,
            stddev=0.02,
            hugging_face="model.embed_tokens.weight",
            gguf="token_embd.weight",
        )
        blocks = [Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        self.layers = nnx.List(blocks)
        names = {"hugging_face": "model.norm.weight", "gguf": "output_norm.weight"}
        self.norm = RMSNorm(config, "embed", dtype, **names)
        if not config.tie_embeddings:
            self.head = declare(
                config,
                ("embed", "vocab"),
                dtype,
                rngs,
                stddev=config.hidden_size**-0.5,
                num_inputs=1,
                hugging_face=HEAD_NAMES["hugging_face"],
                gguf=HEAD_NAMES["gguf"],
            )

    def hidden(
        self, cache: Cache, step: StepInput, kernels: Kernels
    ) -> tuple[Float[Array, "T D"], Cache]:
        """What the layers make of each token. They are unrolled: with a donated cache a scan over
        them took 105 ms where this takes 88 (SmolLM2-135M, batch 16, CPU).
        """
        with jax.named_scope("embed"):
            x = self.embed[...].at[step.tokens].get(mode="clip")
            config = self.config
            turns = rope_frequencies(config.rope_theta, config.head_dim, config.rope_scaling)
            rope = rope_angles(turns, jnp.asarray(step.positions))
        written: list[Layer] = []
        for block, layer in zip(self.layers, cache, strict=True):
            graph, state = nnx.split(block)
            x, layer = _run_block(graph, kernels, state, x, rope, layer, step)
            written.append(layer)
        return x, tuple(written)

    @jax.named_scope("head")
    def logits(self, x: Float[Array, "S D"], linear: Linear) -> Float[Array, "S V"]:
        """Of hidden states."""
        x = self.norm(x)
        if not self.config.tie_embeddings:
            return linear(x, self.head[...], self.config.vocab_size, dtype=jnp.float32)
        return jnp.einsum("sd,vd->sv", x, self.embed[...], preferred_element_type=jnp.float32)


def forward(
    config: ModelConfig, params: Params, cache: Cache, step: StepInput, kernels: Kernels
) -> tuple[Float[Array, "S V"], Cache]:
    """One step: f32 logits after each sequence's last token, and the cache with its tokens in.

    Computes in the dtype of the weights. Sequences without tokens give logits that mean nothing. To
    be jitted by the caller, with `config` and `kernels` static and the cache donated. config,
    params: as `pack_config` and `pack` gave them.
    """
    hidden, cache = hidden_states(config, params, cache, step, kernels)
    last = last_states(hidden, step)
    return logits(config, params, last, kernels, step.num_sequences), cache


def hidden_states(
    config: ModelConfig, params: Params, cache: Cache, step: StepInput, kernels: Kernels
) -> tuple[Float[Array, "T D"], Cache]:
    """The first part of `forward`: what the layers make of each token, and the cache."""
    return _model(config, params).hidden(cache, step, kernels)


def last_states(hidden: Float[Array, "T D"], step: StepInput) -> Float[Array, "S D"]:
    """Those of each sequence's last token in the step."""
    return hidden[jnp.maximum(jnp.asarray(step.starts)[1:] - 1, 0)]


def all_finite(hidden: Float[Array, "T D"], step: StepInput) -> Bool[Array, "S"]:
    """Whether the hidden states of all of a sequence's tokens are finite."""
    bad = ~jnp.isfinite(hidden).all(axis=1)
    before = jnp.pad(jnp.cumsum(bad, dtype=jnp.int32), (1, 0))[jnp.asarray(step.starts)]
    return before[1:] == before[:-1]


def logits(
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "S D"],
    kernels: Kernels,
    rows: Any = None,
) -> Float[Array, "S V"]:
    """The last part of `forward`: f32 logits after each token of these hidden states. rows: how
    many of them are wanted, the first ones; None: all.
    """
    return _model(config, params).logits(hidden, functools.partial(kernels.linear, rows=rows))


# Jitted, so that JAX traces and lowers one layer and not thirty: half a second a shape. XLA puts it
# in place of each call, so what is compiled is the same.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=False)
def _run_block(
    graph: nnx.GraphDef,
    kernels: Kernels,
    state: nnx.State,
    x: Float[Array, "T D"],
    rope: Rope,
    layer: Layer,
    step: StepInput,
) -> tuple[Float[Array, "T D"], Layer]:
    written = layer

    def attend(q, k, v):
        nonlocal written
        out, written = kernels.attention(*_contained(q, k, v), layer, step)
        return out

    linear = functools.partial(kernels.linear, rows=step.num_tokens)
    x = nnx.merge(graph, state)(x, rope, attend, linear)
    return x, written


def _contained(
    q: Float[Array, "T N H"], k: Float[Array, "T K H"], v: Float[Array, "T K H"]
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
    """Keeps keys and values that are not finite out of the pool: zeros are written in their place.

    Kernels read whole pages and give weight 0 to what a token does not see, and 0 * NaN is NaN:
    such a key or value would spread to other sequences. The query of its token becomes NaN, so that
    the token's own output, and with it its hidden state, shows it (`all_finite`).
    """
    finite = (jnp.isfinite(k) & jnp.isfinite(v)).all(axis=2, keepdims=True)
    seen = jnp.repeat(finite, q.shape[1] // k.shape[1], axis=1)
    return jnp.where(seen, q, jnp.nan), jnp.where(finite, k, 0), jnp.where(finite, v, 0)


def _model(config: ModelConfig, params: Params) -> Transformer:
    graph, declared = structure(config, params["embed"].dtype)
    state = [(path, param.replace(params[path_of(path)])) for path, param in declared]
    return nnx.merge(graph, nnx.from_flat_state(state))


@functools.cache
def structure(config: ModelConfig, dtype: jnp.dtype):
    """The model's structure and its abstract weights as (path, Param)."""
    model = nnx.eval_shape(lambda: Transformer(config, dtype=dtype, rngs=None))
    graph, state = nnx.split(model)
    return graph, tuple(nnx.to_flat_state(state))


def weights_of(config: ModelConfig) -> dict[str, Weight]:
    """The declaration of every weight, by path. All layers declare the same weights."""
    _, state = structure(dataclasses.replace(config, num_layers=1), jnp.dtype(jnp.float32))
    weights = {}
    for (name, *rest), param in state:
        of_layer = name == "layers"
        for layer in range(config.num_layers if of_layer else 1):
            path = path_of((name, layer, *rest[1:]) if of_layer else (name, *rest))
            weights[path] = described(path, param)
    return weights


def path_of(path: tuple[Any, ...]) -> str:
    """As `Params` has it."""
    return ".".join(map(str, path))
