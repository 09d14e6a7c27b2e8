"""The three checkpoint forms: what they load, into which sharding, and how they fail."""

import dataclasses
import json
import shutil
import subprocess
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from models.checkpoint import open_checkpoint, save_hugging_face, save_orbax, source
from models.families import FAMILIES
from models.sharding import Rules, make_mesh
from models.transformer import weights_of
from models.weights import Weight


def load(path, num_devices=1, dtype=jnp.float32):
    mesh = make_mesh(jax.devices()[:num_devices])
    return open_checkpoint(path).load(mesh, Rules(), dtype)


def assert_equal(params, expected):
    assert params.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(params[path], value, err_msg=path)


@pytest.fixture(scope="module")
def params(tiny_llama):
    return load(tiny_llama)


@pytest.fixture
def copy(tiny_llama, tmp_path):
    """A copy of the tiny llama to damage, and its tensors."""
    shutil.copytree(tiny_llama, tmp_path / "copy")
    return tmp_path / "copy", load_file(tiny_llama / "model.safetensors")


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or directory"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected .*safetensors, one .*gguf or an Orbax"):
        open_checkpoint(tmp_path)


# Hugging Face


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


def weight(axes, shape, num_inputs=0):
    return Weight("w", shape, axes, num_inputs, False, "", "")


@pytest.mark.parametrize(
    ("declared", "index", "source_index"),
    [
        (
            weight(("embed", "heads", "head_dim"), (6, 4, 2), 1),
            np.s_[:, 1:3, :],
            np.s_[2:6, 0:6],
        ),
        (
            weight(("heads", "head_dim", "embed"), (4, 2, 6), 2),
            np.s_[2:4, :, :],
            np.s_[0:6, 4:8],
        ),
        (weight(("kv_heads", "head_dim"), (4, 2)), np.s_[1:2, :], np.s_[2:4]),
        (weight(("head_dim",), (4,)), np.s_[0:4,], np.s_[0:4]),
        (weight(("embed", "mlp"), (6, 8), 1), np.s_[:, 4:8], np.s_[4:8, 0:6]),
        (weight(("mlp", "embed"), (8, 6), 1), np.s_[0:4, :], np.s_[0:6, 0:4]),
        (weight(("vocab", "embed"), (8, 6)), np.s_[4:8, :], np.s_[4:8, 0:6]),
    ],
)
def test_only_the_part_asked_for_is_read(declared, index, source_index):
    shape = declared.shape
    tensor = np.arange(np.prod(shape)).reshape(source.source_shape(declared))
    asked = []

    def read(index):
        asked.append(index)
        return tensor[index]

    everything = source.take_part(declared, (slice(None),) * len(shape), tensor.__getitem__)
    part = source.take_part(declared, index, read)
    assert asked == [source_index if isinstance(source_index, tuple) else (source_index,)]
    np.testing.assert_array_equal(part, everything[index])
    np.testing.assert_array_equal(source.to_source(declared, everything), tensor)


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


def test_several_files_with_an_index(copy, params):
    directory, tensors = copy
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({k: v for k, v in tensors.items() if weight_map[k] == file}, directory / file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(load(directory, 2), params)
    (directory / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1\.safetensors"):
        load(directory)


def test_harmless_extras_are_passed_over(copy, params):
    directory, tensors = copy
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, directory / "model.safetensors")
    assert_equal(load(directory), params)


def test_missing_and_unknown_weights_are_named(copy):
    directory, tensors = copy
    tensors["model.layers.0.mlp.router.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, directory / "model.safetensors")
    message = r"1 weights missing: layers\.1\.mlp\.up; 1 weights unknown: model\.layers\.0\.mlp\.ro"
    with pytest.raises(ValueError, match=message):
        load(directory)


def test_a_wrong_shape_is_named(copy):
    directory, tensors = copy
    tensors["model.norm.weight"] = np.ones(23, np.float32)
    save_file(tensors, directory / "model.safetensors")
    message = r"'norm\.scale' has shape \(23,\), the config asks for \(24,\)"
    with pytest.raises(ValueError, match=message):
        load(directory)


def test_a_file_cut_short(copy):
    directory, _ = copy
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: .*incomplete"):
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


def test_stop_tokens_of_the_generation_config_win(copy):
    directory, _ = copy
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert open_checkpoint(directory).config.eos_token_ids == (5, 6)


@pytest.mark.parametrize("said", ["{}", '{"eos_token_id": null}', '{"eos_token_id": []}'])
def test_a_generation_config_without_stop_tokens_hides_none(copy, said):
    directory, _ = copy
    (directory / "generation_config.json").write_text(said)
    assert open_checkpoint(directory).config.eos_token_ids == (2, 3)


@pytest.mark.parametrize(("bos", "expected"), [([1, 2], 1), ([], None), (None, None), (3, 3)])
def test_a_list_of_first_tokens_gives_its_first(copy, bos, expected):
    directory, _ = copy
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"bos_token_id": bos}))
    assert open_checkpoint(directory).config.bos_token_id == expected


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("config.json", "bos_token_id", "<s>"),
        ("config.json", "eos_token_id", ["</s>"]),
        ("config.json", "eos_token_id", True),
        ("generation_config.json", "eos_token_id", {"id": 1}),
    ],
)
def test_token_ids_of_another_type_are_named(copy, file, field, value):
    directory, _ = copy
    raw = json.loads((directory / "config.json").read_text()) if file == "config.json" else {}
    (directory / file).write_text(json.dumps(raw | {field: value}))
    with pytest.raises(ValueError, match=rf"{file}: {field} must be a token id or a list of them"):
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


