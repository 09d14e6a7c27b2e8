"""A model's config from the metadata of a GGUF file."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from models.checkpoint.fields import Fields
from models.checkpoint.gguf_tokens import end_tokens, named_token
from models.config import ModelConfig
from models.families import FAMILIES, Family
from models.rope import RopeScaling, rope_frequencies

# Keys of rope that change nothing here: llama.cpp uses the context only for yarn and longrope.
_NO_EFFECT = ("rope.scaling.finetuned", "rope.scaling.original_context_length")
_ROPE_KEYS = (
    *("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scale_linear", "rope.scaling.attn_factor", *_NO_EFFECT),
)


def from_gguf(
    metadata: Mapping[str, Any], *, tied: bool, rope_divisors: np.ndarray | None = None
) -> ModelConfig:
    """Reads the metadata of a GGUF file: key -> plain value.

    tied: the file holds no `output.weight`; GGUF has no field that says so. rope_divisors: its
    `rope_freqs.weight` [head_dim / 2], if any. GGUF's 'llama' stands for Mistral as well, which
    computes the same. ValueError for a field that is missing, wrong or not supported.
    """
    family, general = _family(metadata), Fields("gguf", metadata)
    fields = _fields_of(metadata, f"{family.gguf}.")
    hidden, num_heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.optional_integer("attention.key_length") or hidden // num_heads
    fields.one_of("expert_count", (0,))
    for key in ("attention.value_length", "rope.dimension_count"):
        fields.one_of(key, (head_dim,))
    max_context = fields.integer("context_length")
    window = fields.optional_integer("attention.sliding_window", least=0)  # 0: none
    theta = fields.number("rope.freq_base") if "rope.freq_base" in fields.values else 10000.0
    num_tokens = len(general.strings("tokenizer.ggml.tokens"))
    if not num_tokens or "vocab_size" in fields.values:
        num_tokens = fields.integer("vocab_size")
    return ModelConfig(
        name=family.name,
        vocab_size=num_tokens,
        hidden_size=hidden,
        num_layers=fields.integer("block_count"),
        num_heads=num_heads,
        num_kv_heads=fields.optional_integer("attention.head_count_kv") or num_heads,
        head_dim=head_dim,
        mlp_size=fields.integer("feed_forward_length"),
        rope_theta=theta,
        rope_scaling=_scaling(fields, theta, head_dim, rope_divisors),
        norm_eps=_shortest(fields.number("attention.layer_norm_rms_epsilon")),
        tie_embeddings=tied,
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        max_context=max_context,
        sliding_window=window if window and window < max_context else None,
        eos_token_ids=end_tokens(metadata),
        bos_token_id=named_token(metadata, "bos"),
    )


def _family(metadata: Mapping[str, Any]) -> Family:
    architecture = metadata.get("general.architecture")
    families = {each.gguf: each for each in FAMILIES.values() if each.gguf}
    family = families.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        known = ", ".join(map(repr, families))
        raise ValueError(f"gguf: general.architecture must be one of {known}, got {architecture!r}")
    return family


def _fields_of(metadata: Mapping[str, Any], prefix: str) -> Fields:
    """The architecture's own fields. One that has the same value for each layer has that value."""
    own = {
        key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)
    }
    fields = Fields("gguf", own, prefix)
    num_layers = fields.integer("block_count")
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        values = own.get(key)
        if isinstance(values, list):
            if len(values) != num_layers or any(value != values[0] for value in values):
                raise fields.error(key, f"one number, or the same for each of {num_layers} layers")
            own[key] = values[0]
    return fields


def _scaling(
    fields: Fields, theta: float, head_dim: int, divisors: np.ndarray | None
) -> RopeScaling | None:
    for key in fields.values:
        if key.startswith("rope.") and key not in _ROPE_KEYS:
            raise fields.error(key, "absent, since it is not supported")
    fields.one_of("rope.scaling.attn_factor", (1,))
    # As llama.cpp: no type is linear, 0 is no factor, and the old key counts if the new is absent.
    kind = fields.one_of("rope.scaling.type", ("linear", "none"))
    keys = [key for key in ("rope.scaling.factor", "rope.scale_linear") if key in fields.values]
    factor = _shortest(fields.number(keys[0])) if keys and kind == "linear" else 1.0
    linear = RopeScaling("linear", factor) if factor not in (0.0, 1.0) else None
    if divisors is None:
        return linear
    if linear is not None:
        raise fields.error(keys[0], "absent or 1 beside the tensor rope_freqs.weight")
    # GGUF keeps the outcome of llama3 scaling and not its parameters. All Llama 3 models share
    # those but for the factor, so take them and see that they give the same.
    plain = rope_frequencies(theta, head_dim, None)
    if divisors.shape == plain.shape and np.isfinite(divisors).all() and divisors.max() >= 1:
        scaling = RopeScaling("llama3", _shortest(divisors.max()))
        if np.allclose(plain / rope_frequencies(theta, head_dim, scaling), divisors, rtol=1e-4):
            return scaling
    raise ValueError("gguf: tensor rope_freqs.weight is not that of a Llama 3 model")


def _shortest(value: Any) -> float:
    """GGUF stores f32: 1e-5 instead of 9.999999747378752e-06."""
    with np.errstate(over="ignore"):  # of a field in f64, which is refused further on
        return float(str(np.float32(value)))
