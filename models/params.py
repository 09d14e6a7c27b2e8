"""The weights of a model as a flat dict: their shapes, random ones, and as kernels take them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from models.config import ModelConfig
from models.ops import Kernels
from models.sharding import Rules
from models.transformer import Params, Transformer, path_of, weights_of
from models.weights import Weight


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
    tied = config.tie_embeddings and not kernels.unties
    return dataclasses.replace(config, num_kv_heads=kv_heads, tie_embeddings=tied)


def abstract_packed(
    config: ModelConfig,
    dtype: DTypeLike,
    kernels: Kernels,
    mesh: Mesh | AbstractMesh,
    rules: Rules,
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `pack` gives: shape, dtype and sharding of every weight, by path.

    Raises:
        ValueError: as `abstract_params`.
    """
    wide = pack_config(config, kernels, mesh, rules)
    shapes = abstract_params(wide, dtype, mesh, rules)
    if kernels.pack is None:
        return shapes
    for path, weight in weights_of(wide).items():
        if (sharding := _packed_sharding(weight, mesh, rules)) is not None:
            form = jax.eval_shape(functools.partial(_packed, kernels, weight), shapes[path])
            if len(form.shape) != 2:
                sharding = NamedSharding(mesh, PartitionSpec())
            shapes[path] = jax.ShapeDtypeStruct(form.shape, form.dtype, sharding=sharding)
    return shapes


def pack(
    config: ModelConfig, params: Params, kernels: Kernels, mesh: Mesh, rules: Rules
) -> dict[str, Array]:
    """The weights as `forward` takes them with these kernels on this mesh: with copies of kv heads
    where the mesh needs them (`Rules.kv_copies`), and in the form that the kernels pack weights
    into. A head that is tied to the embedding may become a weight of its own.
    """
    packed = dict(params) | _copied_heads(config, params, mesh, rules)
    if kernels.pack is None:
        return packed
    wide = pack_config(config, kernels, mesh, rules)
    if kernels.unties and config.tie_embeddings:
        packed["head"] = packed["embed"].T
    wanted = abstract_packed(config, params["embed"].dtype, kernels, mesh, rules)

    @functools.cache  # one program a form, and not one for each weight
    def program(num_inputs: int, sharding: NamedSharding):
        how = functools.partial(_packed, kernels)
        return jax.jit(how, static_argnums=0, out_shardings=sharding)

    for path, weight in weights_of(wide).items():
        if _packed_sharding(weight, mesh, rules) is not None:
            form = dataclasses.replace(weight, path="", hugging_face="", gguf="")
            packed[path] = program(weight.num_inputs, wanted[path].sharding)(form, packed[path])
    return packed


def _packed(kernels: Kernels, weight: Weight, w: Array) -> Array:
    assert kernels.pack is not None
    return kernels.pack(w.reshape(math.prod(w.shape[: weight.num_inputs]), -1))


def _packed_sharding(
    weight: Weight, mesh: Mesh | AbstractMesh, rules: Rules
) -> NamedSharding | None:
    """Of the weight as a matrix of inputs and outputs. None for what is not packed: no factor of a
    product, or split along a dimension that is not the first of those that become one.
    """
    spec = rules.spec(weight.axes)
    inputs, outputs = spec[: weight.num_inputs], spec[weight.num_inputs :]
    if not inputs or any(part is not None for part in (*inputs[1:], *outputs[1:])):
        return None
    return NamedSharding(mesh, PartitionSpec(inputs[0], outputs[0]))


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