# GGUF


def write_gguf(file, source, quantize=None):
    """A GGUF file from a Hugging Face directory, in the way llama.cpp's converter does it."""
    config = open_checkpoint(source).config
    arch = config.name
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if len(config.eos_token_ids) > 1:
        writer.add_eot_token_id(config.eos_token_ids[1])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_layers)
    for name, value in load_file(source / "model.safetensors").items():
        value = value.astype(np.float32)
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            halves = value.reshape(-1, 2, config.head_dim // 2, value.shape[-1])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if quantize and "ffn_down" in target:
            data = gguf.quants.quantize(value, quantize)
            writer.add_tensor(target, data, raw_dtype=quantize)
        else:
            writer.add_tensor(target, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama_gguf(tiny_llama, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, tiny_llama)
    return file


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_gives_the_same_config_and_weights(golden, tmp_path, family):
    write_gguf(tmp_path / "tiny.gguf", golden / family)
    config = open_checkpoint(golden / family).config
    # This writer leaves llama3 scaling out: ../test_config.py has it.
    assert open_checkpoint(tmp_path).config == dataclasses.replace(config, rope_scaling=None)
    assert_equal(load(tmp_path, 2), load(golden / family))


def test_quantized_weights(tmp_path, tiny_llama, params):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama, gguf.GGMLQuantizationType.Q8_0)
    found, path = load(tmp_path / "tiny.gguf"), "layers.0.mlp.down"
    np.testing.assert_allclose(found[path], params[path], atol=float(abs(params[path]).max() / 127))
    assert not np.array_equal(found[path], params[path])


@pytest.mark.parametrize("keep", [0, 3, 100, 2000, -1, -5000])
def test_a_gguf_file_cut_short(llama_gguf, tmp_path, keep):
    data = llama_gguf.read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(data[:keep])
    size = file.stat().st_size
    with pytest.raises(ValueError, match=rf"cut\.gguf: not a GGUF file, or cut short at {size} by"):
        open_checkpoint(file)


def test_a_file_that_is_not_gguf(tmp_path):
    (tmp_path / "notes.txt").write_text("This is no model, but long enough to look like one.")
    with pytest.raises(ValueError, match=r"notes\.txt: not a GGUF file"):
        open_checkpoint(tmp_path / "notes.txt")


# Orbax


@pytest.fixture
def saved(tiny_llama, tmp_path):
    config = open_checkpoint(tiny_llama).config
    save_orbax(tmp_path / "saved", config, load(tiny_llama, 2))
    return tmp_path / "saved"


@pytest.mark.parametrize("num_devices", [1, 3])
def test_orbax_restores_to_another_mesh(saved, tiny_llama, params, num_devices):
    assert open_checkpoint(saved).config == open_checkpoint(tiny_llama).config
    restored = load(saved, num_devices)
    assert_equal(restored, params)
    assert len(restored["layers.0.attention.q"].sharding.device_set) == num_devices


def test_orbax_casts(saved, params):
    restored = load(saved, 2, jnp.bfloat16)
    assert_equal(restored, {path: value.astype(jnp.bfloat16) for path, value in params.items()})
    assert {value.dtype for value in restored.values()} == {jnp.dtype(jnp.bfloat16)}


def test_orbax_does_not_overwrite(saved, tiny_llama, params):
    with pytest.raises(ValueError, match="saved: holds weights already"):
        save_orbax(saved, open_checkpoint(tiny_llama).config, params)


def test_orbax_weights_that_do_not_match_the_config(saved):
    raw = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"9 weights unknown: layers\.1\.attention\.k, "):
        load(saved)
    (saved / "config.json").write_text(json.dumps({**raw, "intermediate_size": 48}))
    with pytest.raises(
        ValueError, match=r"'layers\.0\.mlp\.down' has shape \(96, 24\), the config"
    ):
        load(saved)


@pytest.mark.parametrize("victim", ["_METADATA", "config.json"])
def test_orbax_with_a_file_missing(saved, victim):
    for path in saved.rglob(victim):
        path.unlink()
    with pytest.raises(ValueError, match=r"checkpoint .*saved.*config\.json|incomplete or damaged"):
        load(saved)


def test_orbax_with_damaged_data(saved, tmp_path):
    """In a process of its own: TensorStore reports the other failed reads after Orbax has closed
    its event loop, at any time, and those complaints would fail whichever test runs then.
    """
    largest = max((f for f in saved.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    shutil.copytree(saved, tmp_path / "short")
    shutil.copytree(saved, tmp_path / "gone")
    (tmp_path / "gone" / largest.relative_to(saved)).unlink()
    cut = tmp_path / "short" / largest.relative_to(saved)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    script = """
import sys, jax, jax.numpy as jnp
from models.checkpoint import open_checkpoint
from models.sharding import Rules, make_mesh
for path in sys.argv[1:]:
    try:
        open_checkpoint(path).load(make_mesh(jax.devices()), Rules(), jnp.float32)
    except ValueError as error:
        print(str(error).splitlines()[0])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "short"), str(tmp_path / "gone")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    short, gone = result.stdout.splitlines()
    assert "short: incomplete or damaged" in short
    assert "gone: incomplete or damaged" in gone
