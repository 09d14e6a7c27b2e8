"""GGUF files, dequantized as they are read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike
from numpy.typing import NDArray

from models.checkpoint import gguf_file, source
from models.checkpoint.gguf_config import from_gguf
from models.checkpoint.gguf_file import Tensor
from models.config import ModelConfig
from models.families import FAMILIES
from models.params import abstract_params
from models.sharding import Rules
from models.transformer import HEAD_NAMES, weights_of
from models.weights import Weight

_ROPE = "rope_freqs.weight"  # llama3 rope scaling, as divisors; the config holds it already


@dataclass(frozen=True)
class GgufCheckpoint:
    """One .gguf file of architecture llama, qwen2 or qwen3.

    fields: its metadata, the tokenizer among it, as plain values by key.
    """

    path: Path
    config: ModelConfig
    tensors: dict[str, Tensor] = field(repr=False)
    fields: dict[str, Any] = field(repr=False)

    def load(self, mesh: Mesh, rules: Rules, dtype: DTypeLike) -> dict[str, Array]:
        """See `Checkpoint.load`."""
        abstract = abstract_params(self.config, dtype, mesh, rules)
        weights, where = weights_of(self.config), str(self.path)
        paths = {weight.gguf: path for path, weight in weights.items()}
        tensors = {paths.get(name, name): tensor for name, tensor in self.tensors.items()}
        tensors.pop(_ROPE, None)
        source.check_keys(where, tensors, abstract)
        interleaves = FAMILIES[self.config.name].gguf_interleaves

        def read(weight: Weight) -> Callable[[source.Index], NDArray]:
            tensor = tensors[weight.path]
            source.check_shape(where, tensor.name, tensor.shape, source.source_shape(weight))
            values = _values(self.path, tensor)
            if interleaves and weight.rotated:
                values = _from_interleaved(values, self.config.head_dim)
            return lambda index: values[index]

        return source.load(abstract, weights, read)


def open_gguf(path: Path) -> GgufCheckpoint:
    """Reads all but the weights; ValueError if the file is damaged or not supported."""
    try:
        fields, tensors = gguf_file.read(path)
    except ValueError as error:
        size = path.stat().st_size
        raise ValueError(
            f"checkpoint {path}: not a GGUF file, or cut short at {size} bytes ({error})"
        ) from error
    divisors = _values(path, tensors[_ROPE]) if _ROPE in tensors else None
    try:
        config = from_gguf(fields, tied=HEAD_NAMES["gguf"] not in tensors, rope_divisors=divisors)
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from None
    return GgufCheckpoint(path, config, tensors, fields)


def _values(path: Path, tensor: Tensor) -> NDArray[np.float32]:
    try:
        return tensor.values()
    except NotImplementedError:
        raise ValueError(
            f"checkpoint {path}: tensor {tensor.name!r} has quantization "
            f"{tensor.kind.name}, which cannot be read"
        ) from None


def _from_interleaved(values: NDArray, head_dim: int) -> NDArray:
    """Undoes the order in which 'llama' files keep the rows of q and k.

    They rotate the pairs (2i, 2i + 1) of a head; Hugging Face and we rotate (i, i + head_dim / 2).
    """
    pairs = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
