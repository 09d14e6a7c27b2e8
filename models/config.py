"""What a model is: sizes, rope and special tokens, read from a Hugging Face or GGUF description."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
_FAMILIES = get_args(Family)

# Qwen2 has biases on q, k and v whatever its config says; Qwen3 normalises each head of q and k.
_BIASED = ("qwen2",)
_NORMED = ("qwen3",)

# What transformers takes where a config.json lacks the key.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "use_sliding_window": False},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False},
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rope's frequencies are stretched for contexts longer than those trained on.

    'linear' divides all of them by `factor`. 'llama3' divides those whose wavelength is longer than
    original_max_position / low_freq_factor, keeps those shorter than original_max_position /
    high_freq_factor, and blends in between.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope_scaling.kind must be 'linear' or 'llama3', got {self.kind!r}")
        if not self.factor >= 1:
            raise ValueError(f"rope_scaling.factor must be at least 1, got {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "rope_scaling.low_freq_factor must be above 0 and below high_freq_factor "
                f"{self.high_freq_factor}, got {self.low_freq_factor}"
            )
        if self.original_max_position < 1:
            raise ValueError(
                "rope_scaling.original_max_position must be at least 1, "
                f"got {self.original_max_position}"
            )


def rope_frequencies(theta: float, head_dim: int, scaling: RopeScaling | None) -> np.ndarray:
    """Radians a position for each pair of a head's dimensions: [head_dim / 2] f32.

    In f32 throughout, as Hugging Face does: late positions see the rounding.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = np.float32(1) / np.float32(theta) ** exponents
    if scaling is None:
        return plain
    stretched = plain / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return stretched
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position * plain / np.float32(2 * np.pi)
    keep = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return keep * plain + (1 - keep) * stretched


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer of the Llama kind. Hashable, so jit can key on it.

    name: the family, a Hugging Face `model_type`. max_context: positions, prompt and output
    together. eos_token_ids: any of these ends the output.
    """

    name: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    max_context: int = 2048
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self):
        if self.name not in _FAMILIES:
            raise ValueError(f"config.name must be one of {_FAMILIES}, got {self.name!r}")
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads")
        for field in (*sizes, "head_dim", "mlp_size", "max_context"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"config.{field} must be an integer of at least 1, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config.num_heads must be a multiple of num_kv_heads {self.num_kv_heads}, "
                f"got {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config.head_dim must be even for rope, got {self.head_dim}")
        for field in ("rope_theta", "norm_eps"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"config.{field} must be a positive number, got {value}")
        bos = () if self.bos_token_id is None else (self.bos_token_id,)
        for field, ids in (("eos_token_ids", self.eos_token_ids), ("bos_token_id", bos)):
            for id in ids:
                if not 0 <= id < self.vocab_size:
                    raise ValueError(
                        f"config.{field} must be below vocab_size {self.vocab_size}, got {id}"
                    )


def from_hugging_face(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a config.json. Raises ValueError for what this code does not compute exactly."""
    family: Any = raw.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(f"config.json: model_type must be one of {_FAMILIES}, got {family!r}")
    raw = {**_DEFAULTS.get(family, {}), **raw}
    max_context = _required(raw, "max_position_embeddings", "config.json")
    _refuse_unsupported(raw, family, max_context)
    theta, scaling = _rope_from_hugging_face(raw, max_context)
    hidden = _required(raw, "hidden_size", "config.json")
    num_heads = _required(raw, "num_attention_heads", "config.json")
    eos = raw.get("eos_token_id")
    return ModelConfig(
        name=family,
        vocab_size=_required(raw, "vocab_size", "config.json"),
        hidden_size=hidden,
        num_layers=_required(raw, "num_hidden_layers", "config.json"),
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_heads,
        head_dim=raw.get("head_dim") or hidden // num_heads,
        mlp_size=_required(raw, "intermediate_size", "config.json"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=family in _NORMED,
        qkv_bias=family in _BIASED,
        max_context=max_context,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        bos_token_id=raw.get("bos_token_id"),
    )


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """The config.json that `from_hugging_face` reads back as an equal config."""
    eos: Any = list(config.eos_token_ids)
    raw = {
        "architectures": [_ARCHITECTURES[config.name]],
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
    if config.name in ("mistral", "qwen2", "qwen3"):
        raw["sliding_window"] = None  # Mistral's default is 4096 where the key is absent
    return raw


def from_gguf(
    fields: Mapping[str, Any], *, tied: bool, rope_divisors: np.ndarray | None = None
) -> ModelConfig:
    """Reads the metadata of a GGUF file: key -> plain value.

    tied: the file holds no `output.weight`; GGUF has no field that says so. rope_divisors: its
    `rope_freqs.weight` [head_dim / 2], if any. GGUF's 'llama' stands for Mistral as well, which
    computes the same.
    """
    family = fields.get("general.architecture")
    if family not in ("llama", "qwen2", "qwen3"):
        raise ValueError(
            f"gguf: general.architecture must be 'llama', 'qwen2' or 'qwen3', got {family!r}"
        )
    own = {
        key.removeprefix(f"{family}."): value
        for key, value in fields.items()
        if key.startswith(f"{family}.")
    }
    max_context = _required(own, "context_length", "gguf")
    hidden = _required(own, "embedding_length", "gguf")
    num_heads = _required(own, "attention.head_count", "gguf")
    head_dim = own.get("attention.key_length", hidden // num_heads)
    allowed = {
        "expert_count": (0,),
        "attention.value_length": (head_dim,),
        "rope.dimension_count": (head_dim,),
        "rope.scaling.type": ("none", "linear"),
    }
    for key, values in allowed.items():
        if own.get(key, values[0]) not in values:
            raise ValueError(f"gguf: {family}.{key} must be in {values}, got {own[key]!r}")
    if own.get("attention.sliding_window", max_context) < max_context:
        raise ValueError(
            f"gguf: {family}.attention.sliding_window {own['attention.sliding_window']} is below "
            f"context_length {max_context}, and sliding windows are not supported"
        )
    theta = float(own.get("rope.freq_base", 10000.0))
    eos = [fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    return ModelConfig(
        name=family,
        vocab_size=own.get("vocab_size") or len(fields.get("tokenizer.ggml.tokens", ())),
        hidden_size=hidden,
        num_layers=_required(own, "block_count", "gguf"),
        num_heads=num_heads,
        num_kv_heads=own.get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        mlp_size=_required(own, "feed_forward_length", "gguf"),
        rope_theta=theta,
        rope_scaling=_rope_from_gguf(own, theta, head_dim, rope_divisors),
        norm_eps=_shortest(_required(own, "attention.layer_norm_rms_epsilon", "gguf")),
        tie_embeddings=tied,
        qk_norm=family in _NORMED,
        qkv_bias=family in _BIASED,
        max_context=max_context,
        eos_token_ids=tuple(dict.fromkeys(id for id in eos if id is not None)),
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
    )


def _required(raw: Mapping[str, Any], key: str, where: str) -> Any:
    if raw.get(key) is None:
        raise ValueError(f"{where}: {key} is missing")
    return raw[key]


def _refuse_unsupported(raw: Mapping[str, Any], family: str, max_context: int) -> None:
    act = raw.get("hidden_act", "silu")
    if act != "silu":
        raise ValueError(f"config.json: hidden_act must be 'silu', got {act!r}")
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        if raw.get(key):
            raise ValueError(f"config.json: {key} is not supported, got {raw[key]!r}")
    # Qwen states a window that it does not use; Mistral's is in force unless null.
    window = raw.get("sliding_window")
    in_force = raw.get("use_sliding_window", family == "mistral")
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
            float(_required(rope, "factor", "config.json: rope_scaling")),
            float(_required(rope, "low_freq_factor", "config.json: rope_scaling")),
            float(_required(rope, "high_freq_factor", "config.json: rope_scaling")),
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
