"""Checkpoints to read and to damage: how tests load them, compare them and write GGUF files."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from models.checkpoint import open_checkpoint
from models.config import ModelConfig
from models.sharding import Rules, make_mesh

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
"""The description of a small model, for tests that read and write descriptions."""


def load(path, num_devices=1, dtype=jnp.float32):
    """The weights of a checkpoint on some CPU devices."""
    mesh = make_mesh(jax.devices()[:num_devices])
    return open_checkpoint(path).load(mesh, Rules(), dtype)


def assert_equal(params, expected):
    """That two flat dicts of weights are equal, number by number."""
    assert params.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(params[path], value, err_msg=path)


def write_gguf(file, source, quantize=None, fields=(), max_tensors=0):
    """A GGUF file from a Hugging Face directory, in the way llama.cpp's converter does it.

    quantize: of the matrices `down`. fields: (key, whole number) to add or replace. max_tensors: of
    each part, if the file is to be split.
    """
    config = open_checkpoint(source).config
    arch = config.name
    writer = gguf.GGUFWriter(file, arch, split_max_tensors=max_tensors)
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
    for key, value in fields:
        writer.add_uint32(key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_layers)
    for name, value in load_file(source / "model.safetensors").items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        value = value.astype(np.float32)
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            halves = value.reshape(-1, 2, config.head_dim // 2, value.shape[-1])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        if quantize and "ffn_down" in target:
            data = gguf.quants.quantize(value, quantize)
            writer.add_tensor(target, data, raw_dtype=quantize)
        else:
            writer.add_tensor(target, value)
    close(writer)


def close(writer):
    """Writes all that a GGUFWriter was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
