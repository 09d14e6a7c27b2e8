"""GGUF files, dequantized as they are read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike
from numpy.typing import NDArray

from models.checkpoint import source
from models.checkpoint.gguf_config import from_gguf
from models.checkpoint.gguf_file import Tensor
from models.checkpoint.gguf_parts import read_parts
from models.config import ModelConfig
from models.families import FAMILIES
from models.params import abstract_params
from models.sharding import Rules
from models.transformer import HEAD_NAMES, weights_of
from models.weights import Weight

_ROPE = "rope_freqs.weight"  # llama3 rope scaling, as divisors; the config holds it already


@dataclass(frozen=True)
class GgufCheckpoint:
    """A model of architecture llama, qwen2 or qwen3, in one .gguf file or several.

    path: the file, or the first part. fields: its metadata, the tokenizer among it, as plain
    values by key.
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
            expected = source.source_shape(weight)
            source.check_shape(str(tensor.file), tensor.name, tensor.shape, expected)
            values = tensor.values()
            if interleaves and weight.rotated:
                values = _from_interleaved(values, self.config.head_dim)
            return lambda index: values[index]

        return source.load(abstract, weights, read)


def open_gguf(path: Path) -> GgufCheckpoint:
    """Reads all but the weights; ValueError if a file is damaged or not supported.

    path: the only file of a model, or the first of its parts.
    """
    fields, tensors = read_parts(path)
    divisors = tensors[_ROPE].values() if _ROPE in tensors else None
    try:
        config = from_gguf(fields, tied=HEAD_NAMES["gguf"] not in tensors, rope_divisors=divisors)
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from None
    return GgufCheckpoint(path, config, tensors, fields)


def _from_interleaved(values: NDArray, head_dim: int) -> NDArray:
    """Undoes the order in which 'llama' files keep the rows of q and k.

    They rotate the pairs (2i, 2i + 1) of a head; Hugging Face and we rotate (i, i + head_dim / 2).
    """
    pairs = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
