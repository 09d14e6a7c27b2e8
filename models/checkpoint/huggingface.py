"""Hugging Face checkpoints: config.json beside *.safetensors."""

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from models.checkpoint import layout
from models.config import ModelConfig, from_hugging_face
from models.llama import abstract_params
from models.sharding import Rules

INDEX = "model.safetensors.index.json"

# Hugging Face name -> our path. None: no weight, but a buffer that old versions saved.
_NAMES: tuple[tuple[str, str | None], ...] = (
    (r"model\.embed_tokens\.weight", r"embed"),
    (r"model\.norm\.weight", r"norm.scale"),
    (r"lm_head\.weight", r"head"),
    (r"model\.layers\.(\d+)\.input_layernorm\.weight", r"layers.\1.attention_norm.scale"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", r"layers.\1.mlp_norm.scale"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkvo])_proj\.weight", r"layers.\1.attention.\2"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.bias", r"layers.\1.attention.\2_bias"),
    (r"model\.layers\.(\d+)\.self_attn\.([qk])_norm\.weight", r"layers.\1.attention.\2_norm.scale"),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight", r"layers.\1.mlp.\2"),
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", None),
)


@dataclass(frozen=True)
class HuggingFaceCheckpoint:
    """A directory as `save_pretrained` writes it, in one file or several."""

    path: Path
    config: ModelConfig

    def load(self, mesh: Mesh, rules: Rules, dtype: DTypeLike) -> dict[str, Array]:
        """See `Checkpoint.load`."""
        abstract = abstract_params(self.config, dtype, mesh, rules)
        with contextlib.ExitStack() as stack:
            tensors = self._tensors(stack)
            layout.check_keys(str(self.path), tensors, abstract)

            def read(path: str) -> Callable[[layout.Index], NDArray]:
                tensor = tensors[path]
                expected = layout.source_shape(path, abstract[path].shape)
                layout.check_shape(str(self.path), path, tensor.get_shape(), expected)
                return lambda index: tensor[index]

            return layout.load(abstract, read)

    def _tensors(self, stack: contextlib.ExitStack) -> dict[str, Any]:
        """Our path -> the safetensors slice to read it from. Unknown names stay as they are."""
        tensors = {}
        for file in self._files():
            try:
                opened = stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"checkpoint {file}: {error}") from error
            for name in opened.keys():  # noqa: SIM118 (a safe_open is no dict)
                path = _path_of(name)
                if path is None or (path == "head" and self.config.tie_embeddings):
                    continue
                tensors[path] = opened.get_slice(name)
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
        raw["eos_token_id"] = read_json(generation).get("eos_token_id", raw.get("eos_token_id"))
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


def _path_of(name: str) -> str | None:
    for pattern, path in _NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return path and match.expand(path)
    return name
