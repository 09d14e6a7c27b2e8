"""A model's config from a Hugging Face config.json, and back."""

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.families import FAMILIES, Family
from models.rope import RopeScaling


def from_hugging_face(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a config.json. Raises ValueError for what this code does not compute exactly."""
    name: Any = raw.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        known = tuple(FAMILIES)
        raise ValueError(f"config.json: model_type must be one of {known}, got {name!r}")
    raw = {**family.defaults, **raw}
    max_context = required(raw, "max_position_embeddings", "config.json")
    _refuse_unsupported(raw, family, max_context)
    theta, scaling = _rope_from_hugging_face(raw, max_context)
    hidden = required(raw, "hidden_size", "config.json")
    num_heads = required(raw, "num_attention_heads", "config.json")
    bos = token_ids(raw, "bos_token_id", "config.json")
    return ModelConfig(
        name=family.name,
        vocab_size=required(raw, "vocab_size", "config.json"),
        hidden_size=hidden,
        num_layers=required(raw, "num_hidden_layers", "config.json"),
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_heads,
        head_dim=raw.get("head_dim") or hidden // num_heads,
        mlp_size=required(raw, "intermediate_size", "config.json"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        max_context=max_context,
        eos_token_ids=token_ids(raw, "eos_token_id", "config.json"),
        bos_token_id=bos[0] if bos else None,
    )


def token_ids(raw: Mapping[str, Any], field: str, file: str) -> tuple[int, ...]:
    """The token ids of a field of a file: one, a list of them, or none. Raises ValueError."""
    value = raw.get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int for id in ids):
        raise ValueError(f"{file}: {field} must be a token id or a list of them, got {value!r}")
    return tuple(ids)


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """The config.json that `from_hugging_face` reads back as an equal config."""
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
        "rope_scaling": _rope_to_hugging_face(config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_context,
        "eos_token_id": (eos[0] if len(eos) == 1 else eos) if eos else None,
        "bos_token_id": config.bos_token_id,
    }
    if family.knows_windows:
        raw["sliding_window"] = None  # Mistral's default is 4096 where the key is absent
    return raw


def required(raw: Mapping[str, Any], key: str, where: str) -> Any:
    if raw.get(key) is None:
        raise ValueError(f"{where}: {key} is missing")
    return raw[key]


def _refuse_unsupported(raw: Mapping[str, Any], family: Family, max_context: int) -> None:
    act = raw.get("hidden_act", "silu")
    if act != "silu":
        raise ValueError(f"config.json: hidden_act must be 'silu', got {act!r}")
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        if raw.get(key):
            raise ValueError(f"config.json: {key} is not supported, got {raw[key]!r}")
    window = raw.get("sliding_window")
    in_force = raw.get("use_sliding_window", family.knows_windows)
    layer_types = raw.get("layer_types") or ()
    if window and window < max_context and in_force:
        raise ValueError(
            f"config.json: sliding_window {window} is below max_position_embeddings {max_context}, "
            "and sliding windows are not supported"
        )
    if set(layer_types) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"config.json: layer_types {sorted(set(layer_types))} are not supported")


def _rope_from_hugging_face(
    raw: Mapping[str, Any], max_context: int
) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from the old keys or from transformers 5's `rope_parameters`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    partial = raw.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor must be 1, got {partial}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            float(required(rope, "factor", "config.json: rope_scaling")),
            float(required(rope, "low_freq_factor", "config.json: rope_scaling")),
            float(required(rope, "high_freq_factor", "config.json: rope_scaling")),
            rope.get("original_max_position_embeddings") or max_context,
        )
    raise ValueError(
        f"config.json: rope type must be 'default', 'linear' or 'llama3', got {kind!r}"
    )


def _rope_to_hugging_face(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }
