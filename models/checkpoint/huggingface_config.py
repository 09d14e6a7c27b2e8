"""A model's config from a Hugging Face config.json, and back."""

import reprlib
from collections.abc import Mapping
from typing import Any

from models.checkpoint.fields import Fields
from models.checkpoint.huggingface_rope import read_rope, read_window, write_rope
from models.config import ModelConfig
from models.families import FAMILIES


def from_hugging_face(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a config.json. A key that is missing has the value that transformers takes for it.

    Raises:
        ValueError: a value is of the wrong type, or asks for what this code does not compute
            exactly.
    """
    name: Any = raw.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        known = tuple(FAMILIES)
        raise ValueError(f"config.json: model_type must be one of {known}, got {name!r}")
    fields = Fields("config.json", {**family.defaults, **raw})
    fields.one_of("hidden_act", ("silu", "swish"))
    for key in (*family.biases, "quantization_config", "per_layer_config"):
        if raw.get(key):
            raise ValueError(f"config.json: {key} is not supported, got {reprlib.repr(raw[key])}")
    hidden, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    max_context, window = fields.integer("max_position_embeddings"), read_window(fields, family)
    theta, scaling = read_rope(fields, window)
    return ModelConfig(
        name=family.name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.optional_integer("num_key_value_heads") or num_heads,
        head_dim=fields.optional_integer("head_dim") or hidden // num_heads,
        mlp_size=fields.integer("intermediate_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=fields.number("rms_norm_eps"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        max_context=max_context,
        sliding_window=window if window and window < max_context else None,
        eos_token_ids=fields.ids("eos_token_id"),
        bos_token_id=fields.optional_integer("bos_token_id", least=0),
    )


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """The config.json that `from_hugging_face` reads back as an equal config.

    A window of some layers only is not written, since the config does not say which layers; the
    context is bounded by it instead, so that all programs compute the same.
    """
    family, eos = FAMILIES[config.name], list(config.eos_token_ids)
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": config.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_size,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": write_rope(config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.exact_context,
        "eos_token_id": (eos[0] if len(eos) == 1 else eos) if eos else None,
        "bos_token_id": config.bos_token_id,
    }
    if family.windows == "all":
        raw["sliding_window"] = config.sliding_window
        raw["max_position_embeddings"] = config.max_context
    if family.windows == "by layer":
        raw["use_sliding_window"], raw["sliding_window"] = False, None
    return raw
