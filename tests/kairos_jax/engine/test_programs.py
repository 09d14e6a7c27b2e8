"""Compiled programs that outlast their process: used where they fit, passed over elsewhere."""

import logging
import os
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from kairos_jax.engine import calls
from kairos_jax.engine.engine import JaxEngine
from kairos_jax.engine.functions import Shapes
from kairos_jax.engine.programs import Programs, sources
from kairos_jax.process.cache import NotPrivate
from models.checkpoint import open_checkpoint
from models.sharding import Rules, make_mesh
from schedulers.ledger.instance import Limits, Role

ROOT = Path(__file__).parents[3]
LIMITS = Limits(max_batch=1, max_chunk=3, max_context=64, page_size=8, num_pages=16)


@pytest.fixture(autouse=True)
def jax_cache_as_before():
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture
def on_a_mesh():
    return jax.device_put(np.arange(4.0, dtype=np.float32), Rules().sharding(mesh(), (), ()))


def mesh(device=1):
    return make_mesh(jax.devices()[device : device + 1])


def programs(folder, about="this"):
    return Programs(folder, about, jax.devices())


def doubled(folder, x, about="this"):
    """The sum of what a kept program gives, and whether it had to be compiled."""
    traced = []

    def double(x):
        traced.append(True)
        return 2 * x

    program = programs(folder, about).compiled("double", jax.jit(double), x)
    return float(program(x).sum()), bool(traced)


def engine(directory, kept):
    checkpoint, rules = open_checkpoint(directory), Rules()
    params = checkpoint.load(mesh(), rules, "float32")
    shapes = Shapes.for_role(Role.BOTH, LIMITS)
    return JaxEngine(checkpoint.config, params, mesh(), rules, LIMITS, shapes, programs=kept)


def test_code_that_would_drop_out_of_the_key_is_an_error(tmp_path, monkeypatch):
    found = sources(ROOT)
    for made_by in ("models/transformer.py", "models/ops/native.cc", "kairos_jax/engine/calls.py"):
        assert (ROOT / made_by).read_text("utf-8") in found
    with pytest.raises(FileNotFoundError, match=r"no file matches 'models/\*\*/\*\.py'"):
        sources(tmp_path)
    monkeypatch.setattr("kairos_jax.engine.programs._SOURCES", ("models/**/*.py", "moved.py"))
    with pytest.raises(FileNotFoundError, match=r"no file matches 'moved\.py'"):
        programs(tmp_path / "kept")


def test_a_second_start_compiles_nothing_and_computes_the_same(tiny_llama, tmp_path, monkeypatch):
    first = engine(tiny_llama, programs(tmp_path / "kept"))
    first.warm_up()
    assert first.num_compiled == len(list(first.shapes)) + 3

    def compiled(*args, **options):
        raise AssertionError("compiled again")

    second = engine(tiny_llama, programs(tmp_path / "kept"))
    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    second.warm_up()
    assert second.num_compiled == first.num_compiled
    for shape in first.shapes:
        call = calls.padding(*shape, LIMITS)
        outputs = [np.asarray(each.dispatch(call)) for each in (first, second)]
        np.testing.assert_array_equal(*outputs)
    blocks = [each.read_pages([0, 1])[0] for each in (first, second)]
    np.testing.assert_array_equal(*blocks)
    assert second.num_compiled == first.num_compiled


def test_a_program_is_compiled_once_a_deployment(on_a_mesh, tmp_path):
    folder = tmp_path / "kept"
    assert doubled(folder, on_a_mesh) == (12.0, True)
    assert doubled(folder, on_a_mesh) == (12.0, False)
    assert doubled(folder, on_a_mesh, about="another") == (12.0, True)
    assert doubled(folder, on_a_mesh[:2]) == (2.0, True)


def test_a_setting_of_xla_makes_another_deployment(on_a_mesh, tmp_path, monkeypatch):
    doubled(tmp_path / "kept", on_a_mesh)
    monkeypatch.setenv("XLA_OF_TESTS", "1")
    assert doubled(tmp_path / "kept", on_a_mesh) == (12.0, True)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"x" + data[1:]]
)
def test_a_damaged_program_is_passed_over_with_a_line_and_replaced(
    on_a_mesh, tmp_path, caplog, damage
):
    doubled(tmp_path / "kept", on_a_mesh)
    (file,) = (tmp_path / "kept").glob("*/*.program")
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING, "kairos_jax.engine.programs"):
        assert doubled(tmp_path / "kept", on_a_mesh) == (12.0, True)
    assert [record.getMessage().count("compiled anew") for record in caplog.records] == [1]
    assert doubled(tmp_path / "kept", on_a_mesh) == (12.0, False)


def test_a_program_that_cannot_be_kept_runs(on_a_mesh, tmp_path, caplog, monkeypatch):
    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING, "kairos_jax.engine.programs"):
        assert doubled(tmp_path / "kept", on_a_mesh) == (12.0, True)
    assert "is not kept: no space left" in caplog.text


def test_a_folder_open_to_others_is_not_used(on_a_mesh, tmp_path):
    doubled(tmp_path / "kept", on_a_mesh)
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700
    (tmp_path / "kept").chmod(0o770)
    with pytest.raises(NotPrivate, match=r"kept belongs to another user, or others can write"):
        programs(tmp_path / "kept")


def test_what_no_start_has_used_for_long_is_removed(on_a_mesh, tmp_path):
    doubled(tmp_path / "kept", on_a_mesh, about="old")
    (old,) = (tmp_path / "kept").iterdir()
    long_ago = time.time() - 31 * 86400
    os.utime(old, (long_ago, long_ago))
    programs(tmp_path / "kept", about="old")  # used again, and so no longer old
    assert old.exists()
    os.utime(old, (long_ago, long_ago))
    programs(tmp_path / "kept", about="new")
    assert not old.exists()
