import copy
import dataclasses
import importlib.util
import math
from pathlib import Path

import fakes
import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from kairos_jax.config import ConfigError, ServerConfig
from models.config import ModelConfig
from models.ops import KERNELS
from models.params import abstract_params, pack_config
from models.sharding import MESH_AXES
from schedulers.ledger.instance import Role

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.py"))
GOOD = dataclasses.asdict(fakes.CONFIG)


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_good_and_says_how_to_run_it(path):
    module = module_of(path)
    for arguments in [(), *((name,) for name in getattr(module, "LAYOUTS", ()))]:
        ServerConfig.from_dict(module.get_config(*arguments).to_dict())
    assert f"--config={path.stem}" in module.__doc__


def test_llama3_8b_fits_each_of_its_layouts():
    """By shapes and shardings alone, into what JAX takes of a device's memory."""
    model = ModelConfig("llama", 128256, 4096, 32, 32, 8, 128, 14336, max_context=131072)
    llama3 = module_of(next(path for path in CONFIGS if path.stem == "llama3_8b"))
    assert {"gpu1", "gpu4", "gpu8", "v5e8", "v6e8"} == set(llama3.LAYOUTS)
    for layout in llama3.LAYOUTS:
        config = ServerConfig.from_dict(llama3.get_config(layout).to_dict())
        memory = {"gpu": 80e9, "v5e": 16 * 2**30, "v6e": 32 * 2**30}[layout[:3]]
        assert config.num_devices == int(layout[3:])
        for role in set(config.roles):
            used = bytes_of_a_device(model, config, role, "gpu" if layout[0] == "g" else "tpu")
            assert used < 0.75 * memory, (layout, role)


def bytes_of_a_device(model, config, role, kernels):
    """Weights, pool, and KV that waits for decode."""
    devices, limits, rules = config.devices(role), config.limits(role), config.rules
    mesh = AbstractMesh((devices,), MESH_AXES, axis_types=(AxisType.Auto,))
    model = pack_config(model, KERNELS[kernels], mesh, rules)
    weights = abstract_params(model, config.dtype, mesh, rules)
    of_weights = sum(bytes_of_a_shard(w, w.sharding) for w in weights.values())
    layout, pages = KERNELS[kernels].layout, (limits.num_pages, limits.page_size)
    layer = jax.eval_shape(lambda: layout.zeros(model, *pages, config.dtype))
    shardings = layout.shardings(model, mesh, rules)
    of_pool = model.num_layers * sum(map(bytes_of_a_shard, layer, shardings))
    parked = limits.parked_tokens if role is Role.PREFILL else 0
    return of_weights + of_pool * (1 + parked / limits.kv_tokens)


def bytes_of_a_shard(array, sharding):
    return math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("colour", "red", "config.colour is not a key; known: model, served_model"),
        ("decode.colour", "red", "config.decode.colour is not a key; known: instances, devices"),
        ("page_size", 0, "config.page_size must be at least 1, got 0"),
        ("page_size", "8", "config.page_size must be of type int, got '8'"),
        ("page_size", True, "config.page_size must be of type int, got True"),
        ("dtype", "int3", "config.dtype must be one of float32, bfloat16, got 'int3'"),
        ("chip", "v9", "config.chip must be one of empty, v5e, v6e, h100, h200, got 'v9'"),
        ("prefill.policy", "lifo", "config.prefill.policy must be one of fcfs, sjf, edf, kairos"),
        ("decode.policy", "fcfs", "config.decode.policy must be one of continuous, kairos"),
        ("rules.width", "tensor", "config.rules.width is not a logical axis; known: vocab, embed"),
        ("rules.mlp", "data", "config.rules.mlp must be an axis of the mesh (tensor) or empty"),
        ("rules.heads", "", "config.rules.kv_heads must be as rules.heads, None, got 'tensor'"),
        ("slo.ttft", -1.0, "config.slo.ttft must be a positive number of seconds, got -1.0"),
        ("slo.tpot", float("nan"), "config.slo.tpot must be a positive number of seconds, got nan"),
        ("colocated", 1, "config.colocated must be of type bool, got 1"),
        ("prefill.instances", 0, "config.prefill.instances must be at least 1, got 0"),
        ("decode.instances", -1, "config.decode.instances must be at least 1, got -1"),
        ("decode.devices", 0, "config.decode.devices must be at least 1, got 0"),
        ("max_tokens", 128, "config.max_tokens must be below max_context 128, got 128"),
        (
            "decode.kv_tokens",
            127,
            "config.decode.kv_tokens must hold max_context 128 in whole pages of 8, got 127",
        ),
        (
            "prefill.parked_tokens",
            127,
            "config.prefill.parked_tokens must be at least max_context 128, got 127",
        ),
        (
            "prefill.row_tokens",
            8,
            "config.prefill.row_tokens is not a key",
        ),
    ],
)
def test_a_bad_value_is_refused_by_name(key, value, words):
    values = copy.deepcopy(GOOD)
    *path, last = key.split(".")
    table = values
    for name in path:
        table = table[name]
    table[last] = value
    with pytest.raises(ConfigError) as error:
        ServerConfig.from_dict(values)
    assert words in str(error.value)


