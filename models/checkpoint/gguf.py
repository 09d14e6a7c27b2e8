"""GGUF files, dequantized as they are read."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike
from numpy.typing import NDArray

from models import gguf_file
from models.checkpoint import layout
from models.config import ModelConfig, from_gguf
from models.gguf_file import Tensor
from models.llama import abstract_params
from models.sharding import Rules

_ROPE = "rope_freqs.weight"  # llama3 rope scaling, as divisors; the config holds it already

_NAMES = (
    (r"token_embd\.weight", r"embed"),
    (r"output_norm\.weight", r"norm.scale"),
    (r"output\.weight", r"head"),
    (r"blk\.(\d+)\.attn_norm\.weight", r"layers.\1.attention_norm.scale"),
    (r"blk\.(\d+)\.ffn_norm\.weight", r"layers.\1.mlp_norm.scale"),
    (r"blk\.(\d+)\.attn_output\.weight", r"layers.\1.attention.o"),
    (r"blk\.(\d+)\.attn_([qkv])\.weight", r"layers.\1.attention.\2"),
    (r"blk\.(\d+)\.attn_([qkv])\.bias", r"layers.\1.attention.\2_bias"),
    (r"blk\.(\d+)\.attn_([qk])_norm\.weight", r"layers.\1.attention.\2_norm.scale"),
    (r"blk\.(\d+)\.ffn_(gate|up|down)\.weight", r"layers.\1.mlp.\2"),
)


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
        tensors = {_path_of(name): tensor for name, tensor in self.tensors.items()}
        tensors.pop(_ROPE, None)
        layout.check_keys(str(self.path), tensors, abstract)

        def read(path: str) -> Callable[[layout.Index], NDArray]:
            tensor = tensors[path]
            expected = layout.source_shape(path, abstract[path].shape)
            layout.check_shape(str(self.path), tensor.name, tensor.shape, expected)
            values = _values(self.path, tensor)
            part = path.rsplit(".", 1)[-1]
            if self.config.name == "llama" and part in ("q", "k", "q_bias", "k_bias"):
                values = _from_interleaved(values, self.config.head_dim)
            return lambda index: values[index]

        return layout.load(abstract, read)


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
        config = from_gguf(fields, tied="output.weight" not in tensors, rope_divisors=divisors)
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


def _path_of(name: str) -> str:
    for pattern, path in _NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(path)
    return name
