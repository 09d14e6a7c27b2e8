"""What one family of models has that others have not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Attributes:
        name: `model_type` in config.json.
        architecture: the class of transformers that computes it.
        gguf: `general.architecture` of its GGUF files; None where these use another family's.
        examples: hub ids of models that are of it.
        qkv_bias: q, k and v have biases, whatever config.json says.
        qk_norm: each head of q and k is normed.
        gguf_interleaves: GGUF files keep the rows of q and k in another order (see
            `models.checkpoint.gguf`).
        windows: which layers use `sliding_window` of config.json: none, all, or the layers that
            `layer_types` or `max_window_layers` name.
        biases: keys of config.json that add biases to the model.
        defaults: what transformers takes where config.json lacks a key. A key that is null there
            may be null in the file; another may not.
    """

    name: str
    architecture: str
    gguf: str | None
    examples: tuple[str, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    gguf_interleaves: bool = False
    windows: Literal["none", "all", "by layer"] = "none"
    biases: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)


COMMON: Mapping[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
"""Defaults that all families share. These and the families' own are those of the classes
`*Config` in transformers 5.24.
"""
