"""A model's config from the metadata of a GGUF file."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from models.checkpoint.huggingface_config import required
from models.config import ModelConfig
from models.families import FAMILIES
from models.rope import RopeScaling, rope_frequencies


def from_gguf(
    fields: Mapping[str, Any], *, tied: bool, rope_divisors: np.ndarray | None = None
) -> ModelConfig:
    """Reads the metadata of a GGUF file: key -> plain value.

    tied: the file holds no `output.weight`; GGUF has no field that says so. rope_divisors: its
    `rope_freqs.weight` [head_dim / 2], if any. GGUF's 'llama' stands for Mistral as well, which
    computes the same.
    """
    architecture = fields.get("general.architecture")
    families = {each.gguf: each for each in FAMILIES.values() if each.gguf}
    family = families.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        known = ", ".join(map(repr, families))
        raise ValueError(f"gguf: general.architecture must be one of {known}, got {architecture!r}")
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in fields.items()
        if key.startswith(f"{architecture}.")
    }
    max_context = required(own, "context_length", "gguf")
    hidden = required(own, "embedding_length", "gguf")
    num_heads = required(own, "attention.head_count", "gguf")
    head_dim = own.get("attention.key_length", hidden // num_heads)
    allowed = {
        "expert_count": (0,),
        "attention.value_length": (head_dim,),
        "rope.dimension_count": (head_dim,),
        "rope.scaling.type": ("none", "linear"),
    }
    for key, values in allowed.items():
        if own.get(key, values[0]) not in values:
            raise ValueError(f"gguf: {architecture}.{key} must be in {values}, got {own[key]!r}")
    if (window := own.get("attention.sliding_window", max_context)) < max_context:
        raise ValueError(
            f"gguf: {architecture}.attention.sliding_window {window} is below context_length "
            f"{max_context}, and sliding windows are not supported"
        )
    theta = float(own.get("rope.freq_base", 10000.0))
    eos = [fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    return ModelConfig(
        name=family.name,
        vocab_size=own.get("vocab_size") or len(fields.get("tokenizer.ggml.tokens", ())),
        hidden_size=hidden,
        num_layers=required(own, "block_count", "gguf"),
        num_heads=num_heads,
        num_kv_heads=own.get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        mlp_size=required(own, "feed_forward_length", "gguf"),
        rope_theta=theta,
        rope_scaling=_rope_from_gguf(own, theta, head_dim, rope_divisors),
        norm_eps=_shortest(required(own, "attention.layer_norm_rms_epsilon", "gguf")),
        tie_embeddings=tied,
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        max_context=max_context,
        eos_token_ids=tuple(dict.fromkeys(id for id in eos if id is not None)),
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
    )


def _rope_from_gguf(
    own: Mapping[str, Any], theta: float, head_dim: int, divisors: np.ndarray | None
) -> RopeScaling | None:
    if divisors is None:
        linear = own.get("rope.scaling.type") == "linear"
        return RopeScaling("linear", _shortest(own["rope.scaling.factor"])) if linear else None
    # GGUF keeps the outcome of llama3 scaling and not its parameters. All Llama 3 models share
    # those but for the factor, so take them and see that they give the same.
    scaling = RopeScaling("llama3", _shortest(divisors.max()))
    plain = rope_frequencies(theta, head_dim, None)
    if not np.allclose(plain / rope_frequencies(theta, head_dim, scaling), divisors, rtol=1e-4):
        raise ValueError("gguf: rope_freqs.weight is not that of a Llama 3 model")
    return scaling


def _shortest(value: Any) -> float:
    """GGUF stores f32: 1e-5 instead of 9.999999747378752e-06."""
    return float(str(np.float32(value)))
