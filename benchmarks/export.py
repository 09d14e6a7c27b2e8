"""Writes a GGUF model as a Hugging Face directory in float32, for peers that read nothing else."""

import json
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from kairos_jax.tokenizer import load_tokenizer
from models.checkpoint import open_checkpoint
from models.checkpoint.gguf import GgufCheckpoint
from models.config import ModelConfig, to_hugging_face

_NAMES = (
    (r"token_embd\.weight", r"model.embed_tokens.weight"),
    (r"output_norm\.weight", r"model.norm.weight"),
    (r"output\.weight", r"lm_head.weight"),
    (r"blk\.(\d+)\.attn_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"blk\.(\d+)\.ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"blk\.(\d+)\.attn_output\.weight", r"model.layers.\1.self_attn.o_proj.weight"),
    (r"blk\.(\d+)\.attn_([qkv])\.(weight|bias)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"blk\.(\d+)\.attn_([qk])_norm\.weight", r"model.layers.\1.self_attn.\2_norm.weight"),
    (r"blk\.(\d+)\.ffn_(gate|up|down)\.weight", r"model.layers.\1.mlp.\2_proj.weight"),
)


def hugging_face(model: Path, directory: Path) -> Path:
    """The model as a Hugging Face directory: itself if it is one, else written to `directory`.

    The weights are those of the file, dequantized, so that whoever reads them computes the same.

    Raises:
        ValueError: the file cannot be read, or has a tensor that is not known.
    """
    checkpoint = open_checkpoint(model)
    if not isinstance(checkpoint, GgufCheckpoint):
        return model
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        _name(name): _values(checkpoint.config, name, tensor.values())
        for name, tensor in checkpoint.tensors.items()
        if name != "rope_freqs.weight"
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    load_tokenizer(checkpoint.path, checkpoint.fields).save(directory)
    described = to_hugging_face(checkpoint.config) | {"dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(described, indent=1) + "\n")
    return directory


def _values(config: ModelConfig, name: str, values: NDArray) -> NDArray[np.float32]:
    """[out, in], as PyTorch has it. 'llama' files keep q and k for a rotation of the neighbours
    (2i, 2i + 1) of a head, Hugging Face rotates (i, i + head_dim / 2).
    """
    values = np.ascontiguousarray(values, np.float32)
    if config.name == "llama" and re.search(r"attn_[qk]\.", name):
        pairs = values.reshape(-1, config.head_dim // 2, 2, *values.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
    return values


def _name(name: str) -> str:
    for pattern, ours in _NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    raise ValueError(f"tensor {name!r} has no known Hugging Face name")
