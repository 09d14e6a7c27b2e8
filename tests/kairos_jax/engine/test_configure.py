"""Configs that are made for a model and the devices."""

import copy

import pytest

from kairos_jax.config import ServerConfig
from kairos_jax.engine.configure import Machine, _host_memory, device_bytes, suggest
from kairos_jax.process.command import UsageError
from models.config import ModelConfig
from schedulers.ledger.instance import Role

GIB = 2**30
SMALL = ModelConfig("llama", 49152, 576, 30, 9, 3, 64, 1536, tie_embeddings=True, max_context=8192)
LLAMA_8B = ModelConfig("llama", 128256, 4096, 32, 32, 8, 128, 14336, max_context=131072)
LLAMA_70B = ModelConfig("llama", 128256, 8192, 80, 64, 8, 128, 28672, max_context=131072)
CPU = Machine("cpu", 1, 20 * GIB)
H100 = 60 * 10**9  # what JAX takes of 80 GB


def made(model, machine, **wanted):
    wanted = {name.replace("__", "."): value for name, value in wanted.items()}
    values = copy.deepcopy(suggest("m", model, machine, wanted))
    for name, value in wanted.items():
        *path, last = name.split(".")
        table = values
        for part in path:
            table = table[part]
        table[last] = value
    return ServerConfig.from_dict(values)


@pytest.mark.parametrize(
    ("model", "machine", "layout"),
    [
        (SMALL, CPU, "1 x 1 colocated"),
        (SMALL, Machine("cpu", 4, 20 * GIB), "3 x 1 prefill + 1 x 1 decode (fluid)"),
        (LLAMA_8B, Machine("gpu", 1, H100), "1 x 1 colocated"),
        (LLAMA_8B, Machine("gpu", 2, H100), "1 x 1 prefill + 1 x 1 decode (fluid)"),
        (LLAMA_8B, Machine("gpu", 8, H100), "6 x 1 prefill + 2 x 1 decode (fluid)"),
        (LLAMA_8B, Machine("tpu", 8, 15 * GIB), "3 x 2 prefill + 1 x 2 decode (fluid)"),
        (LLAMA_70B, Machine("gpu", 8, H100), "1 x 4 prefill + 1 x 4 decode (fluid)"),
        (LLAMA_70B, Machine("gpu", 4, H100), "1 x 4 colocated"),
    ],
)
def test_the_layout_goes_by_devices_and_model_and_fits(model, machine, layout):
    config = made(model, machine)
    assert config.layout == layout
    assert config.dtype == ("float32" if machine.platform == "cpu" else "bfloat16")
    assert config.max_context <= model.max_context
    used = 0
    for role in config.roles:
        size, kernels = config.devices(role), machine.platform
        weights, token = device_bytes(model, config.dtype, size, kernels, config.page_size)
        pool = config.prefill if role is Role.PREFILL else config.decode
        parks = role is Role.PREFILL or config.fluid
        held = pool.kv_tokens + parks * config.prefill.parked_tokens
        of_instance = weights + token * held
        assert of_instance < 0.9 * machine.memory
        used += of_instance
    if machine.platform == "cpu":
        assert used < 0.5 * machine.memory


def test_a_long_context_is_cut_to_what_the_pools_hold():
    whole = made(SMALL, CPU)
    assert whole.max_context == 8192
    assert made(SMALL, Machine("cpu", 1, 3 * GIB)).max_context < 8192
    assert 2 * made(LLAMA_8B, Machine("gpu", 1, 30 * GIB)).max_context <= 131072


def test_nearly_the_same_memory_makes_the_same_config():
    assert suggest("m", SMALL, CPU, {}) == suggest("m", SMALL, Machine("cpu", 1, 21 * GIB), {})


def test_overrides_are_reckoned_with():
    split = made(SMALL, CPU, colocated=False, fluid=False)
    assert split.layout == "1 x 1 prefill + 1 x 1 decode"
    both = {"colocated": False, "prefill__instances": 2, "decode__instances": 2}
    assert made(SMALL, CPU, **both).layout == "2 x 1 prefill + 2 x 1 decode (fluid)"
    cluster = made(SMALL, CPU, fluid=False, **both)
    assert cluster.layout == "2 x 1 prefill + 2 x 1 decode"
    assert cluster.decode.kv_tokens < split.decode.kv_tokens < made(SMALL, CPU).decode.kv_tokens
    assert made(SMALL, CPU, dtype="bfloat16").decode.kv_tokens > made(SMALL, CPU).decode.kv_tokens
    short = made(SMALL, CPU, max_context=100)
    assert (short.max_tokens, short.prefill.max_chunk) == (50, 100)
    assert made(LLAMA_8B, Machine("gpu", 4, H100), prefill__devices=4).layout == "1 x 4 colocated"
    apart = made(LLAMA_8B, Machine("gpu", 4, H100), prefill__devices=1, decode__devices=2)
    assert not apart.fluid, "an instance keeps its role where the others are not like it"


def test_a_model_that_does_not_fit_is_refused():
    for machine in (Machine("gpu", 1, 20 * 10**9), Machine("cpu", 1, 20 * GIB)):
        with pytest.raises(UsageError, match=r"m does not fit: its weights take [\d.]+ GiB as"):
            suggest("m", LLAMA_70B, machine, {})


def test_the_host_has_memory():
    assert _host_memory() > 2**28
