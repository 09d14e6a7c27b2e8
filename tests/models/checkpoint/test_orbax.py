"""Orbax checkpoints: onto another mesh, and how they fail."""

import json
import shutil
import subprocess
import sys

import jax.numpy as jnp
import pytest
from checkpoints import assert_equal, load

from models.checkpoint import open_checkpoint, save_orbax


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
