"""What one family of models has that others have not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Attributes:
        name: `model_type` in config.json.
        architecture: the class of transformers that computes it.
        gguf: `general.architecture` of its GGUF files; None where these go by another family's.
        qkv_bias: q, k and v have biases, whatever config.json says.
        qk_norm: each head of q and k is normed.
        gguf_interleaves: GGUF files keep the rows of q and k in another order (see
            `models.checkpoint.gguf`).
        knows_windows: config.json may have a sliding window.
        defaults: what transformers takes where config.json lacks a key.
    """

    name: str
    architecture: str
    gguf: str | None
    qkv_bias: bool = False
    qk_norm: bool = False
    gguf_interleaves: bool = False
    knows_windows: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
