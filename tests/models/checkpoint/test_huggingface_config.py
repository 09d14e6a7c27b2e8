"""What a config.json means: defaults, types, windows, and the way back."""

import dataclasses
import json

import pytest
from checkpoints import SMALL

from models.checkpoint.huggingface_config import from_hugging_face, to_hugging_face
from models.config import ModelConfig
from models.rope import RopeScaling

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

RAW = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_of_the_golden_models(golden, family):
    config = from_hugging_face(json.loads((golden / family / "config.json").read_text()))
    assert config.name == family
    assert config.qkv_bias == (family == "qwen2")
    assert config.qk_norm == (family == "qwen3")
    assert from_hugging_face(json.loads(json.dumps(to_hugging_face(config)))) == config


@pytest.mark.parametrize("scaling", [None, RopeScaling("llama3", 8.0), RopeScaling("linear", 2.0)])
@pytest.mark.parametrize("eos", [(), (2,), (2, 3)])
def test_round_trip(scaling, eos):
    config = dataclasses.replace(SMALL, rope_scaling=scaling, eos_token_ids=eos)
    assert from_hugging_face(to_hugging_face(config)) == config


# What transformers 5.24 gives for the config.json {"model_type": NAME}, as read off its classes.
DEFAULTS = {
    "llama": ModelConfig(
        *("llama", 32000, 4096, 32, 32, 32, 128, 11008, 10000.0, None, 1e-6),
        max_context=2048,
        eos_token_ids=(2,),
        bos_token_id=1,
    ),
    "mistral": ModelConfig(
        *("mistral", 32000, 4096, 32, 32, 8, 128, 14336, 10000.0, None, 1e-6),
        max_context=131072,
        sliding_window=4096,
        eos_token_ids=(2,),
        bos_token_id=1,
    ),
    "qwen2": ModelConfig(
        *("qwen2", 151936, 4096, 32, 32, 32, 128, 22016, 10000.0, None, 1e-6),
        qkv_bias=True,
        max_context=32768,
    ),
    "qwen3": ModelConfig(
        *("qwen3", 151936, 4096, 32, 32, 32, 128, 22016, 10000.0, None, 1e-6),
        qk_norm=True,
        max_context=32768,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_key_has_the_default_of_transformers(family):
    assert from_hugging_face({"model_type": family}) == DEFAULTS[family]


def test_null_is_as_many_kv_heads_and_as_long_heads_as_follow():
    config = from_hugging_face({**RAW, "num_key_value_heads": None, "head_dim": None})
    assert (config.num_kv_heads, config.head_dim) == (4, 8)


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("num_hidden_layers", None, "a whole number from 1 to 2147483647, got null"),
        ("num_hidden_layers", "2", "a whole number .* got '2'"),
        ("num_hidden_layers", True, "a whole number .* got True"),
        ("num_hidden_layers", 2.0, "a whole number .* got 2.0"),
        ("num_hidden_layers", [2], r"a whole number .* got \[2\]"),
        ("num_hidden_layers", 0, "a whole number .* got 0"),
        ("hidden_size", 10**400, "a whole number"),
        ("vocab_size", None, "a whole number"),
        ("num_attention_heads", "4", "a whole number"),
        ("num_key_value_heads", 0, "a whole number .* got 0"),
        ("head_dim", "8", "a whole number"),
        ("intermediate_size", {}, "a whole number"),
        ("max_position_embeddings", -1, "a whole number"),
        ("bos_token_id", [1], r"a whole number from 0 .* got \[1\]"),
        ("bos_token_id", "1", "a whole number"),
        ("eos_token_id", "2", "a token id or a list of token ids, got '2'"),
        ("eos_token_id", [2, None], "a token id or a list of token ids"),
        ("eos_token_id", False, "a token id or a list of token ids"),
        ("rms_norm_eps", "1e-5", "a number, got '1e-5'"),
        ("rms_norm_eps", None, "a number, got null"),
        ("rms_norm_eps", float("nan"), "a number, got nan"),
        ("rope_theta", "10000", "a number"),
        ("rope_theta", None, "a number, got null"),
        ("rope_theta", 10**400, "a number"),
        ("tie_word_embeddings", "false", "true or false, got 'false'"),
        ("tie_word_embeddings", 1, "true or false, got 1"),
        ("tie_word_embeddings", None, "true or false, got null"),
        ("hidden_act", "gelu", r"in \('silu', 'swish'\), got 'gelu'"),
        ("hidden_act", None, "in .* got null"),
        ("layer_types", "full_attention", "a list of strings"),
        ("layer_types", ["full_attention", 1], "a list of strings"),
        ("layer_types", ["linear_attention"] * 2, "a list of 'full_attention' and 'sliding_att"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(key, value, accepted):
    with pytest.raises(ValueError, match=f"config.json: {key} must be {accepted}"):
        from_hugging_face({**RAW, key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of .* got 'gpt2'"),
        ({"model_type": None}, "model_type must be one of .* got None"),
        ({"model_type": ["llama"]}, "model_type must be one of"),
        ({"attention_bias": True}, "attention_bias is not supported, got True"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is not supported"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config is not supported"),
        ({"rms_norm_eps": 0}, "norm_eps must be a positive number, got 0"),
    ],
)
def test_what_is_not_supported_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_hugging_face({**RAW, **change})


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_keys_that_a_family_does_not_read_are_passed_over(family):
    config = from_hugging_face({**RAW, "model_type": family, "attention_bias": True})
    assert config.qkv_bias == (family == "qwen2")


FULL, SLIDING = "full_attention", "sliding_attention"
IN_USE = {"use_sliding_window": True, "sliding_window": 128}


@pytest.mark.parametrize(
    ("family", "change", "window"),
    [
        ("llama", {"sliding_window": 128}, None),
        ("mistral", {"sliding_window": 128}, 128),
        ("mistral", {"sliding_window": 512}, None),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {}, None),  # 4096 by default, of 512 positions
        ("mistral", {"max_position_embeddings": 8192}, 4096),
        ("mistral", {"sliding_window": 128, "layer_types": [FULL, FULL]}, 128),  # not read there
        ("qwen2", {"sliding_window": 128}, None),
        ("qwen2", {"sliding_window": "x"}, None),  # not in use
        ("qwen2", {**IN_USE, "max_window_layers": 0}, 128),
        ("qwen2", {**IN_USE, "max_window_layers": 1}, 128),
        ("qwen2", {**IN_USE, "max_window_layers": 2}, None),
        ("qwen2", IN_USE, None),  # max_window_layers is 28 by default
        ("qwen2", {**IN_USE, "layer_types": [FULL, FULL], "max_window_layers": 0}, None),
        ("qwen2", {**IN_USE, "layer_types": [FULL, SLIDING]}, 128),
        ("qwen3", {**IN_USE, "sliding_window": 512, "max_window_layers": 0}, None),
        ("qwen3", {**IN_USE, "max_window_layers": 0, "sliding_window": None}, None),
        ("qwen3", {**IN_USE, "layer_types": [SLIDING, FULL]}, 128),
    ],
)
def test_a_sliding_window_bounds_the_context_where_it_is_in_force(family, change, window):
    config = from_hugging_face({**RAW, "model_type": family, **change})
    assert config.sliding_window == window
    assert config.exact_context == (window or config.max_context)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": 1}, "use_sliding_window must be true or false, got 1"),
        ({**IN_USE, "sliding_window": 0}, "sliding_window must be a whole number .* got 0"),
        ({**IN_USE, "max_window_layers": None}, "max_window_layers must be .* got null"),
        ({**IN_USE, "layer_types": [FULL]}, "layer_types must be a list of num_hidden_layers = 2 "),
        (
            {"layer_types": [FULL, SLIDING]},
            "layer_types must be all 'full_attention' where ",
        ),
    ],
)
def test_a_window_that_is_not_well_defined_is_refused(change, message):
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        from_hugging_face({**RAW, "model_type": "qwen2", **change})


def test_a_window_is_written_where_all_layers_have_it_and_bounds_the_context_elsewhere():
    mistral = from_hugging_face({**RAW, "model_type": "mistral", "sliding_window": 128})
    assert from_hugging_face(to_hugging_face(mistral)) == mistral
    raw = {**RAW, "model_type": "qwen2", **IN_USE, "max_window_layers": 1}
    written = to_hugging_face(from_hugging_face(raw))
    assert written["max_position_embeddings"] == 128
    assert from_hugging_face(written).exact_context == 128
