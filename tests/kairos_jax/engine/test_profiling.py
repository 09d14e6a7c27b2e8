"""Step times as a made-up engine gives them, on a clock of its own; and what becomes of them."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kairos_jax.engine import profiling
from kairos_jax.engine.functions import Shapes
from kairos_jax.engine.profile_file import read
from models.ops import KERNELS
from schedulers.cost import CostModel
from schedulers.ledger.instance import Limits, Role

# Of SmolLM2 135M on two cores, as in configs/smollm2_135m_cpu_colocated.py.
LIMITS = Limits(32, 256, 2048, 64, 512)
BASE_S, SEQ_S, TOKEN_S, PROMPT_TOKEN_S = 0.0275, 0.0024, 2.9e-6, 1.4e-3


class TimedEngine:
    """An engine that only takes time. form: how its decode steps read contexts."""

    def __init__(self, form, kernels="native", limits=LIMITS, role=Role.BOTH):
        self.form, self.kernels, self.limits = form, kernels, limits
        self.shapes = Shapes.for_role(role, limits, kernels)
        device = SimpleNamespace(platform="cpu", device_kind="cpu")
        self.mesh = SimpleNamespace(devices=np.array([device]), size=1)
        self.config = SimpleNamespace(head_dim=64)
        self.block = jax.ShapeDtypeStruct((1, 1, 1, 2, 64), jnp.float32)
        self.wire_sharding = jax.devices()[0]
        self.now, self.decoded_s = 0.0, {"even": 0.0, "mixed": 0.0}

    def perf_counter(self):
        return self.now

    def step(self, work):
        for seq, count in work:
            assert len(seq.pages) == self.limits.pages_for(seq.computed + count)
            assert all(0 <= page < self.limits.num_pages for page in seq.pages)
        chunks = [(seq.computed, count) for seq, count in work if count > 1]
        contexts = [seq.computed for seq, count in work if count == 1]
        took_s = BASE_S
        for computed, count in chunks:
            took_s += PROMPT_TOKEN_S * (count - 1) + SEQ_S + TOKEN_S * (computed + count)
        if contexts:
            rows = len(contexts) if chunks else self.shapes.fitting(len(work), len(work))[0]
            tokens = sum(contexts) if self.form == "ragged" else rows * max(contexts)
            took_s += SEQ_S * rows + TOKEN_S * tokens
        self.now += took_s
        if not chunks:
            self.decoded_s["even" if len(set(contexts)) == 1 else "mixed"] += took_s

    def read_pages(self, pages):
        self.now += 1e-3 + 1e-4 * len(pages)
        return [np.zeros(1)]

    def write_pages(self, pages, kv):
        pass

    def wait(self):
        pass


@pytest.fixture
def measured(monkeypatch):
    def measure(engine):
        monkeypatch.setattr(profiling, "time", engine)
        return profiling.measure([engine], fakes.CONFIG, "model", lambda *args: None)

    return measure


@pytest.mark.parametrize("kernels", ["native", "cpu"])
@pytest.mark.parametrize("form", ["ragged", "padded"])
def test_the_form_is_the_one_that_the_steps_have(measured, form, kernels, caplog):
    engine = TimedEngine(form, kernels)
    profile = measured(engine)
    assert profile["step"]["form"] == form
    fitted = profile["fit"]["decode"]
    assert fitted["declared"] == KERNELS[kernels].contexts
    assert set(fitted["forms"]) == {"ragged", "padded"}
    assert fitted["forms"][form]["p90_rel_error"] < 0.01
    assert f"(contexts {form})" in profiling.fit_line(profile)
    warned = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert bool(warned) == (form != KERNELS[kernels].contexts)
    cost = CostModel.from_profile(profile)
    engine.now = 0.0
    profiling._decode(engine, [200] * 15 + [1900])()
    assert cost.decode_s([200] * 15 + [1900]) == pytest.approx(engine.now, rel=0.01)
    engine.now = 0.0
    profiling._beside(engine, 16, 300, 200)()
    beside_s = cost.decode_s([300] * 16) + cost.prefill_s(200) - cost.shared_s
    assert beside_s == pytest.approx(engine.now, rel=0.02)
    assert set(profile["fit"]) == {"prefill", "decode", "beside", "transfer"}


@pytest.mark.parametrize("role", [Role.BOTH, Role.DECODE])
@pytest.mark.parametrize("form", ["ragged", "padded"])
def test_mixed_batches_take_a_small_part_of_the_measurement(measured, form, role):
    engine = TimedEngine(form, role=role)
    profile = measured(engine)
    samples = profile["samples"]["mixed"]
    assert [batch for batch, *_ in samples] == [4, 4, 16, 16, 32, 32]
    assert {longest for *_, longest, _ in samples} == {1024}
    assert all(longest < total < batch * longest for batch, total, longest, _ in samples)
    assert engine.decoded_s["mixed"] < 0.2 * (engine.now - engine.decoded_s["mixed"])


def test_small_limits_have_mixed_batches_too(measured):
    limits = Limits(2, 32, 64, 16, 4)
    profile = measured(TimedEngine("ragged", limits=limits))
    assert [sample[:3] for sample in profile["samples"]["mixed"]] == [(2, 7 + 63, 63)]
    alone = measured(TimedEngine("ragged", limits=replace(limits, max_batch=1)))
    assert "mixed" not in alone["samples"]
    assert alone["decode"]["form"] == "ragged", "as declared"
    assert "step" not in alone


def test_a_kept_profile_is_read_again_until_the_measurement_changes(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = SimpleNamespace(checkpoint=SimpleNamespace(config="a model"))

    def load(engine):
        monkeypatch.setattr(profiling, "time", engine)
        args = fakes.CONFIG, model, [engine], lambda *args: None
        return profiling.load_or_measure(None, *args)

    first = load(TimedEngine("ragged"))
    again = TimedEngine("ragged")
    assert load(again) == json.loads(json.dumps(first))
    assert again.now == 0.0, "nothing was measured"
    monkeypatch.setattr(profiling, "_VERSION", profiling._VERSION + 1)
    load(again)
    assert again.now > 0.0


def test_a_profile_from_before_is_read_as_it_was(tmp_path):
    old = fakes.PROFILE | {
        "decode": fakes.PROFILE["decode"] | {"form": "padded", "buckets": [1, 4], "factors": [1, 2]}
    }
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    cost = CostModel.from_profile(read(path))
    assert cost.decode.form == "padded"
    assert cost.decode_s([10, 20]) == pytest.approx(2 * (1e-4 + 4e-6))
    line = profiling.fit_line(old | {"fit": {"decode": {"r2": 0.99, "p90_rel_error": 0.04}}})
    assert line == "decode R2 0.990, p90 error 4% (contexts padded)"


def test_a_part_that_is_worse_than_none_is_left_out_when_it_is_read(tmp_path):
    fits = {"transfer": {"r2": -0.3, "p90_rel_error": 0.8}}
    samples = {"transfer": [[256, 0.006], [512, 0.002]]}
    path = tmp_path / "poor.json"
    path.write_text(json.dumps(fakes.PROFILE | {"fit": fits, "samples": samples}))
    profile = read(path)
    assert CostModel.from_profile(profile).transfer_s(9999) == pytest.approx(0.004)
    line = profiling.fit_line(profile)
    assert line == "transfer R2 -0.300, p90 error 80% (left out: the mean is used)"