def test_a_missing_key_is_named():
    values = copy.deepcopy(GOOD)
    del values["decode"]["max_batch"]
    with pytest.raises(ConfigError, match=r"config\.decode\.max_batch is missing"):
        ServerConfig.from_dict(values)


def test_what_has_a_default_may_be_left_out():
    values = copy.deepcopy(GOOD)
    for key in ("kernels", "rules", "max_requests", "page_size", "served_model_name"):
        del values[key]
    for role in ("prefill", "decode"):
        for key in ("instances", "devices", "policy", "prefix_cache"):
            del values[role][key]
    config = ServerConfig.from_dict(values)
    assert (config.page_size, config.rules) == (64, fakes.CONFIG.rules)
    assert (config.prefill.policy, config.decode.instances) == ("kairos_plus", 1)


def test_a_table_must_be_one():
    with pytest.raises(ConfigError, match=r"config\.slo must be a table of keys, got 3"):
        ServerConfig.from_dict(GOOD | {"slo": 3})


@pytest.mark.parametrize(
    ("model", "served", "name"),
    [("/a/b", "", "b"), ("org/name", "", "name"), ("/a/b.gguf", "mine", "mine")],
)
def test_the_name_that_apis_use(model, served, name):
    assert fakes.altered(model=model, served_model_name=served).name == name


def test_a_whole_number_will_do_for_seconds():
    values = copy.deepcopy(GOOD)
    values["slo"]["ttft"] = 2
    assert ServerConfig.from_dict(values).default_slo.ttft == 2.0


def test_limits_are_those_of_the_role():
    config = ServerConfig.from_dict(copy.deepcopy(GOOD))
    prefill, decode, both = (config.limits(role) for role in Role)
    assert (prefill.max_batch, prefill.max_chunk, prefill.num_pages) == (8, 32, 64)
    assert prefill.parked_tokens == 4096
    assert (decode.max_batch, decode.max_chunk, decode.num_pages) == (8, 1, 128)
    assert (both.max_batch, both.max_chunk, both.num_pages) == (8, 32, 128)


@pytest.mark.parametrize(
    ("values", "roles", "num_devices", "layout"),
    [
        ({}, "PD", 2, "1 x 1 prefill + 1 x 1 decode"),
        (
            {"prefill__instances": 2, "decode__instances": 3, "decode__devices": 4},
            "PPDDD",
            14,
            "2 x 1 prefill + 3 x 4 decode",
        ),
        (
            {"colocated": True, "prefill__instances": 2, "prefill__devices": 3},
            "BB",
            6,
            "2 x 3 colocated",
        ),
    ],
)
def test_which_instances_there_are(values, roles, num_devices, layout):
    config = fakes.altered(**values)
    assert "".join(role.name[0] for role in config.roles) == roles
    assert (config.num_devices, config.layout) == (num_devices, layout)
