import dataclasses
import json

import pytest
from checkpoints import SMALL

from models.rope import RopeScaling


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "config.vocab_size must be an integer of at least 1, got 0"),
        ({"num_layers": True}, "config.num_layers must be an integer of at least 1, got True"),
        ({"num_layers": 10**9}, "config.num_layers must be at most 1024, got 1000000000"),
        ({"num_kv_heads": 3}, "config.num_heads must be a multiple of num_kv_heads 3, got 4"),
        ({"head_dim": 7}, "config.head_dim must be even for rope, got 7"),
        ({"norm_eps": 0.0}, "config.norm_eps must be a positive number, got 0.0"),
        ({"sliding_window": 0}, "config.sliding_window must be at least 1 or None, got 0"),
        ({"eos_token_ids": (2, 100)}, "config.eos_token_ids must be below vocab_size 100, got 100"),
        ({"name": "gpt2"}, "config.name must be one of .* got 'gpt2'"),
    ],
)
def test_a_bad_value_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_a_bad_rope_scaling_is_named():
    with pytest.raises(ValueError, match=r"rope_scaling.factor must be at least 1, got 0.5"):
        RopeScaling("linear", 0.5)
    with pytest.raises(ValueError, match=r"rope_scaling.low_freq_factor"):
        RopeScaling("llama3", 8.0, 4.0, 1.0)


@pytest.mark.parametrize(("window", "exact"), [(None, 512), (512, 512), (1000, 512), (128, 128)])
def test_attention_is_exact_as_far_as_the_window(window, exact):
    config = dataclasses.replace(SMALL, max_context=512, sliding_window=window)
    assert config.exact_context == exact


def test_a_config_can_be_hashed_and_written_as_json():
    """jit keys on it, and `kairos_jax.kv.manifest` hashes its JSON."""
    config = dataclasses.replace(SMALL, sliding_window=8, rope_scaling=RopeScaling("linear", 2.0))
    assert hash(config) == hash(dataclasses.replace(config))
    assert json.loads(json.dumps(dataclasses.asdict(config)))["sliding_window"] == 8
