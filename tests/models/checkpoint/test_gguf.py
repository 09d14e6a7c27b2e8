"""GGUF checkpoints: the same weights as the Hugging Face directory they were made of."""

import dataclasses

import gguf
import numpy as np
import pytest
from checkpoints import assert_equal, load, write_gguf

from models.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def llama_gguf(tiny_llama, tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, tiny_llama)
    return file


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_gives_the_same_config_and_weights(golden, tmp_path, family):
    write_gguf(tmp_path / "tiny.gguf", golden / family)
    config = open_checkpoint(golden / family).config
    # This writer leaves llama3 scaling out: test_gguf_config.py has it.
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
    with pytest.raises(ValueError, match=rf"cut\.gguf: .*cut short at {size} bytes"):
        open_checkpoint(file)


def test_a_file_that_is_not_gguf(tmp_path):
    (tmp_path / "notes.txt").write_text("This is no model, but long enough to look like one.")
    with pytest.raises(ValueError, match=r"notes\.txt: not a GGUF file"):
        open_checkpoint(tmp_path / "notes.txt")


def test_a_window_bounds_the_context_in_which_the_weights_are_exact(tiny_llama, tmp_path):
    fields = [("llama.attention.sliding_window", 96)]
    write_gguf(tmp_path / "tiny.gguf", tiny_llama, fields=fields)
    config = open_checkpoint(tmp_path).config
    assert (config.max_context, config.exact_context) == (1024, 96)


def test_an_error_of_the_metadata_names_the_file(tiny_llama, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama, fields=[("llama.expert_count", 8)])
    with pytest.raises(ValueError, match=r"tiny\.gguf: gguf: llama\.expert_count must be .* got 8"):
        open_checkpoint(tmp_path)
