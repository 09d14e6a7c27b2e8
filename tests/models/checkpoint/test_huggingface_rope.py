"""Theta and scaling of a config.json: old and new keys, one rope for each layer type, errors."""

import pytest

from models.checkpoint.huggingface_config import from_hugging_face
from models.rope import RopeScaling

RAW = {"model_type": "llama", "max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SLOW, FAST = {"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 1e4}
FULL, SLIDING = "full_attention", "sliding_attention"


def rope_of(**change):
    config = from_hugging_face({**RAW, **change})
    return config.rope_theta, config.rope_scaling


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (1e4, None)),
        ({"rope_theta": 500000}, (5e5, None)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, (5e5, RopeScaling("llama3", 8.0))),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, (5e5, RopeScaling("llama3", 8.0))),
        ({"rope_parameters": {}, "rope_scaling": None, "rope_theta": 7.0}, (7.0, None)),
        ({"rope_parameters": {"rope_theta": 3.0}, "rope_theta": 7.0}, (3.0, None)),
        ({"rope_parameters": LLAMA3, "rope_scaling": LLAMA3}, (1e4, RopeScaling("llama3", 8.0))),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, (1e4, RopeScaling("linear", 2.0))),
        ({"rope_scaling": {"type": "su", "rope_type": "default"}}, (1e4, None)),
        ({"rope_parameters": {"partial_rotary_factor": 1.0}}, (1e4, None)),
        ({"partial_rotary_factor": None}, (1e4, None)),
        ({"rope_scaling": {"factor": 1.0}}, (1e4, None)),
    ],
)
def test_rope_is_read_from_old_and_new_keys(change, expected):
    assert rope_of(**change) == expected


def test_where_the_original_context_of_llama3_scaling_stands():
    key = "original_max_position_embeddings"
    without = {name: value for name, value in LLAMA3.items() if name != key}
    for change, original in (
        ({"rope_scaling": LLAMA3}, 8192),
        ({"rope_scaling": without}, 512),
        ({"rope_scaling": without, key: 64}, 64),
        ({"rope_scaling": LLAMA3, key: 8192}, 8192),
    ):
        assert rope_of(**change)[1].original_max_position == original


@pytest.mark.parametrize(
    ("family", "change", "theta"),
    [
        ("llama", {}, 5e5),
        ("qwen2", {}, 5e5),
        ("qwen3", {"layer_types": [FULL] * 32}, 5e5),
        ("mistral", {"sliding_window": None}, 5e5),
        ("mistral", {"rope_parameters": {FULL: SLOW, SLIDING: SLOW}}, 5e5),
        ("qwen2", {"rope_parameters": {FULL: {"rope_type": "default"}}, "rope_theta": 7.0}, 7.0),
    ],
)
def test_rope_by_layer_type_is_that_of_the_layers_there_are(family, change, theta):
    nested = {"rope_parameters": {FULL: SLOW, SLIDING: FAST}}
    assert rope_of(model_type=family, **{**nested, **change}) == (theta, None)


IN_USE = {"use_sliding_window": True, "sliding_window": 128}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": [1]}, r"rope_scaling must be an object, got \[1\]"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, got 'linear'"),
        ({"rope_parameters": 5}, "rope_parameters must be an object, got 5"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling: rope_type is missing: it must be in"),
        ({"rope_parameters": {"factor": 8, "rope_theta": 5e5}}, "rope_type is missing: it must be"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing: it must be a num"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "factor must be a number, got null"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number, got '2'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be at least 1, got 0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling: type must be .* 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type must be in .* got 'dynamic'"),
        ({"rope_parameters": {"rope_type": None}}, "rope_type must be in .* got null"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor must be a number"),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": "8192"}},
            "rope_scaling: original_max_position_embeddings must be a whole number",
        ),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
            "rope_scaling: original_max_position_embeddings must be as outside of it, 64, got 8192",
        ),
        ({"rope_parameters": {"rope_theta": [1]}}, "rope_parameters: rope_theta must be a number"),
        ({"rope_theta": 0}, "rope_theta must be a positive number, got 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be in .* got 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be in"),
        (
            {"rope_parameters": SLOW, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_parameters and rope_scaling differ",
        ),
        (
            {"rope_parameters": {FULL: SLOW, "rope_theta": 1e4}},
            "rope_parameters must be one rope, or one for each layer type, and not both",
        ),
        (
            {"rope_parameters": {SLIDING: SLOW}},
            "rope_parameters: full_attention is missing",
        ),
        (
            {"rope_parameters": {FULL: None, SLIDING: SLOW}},
            "rope_parameters: full_attention must be an object .* got null",
        ),
        (
            {"rope_parameters": {FULL: {"rope_type": "yarn"}}},
            "rope_parameters: full_attention.rope_type must be in .* got 'yarn'",
        ),
        (
            {
                "model_type": "qwen2",
                "rope_parameters": {FULL: SLOW, SLIDING: FAST},
                "layer_types": [FULL, SLIDING] * 16,
                **IN_USE,
            },
            "rope_parameters differs between 'full_attention' and 'sliding_attention'",
        ),
        (
            {"model_type": "mistral", "rope_parameters": {FULL: SLOW, SLIDING: FAST}}
            | {"sliding_window": 128},
            "rope_parameters differs between",
        ),
    ],
)
def test_what_is_not_computed_or_not_well_formed_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        rope_of(**change)
