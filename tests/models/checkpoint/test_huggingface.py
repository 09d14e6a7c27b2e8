"""Hugging Face directories: what they load, into which sharding, and how they fail."""

import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import assert_equal, load
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from models.checkpoint import open_checkpoint, save_hugging_face, source
from models.families import FAMILIES
from models.transformer import weights_of


def test_matrices_are_turned_to_in_out(tiny_llama, params):
    raw = load_file(tiny_llama / "model.safetensors")
    layer = "model.layers.1.self_attn"
    x = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)
    np.testing.assert_allclose(
        np.einsum("td,dnh->tnh", x, params["layers.1.attention.k"]).reshape(5, -1),
        x @ raw[f"{layer}.k_proj.weight"].T,
        rtol=1e-5,
        atol=1e-5,
    )
    np.testing.assert_array_equal(
        params["layers.1.attention.o"].reshape(-1, 24), raw[f"{layer}.o_proj.weight"].T
    )
    np.testing.assert_array_equal(params["embed"], raw["model.embed_tokens.weight"])


@pytest.mark.parametrize("num_devices", [2, 3, 4])
def test_a_shard_holds_its_part(tiny_llama, params, num_devices):
    sharded = load(tiny_llama, num_devices)
    assert_equal(sharded, params)
    query = sharded["layers.0.attention.q"]
    assert query.sharding.shard_shape(query.shape) == (24, 24 // num_devices, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_is_declared_once_for_all_who_read_it(golden, family):
    config = open_checkpoint(golden / family).config
    weights = weights_of(config)
    tensors = load_file(golden / family / "model.safetensors")
    shapes = {w.hugging_face: source.source_shape(w) for w in weights.values()}
    assert shapes == {name: tensor.shape for name, tensor in tensors.items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    if family in ("qwen2", "qwen3"):
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_layers)
    for w in weights.values():
        assert w.gguf == names.get_name(w.hugging_face, try_suffixes=(".weight", ".bias"))
    rotated = {path.rpartition(".")[2] for path, w in weights.items() if w.rotated}
    assert rotated == ({"q", "k", "q_bias", "k_bias"} if config.qkv_bias else {"q", "k"})


def test_a_wrong_shape_is_named(copy):
    directory, tensors = copy
    tensors["model.norm.weight"] = np.ones(23, np.float32)
    save_file(tensors, directory / "model.safetensors")
    message = r"'norm\.scale' has shape \(23,\), the config asks for \(24,\)"
    with pytest.raises(ValueError, match=message):
        load(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"config\.json: no such file"),
        ("{", r"config\.json: not JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"model_type": "bert"}', "copy: config.json: model_type must be one of"),
    ],
)
def test_a_bad_config(copy, text, message):
    directory, _ = copy
    (directory / "config.json").unlink()
    if text is not None:
        (directory / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("generation", "ids"),
    [
        ({"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": 5}, (5,)),
        ({"eos_token_id": None}, (2, 3)),
        ({"eos_token_id": []}, (2, 3)),
        ({}, (2, 3)),
    ],
)
def test_stop_tokens_of_the_generation_config_win_where_it_has_some(copy, generation, ids):
    directory, _ = copy
    (directory / "generation_config.json").write_text(json.dumps(generation))
    assert open_checkpoint(directory).config.eos_token_ids == ids


def test_stop_tokens_of_the_generation_config_alone(copy):
    directory, _ = copy
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"eos_token_id": None}))
    assert open_checkpoint(directory).config.eos_token_ids == ()
    (directory / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert open_checkpoint(directory).config.eos_token_ids == (7,)


@pytest.mark.parametrize("value", ["5", [5, "6"], 5.0, True, {"id": 5}, -1])
def test_stop_tokens_of_another_type_are_named(copy, value):
    directory, _ = copy
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    message = r"generation_config\.json: eos_token_id must be a token id or a list of token ids"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(directory)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_is_written_is_what_was_read(golden, tmp_path, family):
    source = open_checkpoint(golden / family)
    save_hugging_face(tmp_path, source.config, load(golden / family, 2))
    assert open_checkpoint(tmp_path).config == source.config
    tensors = load_file(golden / family / "model.safetensors")
    expected = {name: value.astype(np.float32) for name, value in tensors.items()}
    assert_equal(load_file(tmp_path / "model.safetensors"), expected)
    with pytest.raises(ValueError, match="holds weights already"):
        save_hugging_face(tmp_path, source.config, {})


def test_weights_are_written_in_their_dtype(tiny_llama, tmp_path):
    half = load(tiny_llama, 1, jnp.bfloat16)
    save_hugging_face(tmp_path, open_checkpoint(tiny_llama).config, half)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.get_slice("model.norm.weight").get_dtype() == "BF16"
    assert_equal(load(tmp_path, 1, jnp.bfloat16), half)
