"""What the metadata of a GGUF file means."""

import dataclasses

import numpy as np
import pytest
from checkpoints import SMALL

from models.checkpoint.gguf_config import from_gguf
from models.rope import RopeScaling, rope_frequencies

TIED = dataclasses.replace(SMALL, tie_embeddings=True, max_context=512)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
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


def read(rope_divisors=None, **change):
    own = {f"llama.{key.replace('__', '.')}": value for key, value in change.items()}
    return from_gguf({**GGUF, **own}, tied=True, rope_divisors=rope_divisors)


def test_gguf():
    assert from_gguf(GGUF, tied=True) == TIED


def test_the_tokens_that_end_an_output_are_found_by_their_text():
    tokens = [f"<{i}>" for i in range(99)] + ["<|im_end|>"]
    metadata = {**GGUF, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": 0}
    assert from_gguf(metadata, tied=True).eos_token_ids == (0, 99)


FACTOR = {"rope__scaling__factor": 4.0}
LINEAR4 = RopeScaling("linear", 4.0)


@pytest.mark.parametrize(
    ("change", "scaling"),
    [
        ({"rope__scaling__type": "linear", **FACTOR}, LINEAR4),
        (FACTOR, LINEAR4),  # llama.cpp takes linear where there is no type
        ({"rope__scale_linear": 4.0}, LINEAR4),
        ({"rope__scale_linear": 4.0, "rope__scaling__factor": 2.0}, RopeScaling("linear", 2.0)),
        ({"rope__scale_linear": 4.0, "rope__scaling__factor": 0.0}, None),
        ({"rope__scaling__type": "none", **FACTOR}, None),
        ({"rope__scaling__type": "linear"}, None),
        ({"rope__scale_linear": 1.0}, None),
        ({"rope__scaling__attn_factor": 1.0, "rope__scaling__finetuned": True}, None),
        # llama.cpp uses this for yarn and longrope alone, and those are refused.
        ({"rope__scaling__original_context_length": 64, **FACTOR}, LINEAR4),
    ],
)
def test_rope_scaling_is_as_llama_cpp_applies_it(change, scaling):
    assert read(**change) == dataclasses.replace(TIED, rope_scaling=scaling)


def test_llama3_scaling_is_recognised_by_its_divisors():
    change = {"rope__freq_base": 500000.0, "attention__key_length": 64}
    divisors = rope_frequencies(500000.0, 64, None) / rope_frequencies(500000.0, 64, LLAMA3)
    assert read(divisors, **change).rope_scaling == LLAMA3
    with pytest.raises(ValueError, match=r"rope\.scaling\.factor must be absent or 1 beside "):
        read(divisors, **change, **FACTOR)


@pytest.mark.parametrize(
    "divisors",
    [np.linspace(1, 8, 32), np.ones(16), np.array([]), np.full(32, np.nan), np.zeros(32)],
)
def test_other_divisors_are_refused(divisors):
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not that of a Llama 3 model"):
        read(divisors.astype(np.float32), rope__freq_base=500000.0, attention__key_length=64)


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"attention__head_count": [4, 4]}, {}),
        ({"attention__head_count_kv": [2, 2]}, {}),
        ({"feed_forward_length": [64, 64]}, {}),
        ({"attention__sliding_window": 128}, {"sliding_window": 128}),
        ({"attention__sliding_window": 512}, {}),
        ({"attention__sliding_window": 0}, {}),
        ({"vocab_size": 200}, {"vocab_size": 200}),
    ],
)
def test_values_that_are_well_defined_are_taken(change, fields):
    assert read(**change) == dataclasses.replace(TIED, **fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_count": None}, "block_count must be a whole number .* got null"),
        ({"block_count": 0}, "block_count must be a whole number from 1 .* got 0"),
        ({"block_count": "2"}, "block_count must be a whole number .* got '2'"),
        ({"context_length": 512.0}, "context_length must be a whole number .* got 512.0"),
        ({"rope__scaling__type": "yarn"}, r"rope\.scaling\.type must be in .* got 'yarn'"),
        ({"rope__scaling__type": "longrope"}, r"rope\.scaling\.type must be in .* got 'longrope'"),
        ({"rope__scaling__attn_factor": 1.2}, r"rope\.scaling\.attn_factor must be in .* got 1.2"),
        ({"rope__scaling__yarn_ext_factor": 1.0}, r"rope\.scaling\.yarn_ext_factor must be absent"),
        ({"rope__scaling__alpha": 1000.0}, r"rope\.scaling\.alpha must be absent, .* got 1000.0"),
        ({"rope__dimension_sections": [1, 2]}, r"rope\.dimension_sections must be absent"),
        ({"rope__scaling__factor": "4"}, r"rope\.scaling\.factor must be a number, got '4'"),
        ({"rope__scale_linear": [4.0]}, r"rope\.scale_linear must be a number"),
        ({"rope__freq_base": True}, r"rope\.freq_base must be a number, got True"),
        ({"rope__dimension_count": 4}, r"rope\.dimension_count must be in \(8,\), got 4"),
        ({"attention__value_length": 4}, r"attention\.value_length must be in \(8,\), got 4"),
        ({"expert_count": 8}, r"expert_count must be in \(0,\), got 8"),
        ({"attention__head_count": [4, 2]}, r"head_count must be one number, or the same for each"),
        ({"attention__head_count_kv": [2, 2, 2]}, r"head_count_kv must be one number, or the same"),
        ({"attention__head_count": ["a", "a"]}, r"head_count must be a whole number"),
        ({"attention__head_count": []}, r"head_count must be one number, or the same"),
        ({"attention__sliding_window": [8, 8]}, r"sliding_window must be a whole number"),
    ],
)
def test_what_is_not_supported_or_of_the_wrong_type_is_refused(change, message):
    with pytest.raises(ValueError, match=rf"gguf: llama\.(attention\.)?{message}"):
        read(**change)


