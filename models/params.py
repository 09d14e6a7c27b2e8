"""The weights of a model as a flat dict: their shapes, random ones, and as kernels take them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from models.config import ModelConfig
from models.ops import Kernels
from models.sharding import Rules
from models.transformer import Params, Transformer, path_of, weights_of


def abstract_params(
    config: ModelConfig, dtype: DTypeLike, mesh: Mesh | AbstractMesh, rules: Rules
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every weight, by path. Allocates nothing.

    Those of kv heads that do not divide by the mesh are whole on every device, until `pack`.

    Raises:
        ValueError: a dimension cannot be split as the rules ask.
    """
    rules = rules.without_copies(mesh, config.num_kv_heads)
    shapes = {}
    for path, weight in weights_of(config).items():
        try:
            sharding = rules.sharding(mesh, weight.axes, weight.shape)
        except ValueError as error:
            raise ValueError(f"weight {path!r}: {error}") from None
        shapes[path] = jax.ShapeDtypeStruct(weight.shape, jnp.dtype(dtype), sharding=sharding)
    return shapes


def init_params(
    config: ModelConfig, key: Array, dtype: DTypeLike, mesh: Mesh, rules: Rules
) -> dict[str, Array]:
    """Random weights, each made on the devices that hold it. For tests and benchmarks."""

    def init(key):
        model = Transformer(config, dtype=dtype, rngs=nnx.Rngs(key))
        return {path_of(path): param[...] for path, param in nnx.to_flat_state(nnx.state(model))}

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

    num_inputs = {path: weight.num_inputs for path, weight in weights_of(config).items()}
    if config.tie_embeddings:
        packed["head"], num_inputs["head"] = packed["embed"].T, 1
    for path, inputs in num_inputs.items():
        if inputs:
            packed[path] = one(packed[path], inputs)
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
