"""Hugging Face checkpoints: config.json beside *.safetensors, read and written."""

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.checkpoint import source
from models.checkpoint.huggingface_config import from_hugging_face, to_hugging_face, token_ids
from models.config import ModelConfig
from models.params import abstract_params
from models.sharding import Rules
from models.transformer import HEAD_NAMES, weights_of
from models.weights import Weight

INDEX = "model.safetensors.index.json"

# No weight, but a buffer that old versions saved.
_BUFFER = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


@dataclass(frozen=True)
class HuggingFaceCheckpoint:
    """A directory as `save_pretrained` writes it, in one file or several."""

    path: Path
    config: ModelConfig

    def load(self, mesh: Mesh, rules: Rules, dtype: DTypeLike) -> dict[str, Array]:
        """See `Checkpoint.load`."""
        abstract = abstract_params(self.config, dtype, mesh, rules)
        weights = weights_of(self.config)
        with contextlib.ExitStack() as stack:
            tensors = self._tensors(stack, weights)
            source.check_keys(str(self.path), tensors, abstract)

            def read(weight: Weight) -> Callable[[source.Index], NDArray]:
                tensor, expected = tensors[weight.path], source.source_shape(weight)
                source.check_shape(str(self.path), weight.path, tensor.get_shape(), expected)
                return lambda index: tensor[index]

            return source.load(abstract, weights, read)

    def _tensors(
        self, stack: contextlib.ExitStack, weights: Mapping[str, Weight]
    ) -> dict[str, Any]:
        """Our path -> the safetensors slice to read it from. Unknown names stay as they are."""
        paths = {weight.hugging_face: path for path, weight in weights.items()}
        tensors = {}
        for file in self._files():
            try:
                opened = stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"checkpoint {file}: {error}") from error
            for name in opened.keys():  # noqa: SIM118 (a safe_open is no dict)
                tied = name == HEAD_NAMES["hugging_face"] and self.config.tie_embeddings
                if tied or re.fullmatch(_BUFFER, name):
                    continue
                tensors[paths.get(name, name)] = opened.get_slice(name)
        return tensors

    def _files(self) -> list[Path]:
        if not (self.path / INDEX).exists():
            return sorted(self.path.glob("*.safetensors"))
        weight_map = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"checkpoint {self.path / INDEX}: weight_map is missing")
        return [self.path / name for name in sorted(set(weight_map.values()))]


def open_hugging_face(path: Path) -> HuggingFaceCheckpoint:
    """Reads the config of a directory; ValueError if that cannot be read or is not supported."""
    raw = read_json(path / "config.json")
    generation = path / "generation_config.json"
    if generation.exists():  # chat models end their turns with ids that only this file lists
        ends = token_ids(read_json(generation), "eos_token_id", f"checkpoint {generation}")
        if ends:
            raw["eos_token_id"] = list(ends)
    return HuggingFaceCheckpoint(path, read_config(path, raw))


def read_config(path: Path, raw: dict[str, Any]) -> ModelConfig:
    """As `from_hugging_face`, with the checkpoint's name in the error."""
    try:
        return from_hugging_face(raw)
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError, with the file's name, if there is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"checkpoint {path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"checkpoint {path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def save_hugging_face(
    directory: str | Path, config: ModelConfig, params: Mapping[str, Array]
) -> None:
    """Writes model.safetensors, in the dtype that the weights have, and config.json.

    Raises:
        ValueError: the directory holds weights already.
    """
    directory = Path(directory)
    if any(directory.glob("*.safetensors")):
        raise ValueError(f"checkpoint {directory}: holds weights already")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        weight.hugging_face: source.to_source(weight, np.asarray(params[path]))
        for path, weight in weights_of(config).items()
    }
    # Loaders of PyTorch's want to be told that it is theirs.
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    described = to_hugging_face(config) | {"dtype": params["embed"].dtype.name}
    text = json.dumps(described, indent=2)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