@pytest.mark.parametrize("value", ["gemma", None, 5, ["llama"]])
def test_another_architecture_is_refused(value):
    with pytest.raises(ValueError, match=r"general\.architecture must be one of 'llama', .* got "):
        from_gguf({**GGUF, "general.architecture": value}, tied=True)


@pytest.mark.parametrize("key", ["block_count", "context_length", "attention.head_count"])
def test_a_missing_field_is_named(key):
    metadata = {name: value for name, value in GGUF.items() if name != f"llama.{key}"}
    with pytest.raises(ValueError, match=rf"gguf: llama\.{key} is missing: it must be a whole"):
        from_gguf(metadata, tied=True)


def test_the_vocabulary_is_as_large_as_the_list_of_its_tokens():
    metadata = {name: value for name, value in GGUF.items() if name != "llama.vocab_size"}
    listed = {**metadata, "tokenizer.ggml.tokens": [f"<{i}>" for i in range(7)]}
    assert from_gguf(listed, tied=True).vocab_size == 7
    with pytest.raises(ValueError, match=r"llama\.vocab_size is missing"):
        from_gguf(metadata, tied=True)


@pytest.mark.parametrize("id", [2**32 - 1, -1, 7, None])
def test_a_bos_token_outside_the_vocabulary_is_none(id):
    listed = {**GGUF, "tokenizer.ggml.tokens": [f"<{i}>" for i in range(7)]}
    del listed["llama.vocab_size"]
    for bos, expected in ((id, None), (6, 6)):
        given = listed | {"tokenizer.ggml.bos_token_id": bos}
        assert from_gguf(given, tied=True).bos_token_id == expected


def test_a_bos_token_of_the_wrong_type_is_named():
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.bos_token_id must be a token id"):
        from_gguf({**GGUF, "tokenizer.ggml.bos_token_id": "1"}, tied=True)
