import dataclasses
import json

import numpy as np
import pytest

from models.checkpoint.gguf_config import from_gguf
from models.checkpoint.huggingface_config import from_hugging_face, to_hugging_face
from models.config import ModelConfig
from models.rope import RopeScaling, rope_frequencies

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

SMALL = ModelConfig(
    name="llama",
    vocab_size=100,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=64,
    eos_token_ids=(2,),
    bos_token_id=1,
)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)

RAW = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}
GGUF = {
    "general.architecture": "llama",
    "llama.context_length": 512,
    "llama.embedding_length": 32,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.feed_forward_length": 64,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.vocab_size": 100,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.bos_token_id": 1,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "config.vocab_size must be an integer of at least 1, got 0"),
        ({"num_kv_heads": 3}, "config.num_heads must be a multiple of num_kv_heads 3, got 4"),
        ({"head_dim": 7}, "config.head_dim must be even for rope, got 7"),
        ({"norm_eps": 0.0}, "config.norm_eps must be a positive number, got 0.0"),
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


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_round_trip_of_the_golden_models(golden, family):
    config = from_hugging_face(json.loads((golden / family / "config.json").read_text()))
    assert config.name == family
    assert config.qkv_bias == (family == "qwen2")
    assert config.qk_norm == (family == "qwen3")
    assert from_hugging_face(json.loads(json.dumps(to_hugging_face(config)))) == config


@pytest.mark.parametrize("scaling", [None, LLAMA3, RopeScaling("linear", 2.0)])
@pytest.mark.parametrize("eos", [(), (2,), (2, 3)])
def test_hugging_face_round_trip(scaling, eos):
    config = dataclasses.replace(SMALL, rope_scaling=scaling, eos_token_ids=eos)
    assert from_hugging_face(to_hugging_face(config)) == config


def test_rope_is_read_from_old_and_new_keys():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
    old = from_hugging_face({**RAW, "rope_theta": 500000.0, "rope_scaling": scaling})
    new = from_hugging_face({**RAW, "rope_parameters": {**scaling, "rope_theta": 500000.0}})
    assert old == new
    assert old.rope_scaling == LLAMA3
    assert old.rope_theta == 500000.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be one of .* got 'gpt2'"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type must be .* got 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"model_type": "mistral"}, "sliding_window 128 is below max_position_embeddings 512"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding_window 128 is below"),
    ],
)
def test_what_is_not_supported_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_hugging_face({**RAW, "sliding_window": 128, **change})


def test_a_sliding_window_that_does_nothing_is_let_pass():
    heads = {"num_key_value_heads": 2, "sliding_window": 128}
    assert from_hugging_face({**RAW, **heads, "model_type": "qwen2"}).qkv_bias
    assert from_hugging_face({**RAW, **heads, "model_type": "mistral", "sliding_window": 512})


def test_gguf():
    assert from_gguf(GGUF, tied=True) == dataclasses.replace(
        SMALL, max_context=512, tie_embeddings=True
    )
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert from_gguf({**GGUF, **linear}, tied=True).rope_scaling == RopeScaling("linear", 4.0)


def test_gguf_llama3_scaling_is_recognised_by_its_divisors():
    fields = {**GGUF, "llama.rope.freq_base": 500000.0, "llama.attention.key_length": 64}
    divisors = rope_frequencies(500000.0, 64, None) / rope_frequencies(500000.0, 64, LLAMA3)
    assert from_gguf(fields, tied=True, rope_divisors=divisors).rope_scaling == LLAMA3
    with pytest.raises(ValueError, match=r"rope_freqs.weight"):
        from_gguf(fields, tied=True, rope_divisors=np.linspace(1, 8, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma"}, "general.architecture must be .* got 'gemma'"),
        ({"llama.block_count": None}, "block_count is missing"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type must be in .* got 'yarn'"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count must be in .* got 4"),
        ({"llama.expert_count": 8}, "llama.expert_count must be in .* got 8"),
        ({"llama.attention.sliding_window": 128}, "sliding_window 128 is below context_length 512"),
    ],
)
def test_what_gguf_holds_and_is_not_supported_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_gguf({**GGUF, **change}, tied=True)
