"""Llama and its kin (Mistral, Qwen2, Qwen3): weights as a flat dict, and one forward step.

Dimension letters: R rows, Q queries a row, D hidden size, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.kv_cache import Cache, Layer, StepInput
from models.layers import Block, RMSNorm, Rope, rope_angles, weight
from models.ops import Kernels
from models.ops.linear import Linear
from models.sharding import Rules

Params = Mapping[str, Array]
"""Weights by path: "embed", "layers.0.attention.q", ..., "norm.scale", and "head" if not tied."""

# By how many axes of theirs come in, weights that are multiplied with.
_INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1, "head": 1}


class Llama(nnx.Module):
    """The whole model. Build it under `nnx.eval_shape` unless random weights are wanted."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        vocab, hidden = config.vocab_size, config.hidden_size
        self.config = config
        self.embed = weight(rngs, ("vocab", "embed"), (vocab, hidden), dtype, 0.02)
        blocks = [Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        self.layers = nnx.List(blocks)
        self.norm = RMSNorm(hidden, "embed", eps=config.norm_eps, dtype=dtype)
        if not config.tie_embeddings:
            self.head = weight(rngs, ("embed", "vocab"), (hidden, vocab), dtype, hidden**-0.5)

    def hidden(
        self, cache: Cache, step: StepInput, kernels: Kernels
    ) -> tuple[Float[Array, "R Q D"], Cache]:
        """What the layers make of each token. They are unrolled: with a donated cache a scan over
        them took 105 ms where this takes 88 (SmolLM2-135M, batch 16, CPU).
        """
        with jax.named_scope("embed"):
            x = self.embed[...].at[step.tokens].get(mode="clip")
            queries = jnp.arange(step.tokens.shape[1], dtype=jnp.int32)
            positions = jnp.asarray(step.start)[:, None] + queries[None, :]
            rope = rope_angles(self.config, positions)
        written: list[Layer] = []
        for block, layer in zip(self.layers, cache, strict=True):
            graph, state = nnx.split(block)
            x, layer = _run_block(graph, kernels, state, x, rope, layer, step)
            written.append(layer)
        return x, tuple(written)

    @jax.named_scope("head")
    def logits(self, x: Float[Array, "R D"], linear: Linear) -> Float[Array, "R V"]:
        """Of hidden states."""
        x = self.norm(x)
        if not self.config.tie_embeddings:
            return linear(x, self.head[...], self.config.vocab_size, dtype=jnp.float32)
        return jnp.einsum("rd,vd->rv", x, self.embed[...], preferred_element_type=jnp.float32)


def abstract_params(
    config: ModelConfig, dtype: DTypeLike, mesh: Mesh | AbstractMesh, rules: Rules
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every weight, by path. Allocates nothing.

    Those of kv heads that do not divide by the mesh are whole on every device, until `pack`.

    Raises:
        ValueError: a dimension cannot be split as the rules ask.
    """
    _, state = _declare(config, jnp.dtype(dtype))
    rules = rules.without_copies(mesh, config.num_kv_heads)
    shapes = {}
    for path, param in state:
        try:
            sharding = rules.sharding(mesh, param.axes, param.shape)
        except ValueError as error:
            raise ValueError(f"weight {_name(path)!r}: {error}") from None
        shapes[_name(path)] = jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=sharding)
    return shapes


def init_params(
    config: ModelConfig, key: Array, dtype: DTypeLike, mesh: Mesh, rules: Rules
) -> dict[str, Array]:
    """Random weights, each made on the devices that hold it. For tests and benchmarks."""

    def init(key):
        model = Llama(config, dtype=dtype, rngs=nnx.Rngs(key))
        return {_name(path): param[...] for path, param in nnx.to_flat_state(nnx.state(model))}

    abstract = abstract_params(config, dtype, mesh, rules)
    shardings = {path: leaf.sharding for path, leaf in abstract.items()}
    return jax.jit(init, out_shardings=shardings)(key)


def pack_config(
    config: ModelConfig, kernels: Kernels, mesh: Mesh | AbstractMesh, rules: Rules
) -> ModelConfig:
    """The config of weights that `pack` gave."""
    kv_heads = config.num_kv_heads * rules.kv_copies(mesh, config.num_kv_heads)
    tied = config.tie_embeddings and kernels.pack is None
    return dataclasses.replace(config, num_kv_heads=kv_heads, tie_embeddings=tied)


def pack(
    config: ModelConfig, params: Params, kernels: Kernels, mesh: Mesh, rules: Rules
) -> dict[str, Array]:
    """The weights as `forward` takes them with these kernels on this mesh: the same, unless there
    are to be copies of kv heads (`Rules.kv_copies`), or the kernels pack weights. A head that is
    tied to the embedding is then a weight of its own.
    """
    packed = dict(params) | _copied_heads(config, params, mesh, rules)
    if kernels.pack is None:
        return packed
    as_packed = kernels.pack

    @functools.partial(jax.jit, static_argnums=1)  # one program a shape, and not an operation
    def one(w: Array, inputs: int) -> Array:
        return as_packed(w.reshape(math.prod(w.shape[:inputs]), -1))

    if config.tie_embeddings:
        packed["head"] = packed["embed"].T
    for path, w in packed.items():
        if inputs := _INPUTS.get(path.rpartition(".")[2]):
            packed[path] = one(w, inputs)
    return packed


def _copied_heads(
    config: ModelConfig, params: Params, mesh: Mesh, rules: Rules
) -> dict[str, Array]:
    """The weights of kv heads, each head as often as the mesh needs it and where it does."""
    copies = rules.kv_copies(mesh, config.num_kv_heads)
    if copies == 1:
        return {}
    wider = dataclasses.replace(config, num_kv_heads=config.num_kv_heads * copies)
    wanted = abstract_params(wider, params["embed"].dtype, mesh, rules)
    shardings = {
        path: leaf.sharding for path, leaf in wanted.items() if leaf.shape != params[path].shape
    }

    def copy(once: Params) -> Params:  # heads are the last dimension but one
        return {path: jnp.repeat(w, copies, axis=-2) for path, w in once.items()}

    return jax.jit(copy, out_shardings=shardings)({path: params[path] for path in shardings})


def forward(
    config: ModelConfig, params: Params, cache: Cache, step: StepInput, kernels: Kernels
) -> tuple[Float[Array, "R V"], Cache]:
    """One step: f32 logits after each row's last real token, and the cache with its tokens in.

    Computes in the dtype of the weights. Rows with count 0 give logits that mean nothing. To be
    jitted by the caller, with `config` and `kernels` static and the cache donated. config, params:
    as `pack_config` and `pack` gave them.
    """
    hidden, cache = hidden_states(config, params, cache, step, kernels)
    return logits(config, params, last_states(hidden, step), kernels), cache


def hidden_states(
    config: ModelConfig, params: Params, cache: Cache, step: StepInput, kernels: Kernels
) -> tuple[Float[Array, "R Q D"], Cache]:
    """The first part of `forward`: what the layers make of each token, and the cache."""
    return _model(config, params).hidden(cache, step, kernels)


def last_states(hidden: Float[Array, "R Q D"], step: StepInput) -> Float[Array, "R D"]:
    """Those of each row's last real token."""
    last = jnp.maximum(jnp.asarray(step.count) - 1, 0)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def logits(
    config: ModelConfig, params: Params, hidden: Float[Array, "R D"], kernels: Kernels
) -> Float[Array, "R V"]:
    """The last part of `forward`: f32 logits after each token of these hidden states."""
    return _model(config, params).logits(hidden, kernels.linear)


# Jitted, so that JAX traces and lowers one layer and not thirty: half a second a shape. XLA puts it
# in place of each call, so what is compiled is the same.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=False)
def _run_block(
    graph: nnx.GraphDef,
    kernels: Kernels,
    state: nnx.State,
    x: Float[Array, "R Q D"],
    rope: Rope,
    layer: Layer,
    step: StepInput,
) -> tuple[Float[Array, "R Q D"], Layer]:
    written = layer

    def attend(q, k, v):
        nonlocal written
        out, written = kernels.attention(q, k, v, layer, step)
        return out

    x = nnx.merge(graph, state)(x, rope, attend, kernels.linear)
    return x, written


def _model(config: ModelConfig, params: Params) -> Llama:
    graph, declared = _declare(config, params["embed"].dtype)
    state = [(path, param.replace(params[_name(path)])) for path, param in declared]
    return nnx.merge(graph, nnx.from_flat_state(state))


@functools.cache
def _declare(config: ModelConfig, dtype: jnp.dtype):
    """The model's structure and its abstract weights as (path, Param)."""
    model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=None))
    graph, state = nnx.split(model)
    return graph, tuple(nnx.to_flat_state(state))


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
