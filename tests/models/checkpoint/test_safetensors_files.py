"""Which file a tensor is read from, and what is no weight."""

import json
import struct

import numpy as np
import pytest
from checkpoints import assert_equal, load
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture
def split(copy):
    """A copy in two files with an index, and what the index says."""
    directory, tensors = copy
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({k: v for k, v in tensors.items() if weight_map[k] == file}, directory / file)
    write_index(directory, weight_map)
    return directory, weight_map


def write_index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_several_files_with_an_index(split, params):
    directory, _ = split
    assert_equal(load(directory, 2), params)
    (directory / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1\.safetensors: no such file"):
        load(directory)


def test_several_files_without_an_index(split, params):
    directory, _ = split
    (directory / INDEX).unlink()
    assert_equal(load(directory), params)


def test_a_tensor_in_two_files_is_refused_with_both_names(copy):
    directory, tensors = copy
    save_file({NORM: tensors[NORM] + 1}, directory / "other.safetensors")
    message = r"other\.safetensors: tensor 'model\.norm\.weight' is also in .*model\.safetensors"
    with pytest.raises(ValueError, match=message):
        load(directory)


@pytest.mark.parametrize("holder", ["a.safetensors", "model.safetensors"])
def test_the_index_says_which_of_two_files_holds_a_tensor(copy, params, holder):
    directory, tensors = copy
    (directory / "model.safetensors").unlink()
    wrong = {NORM: tensors[NORM] + 1}
    only = {"model.embed_tokens.weight": tensors.pop("model.embed_tokens.weight")}
    for file in ("a.safetensors", "model.safetensors"):
        others = tensors if file == "model.safetensors" else only
        norm = {NORM: tensors[NORM]} if file == holder else wrong
        save_file({**others, **norm}, directory / file)
    weight_map = dict.fromkeys(tensors, "model.safetensors") | dict.fromkeys(only, "a.safetensors")
    write_index(directory, weight_map | {NORM: holder})
    assert_equal(load(directory), params)


def test_a_file_that_the_index_does_not_name_is_not_read(copy, params):
    directory, tensors = copy
    write_index(directory, dict.fromkeys(tensors, "model.safetensors"))
    save_file({NORM: tensors[NORM] + 1, "extra": tensors[NORM]}, directory / "old.safetensors")
    assert_equal(load(directory), params)


def test_mistrals_own_form_of_the_weights_is_passed_over(copy, params):
    directory, tensors = copy
    save_file({"norm.weight": tensors[NORM]}, directory / "consolidated.safetensors")
    assert_equal(load(directory), params)


def test_a_promised_tensor_that_is_missing_is_named_with_its_file(split):
    directory, weight_map = split
    (other,) = {"model-0.safetensors", "model-1.safetensors"} - {weight_map[NORM]}
    write_index(directory, weight_map | {NORM: other})
    message = rf"{other}: tensor 'model\.norm\.weight' is missing, which .*index\.json says"
    with pytest.raises(ValueError, match=message):
        load(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("{}", "weight_map must be an object of file names by tensor, got none"),
        ('{"weight_map": []}', "weight_map must be an object .* got list"),
        ('{"weight_map": {}}', "weight_map must be an object"),
        ('{"weight_map": {"w": 3}}', "weight_map of 'w' must be a file in this directory, got 3"),
        ('{"weight_map": {"w": null}}', "weight_map of 'w' must be .* got None"),
        ('{"weight_map": {"w": ["a"]}}', r"weight_map of 'w' must be .* got \['a'\]"),
        ('{"weight_map": {"w": ""}}', "weight_map of 'w' must be .* got ''"),
        ('{"weight_map": {"w": "/etc/passwd"}}', ".* must be a file in this directory, got '/etc"),
        ('{"weight_map": {"w": "a/../../b"}}', ".* must be a file in this directory, got 'a/"),
    ],
)
def test_a_bad_index_is_named(copy, text, message):
    directory, _ = copy
    (directory / INDEX).write_text(text)
    with pytest.raises(ValueError, match=rf"index\.json: {message}"):
        load(directory)


def test_buffers_and_a_tied_head_are_no_weights(copy, params):
    directory, tensors = copy
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    buffers = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
    for name in (*buffers, "masked_bias", "attn.bias"):
        tensors[f"model.layers.0.self_attn.{name}"] = np.ones(4, np.float32)
    tensors["model.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["model.layers.1.self_attn.bias"] = np.ones(4, np.uint8)
    save_file(tensors, directory / "model.safetensors")
    assert_equal(load(directory), params)


def test_missing_and_unknown_weights_are_named(copy):
    directory, tensors = copy
    tensors["model.layers.0.mlp.router.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, directory / "model.safetensors")
    message = r"1 weights missing: layers\.1\.mlp\.up; 1 weights unknown: model\.layers\.0\.mlp\.ro"
    with pytest.raises(ValueError, match=message):
        load(directory)


def write_one(file, name, dtype, shape, data):
    """A safetensors file of one tensor, whose dtype NumPy need not know."""
    header = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("dtype", "size"), [("F8_E4M3", 1), ("F8_E5M2", 1), ("I8", 1), ("U8", 1), ("I32", 4)]
)
def test_a_weight_of_another_type_is_named(copy, dtype, size):
    directory, tensors = copy
    tensors.pop(NORM)
    save_file(tensors, directory / "model.safetensors")
    write_one(directory / "norm.safetensors", NORM, dtype, [24], bytes(24 * size))
    message = rf"norm\.safetensors: tensor 'model\.norm\.weight' must be of dtype .*, got {dtype}"
    with pytest.raises(ValueError, match=message):
        load(directory)


def test_doubles_are_cast(copy, params):
    directory, tensors = copy
    save_file(
        {k: v.astype(np.float64) for k, v in tensors.items()}, directory / "model.safetensors"
    )
    assert_equal(load(directory), params)


@pytest.mark.parametrize("keep", [0, 7, 100, -100])
def test_a_file_cut_short(copy, keep):
    directory, _ = copy
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"checkpoint .*model\.safetensors: "):
        load(directory)
