import copy
import dataclasses
import importlib.util
from pathlib import Path

import fakes
import pytest

from kairos_jax.config import ConfigError, ServerConfig
from schedulers.core import Role

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
GOOD = dataclasses.asdict(fakes.CONFIG)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_good_and_says_how_to_run_it(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for arguments in [(), *((name,) for name in getattr(module, "LAYOUTS", ()))]:
        ServerConfig.from_dict(module.get_config(*arguments).to_dict())
    assert f"--config=configs/{path.name}" in module.__doc__


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("colour", "red", "config.colour is not a key; known: model, dtype"),
        ("decode.colour", "red", "config.decode.colour is not a key; known: instances, devices"),
        ("page_size", 0, "config.page_size must be at least 1, got 0"),
        ("page_size", "8", "config.page_size must be of type int, got '8'"),
        ("page_size", True, "config.page_size must be of type int, got True"),
        ("dtype", "int3", "config.dtype must be one of float32, bfloat16, got 'int3'"),
        ("prefill.policy", "lifo", "config.prefill.policy must be one of fcfs, sjf, edf, kairos"),
        ("decode.policy", "fcfs", "config.decode.policy must be one of continuous, kairos"),
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
            "prefill.max_chunk",
            12,
            "config.prefill.max_chunk must be a multiple of row_tokens 8, got 12",
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


def test_a_whole_number_will_do_for_seconds():
    values = copy.deepcopy(GOOD)
    values["slo"]["ttft"] = 2
    assert ServerConfig.from_dict(values).default_slo.ttft == 2.0


def test_limits_are_those_of_the_role():
    config = ServerConfig.from_dict(copy.deepcopy(GOOD))
    prefill, decode, both = (config.limits(role) for role in Role)
    assert (prefill.max_batch, prefill.max_chunk, prefill.num_pages) == (4, 32, 64)
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
