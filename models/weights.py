"""The declaration of a weight: all that the model, the checkpoint readers and the kernels need to
know of it, said once, where a layer makes it (`models.layers`, `models.transformer`).
"""

import re
from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.sharding import Axes

_LAYER = re.compile(r"layers\.(\d+)\.")
# What the names of a layer's tensors begin with.
_HUGGING_FACE, _GGUF = "model.layers.{}.", "blk.{}."


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight of a model.

    Attributes:
        path: by which the model knows it, such as "layers.0.attention.q".
        shape: as the model has it, inputs first: for x @ W.
        axes: a logical name for each dimension (`models.sharding.Rules`).
        num_inputs: leading dimensions that it is multiplied with; 0 for what is no matrix product.
        rotated: it makes heads that rope rotates.
        hugging_face, gguf: the names of its tensor in those checkpoints.
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes
    num_inputs: int
    rotated: bool
    hugging_face: str
    gguf: str


def declare(
    config: ModelConfig,
    axes: Axes,
    dtype: DTypeLike,
    rngs: nnx.Rngs | None,
    *,
    stddev: float | None,
    hugging_face: str,
    gguf: str,
    num_inputs: int = 0,
    rotated: bool = False,
) -> nnx.Param:
    """Declares a weight, whose shape follows from its axes.

    stddev: of its initial normal distribution; None: it begins as ones. hugging_face, gguf: names
    of its tensor, within a layer without the layer's own prefix. rngs: None for zeros, where only
    the declaration is wanted: to trace the rest took SmolLM2 a second. Others: see `Weight`.
    """
    shape = tuple(_sizes(config)[axis] for axis in axes if axis is not None)
    if stddev is None:
        value = jnp.ones(shape, dtype)
    elif rngs is None:
        value = jnp.zeros(shape, dtype)
    else:
        value = nnx.initializers.normal(stddev)(rngs.params(), shape, dtype)
    told = {"num_inputs": num_inputs, "rotated": rotated}
    return nnx.Param(value, axes=axes, hugging_face=hugging_face, gguf=gguf, **told)


def _sizes(config: ModelConfig) -> dict[str, int]:
    """By logical axis."""
    return {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.mlp_size,
    }


def described(path: str, param: nnx.Param) -> Weight:
    """What a declaration says of the weight at a path."""
    layer = _LAYER.match(path)
    prefixes = [name.format(layer[1]) if layer else "" for name in (_HUGGING_FACE, _GGUF)]
    return Weight(
        path,
        param.shape,
        param.axes,
        param.num_inputs,
        param.rotated,
        prefixes[0] + param.hugging_face,
        prefixes[1] + param.gguf,
    )
