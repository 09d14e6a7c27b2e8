"""What a deployment needs of its chips, by shapes."""

import dataclasses

import pytest

from kairos_jax.config import ConfigError, ServerConfig, files
from kairos_jax.config.chips import CHIPS
from kairos_jax.lab.planning import (
    Counted,
    Prediction,
    Shares,
    check_fits,
    kernels_of,
    needs_of,
    predict,
)
from kairos_jax.lab.shapes import SHAPES
from kairos_jax.process.command import UsageError
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role

LLAMA = SHAPES["llama3_8b"]


def planned(layout="gpu1", **changed):
    config = ServerConfig.from_dict(files.read_file(f"llama3_8b:{layout}"))
    for name, value in changed.items():
        part, _, key = name.partition("__")
        of_part = dataclasses.replace(getattr(config, part), **{key: value})
        config = dataclasses.replace(config, **{part: of_part})
    return config, CHIPS[config.chip]


def test_an_8b_model_on_one_gpu():
    config, chip = planned()
    needs = needs_of(config, LLAMA, Role.BOTH, chip)
    assert needs.weights == 2 * 8_030_261_248
    assert needs.token == 2 * 32 * 8 * 128 * 2
    assert needs.pool == needs.token * config.decode.kv_tokens
    assert needs.parked == 0
    most = needs.most_tokens(chip.memory, config.page_size)
    assert most % config.page_size == 0
    assert needs.weights + most * needs.token + needs.temporaries <= chip.memory
    more = needs.weights + (most + config.page_size) * needs.token + needs.temporaries
    assert more > chip.memory


def test_devices_share_weights_and_pool_and_prefill_parks():
    config, chip = planned("v5e8")
    prefill, decode = (needs_of(config, LLAMA, each, chip) for each in (Role.PREFILL, Role.DECODE))
    whole = needs_of(*(planned()[0], LLAMA, Role.BOTH, planned()[1]))
    assert prefill.weights == decode.weights
    assert decode.weights == pytest.approx(whole.weights / 4, rel=1e-3)
    assert decode.token == whole.token / 4
    assert prefill.parked == decode.token * config.prefill.parked_tokens


def test_every_packaged_layout_fits():
    for layout in ("gpu1", "gpu4", "gpu8", "v5e8", "v6e8"):
        config, chip = planned(layout)
        for role in set(config.roles):
            check_fits(config, needs_of(config, LLAMA, role, chip), chip)


def test_a_pool_that_does_not_fit_is_refused_with_the_arithmetic():
    config, chip = planned(decode__kv_tokens=1 << 20)
    needs = needs_of(config, LLAMA, Role.BOTH, chip)
    with pytest.raises(ConfigError) as error:
        check_fits(config, needs, chip)
    most = needs.most_tokens(chip.memory, config.page_size)
    assert str(error.value) == (
        f"config.decode.kv_tokens must be at most {most}, got 1048576: 16.1 GB of weights + "
        "137.4 GB of 1048576 tokens of KV + 0.3 GB of temporaries make 153.8 GB, and a NVIDIA "
        "H100 SXM, 80 GB gives 63.7 GB"
    )


def test_what_chips_and_kernels_do_not_take_is_refused():
    config, chip = planned("v5e8", decode__devices=16)
    with pytest.raises(UsageError, match=r"config\.decode\.devices must be at most 8, .*, got 16"):
        needs_of(config, LLAMA, Role.DECODE, chip)
    config, chip = planned("v5e8")
    with pytest.raises(UsageError, match=r"kernels tpu: page_size must be one of 16, .*, got 48"):
        needs_of(dataclasses.replace(config, page_size=48), LLAMA, Role.DECODE, chip)
    with pytest.raises(ConfigError, match=r"config\.kernels must be auto or kernels for a tpu, "):
        kernels_of(dataclasses.replace(config, kernels="gpu"), chip)


def prediction(layout, role, shares):
    config, chip = planned(layout)
    return Prediction(LLAMA, config, needs_of(config, LLAMA, role, chip), chip, shares)


def test_a_chip_that_reaches_all_that_it_states_is_at_its_limits():
    """Decode reads weights and KV once; prefill of a long chunk computes."""
    at_best = prediction("gpu1", Role.BOTH, Shares(1, 1, 1, 0))
    chip, needs = at_best.chip, at_best.needs
    embedding = 2 * LLAMA.vocab_size * LLAMA.hidden_size
    read = needs.weights - embedding + 64 * 1025 * needs.token
    assert at_best.decode_s(64, 1024) == pytest.approx(read / chip.bandwidth, rel=1e-3)
    assert at_best.decode_s(64, 1024) == at_best.decode_limit_s(64, 1024)
    products = 2 * 2048 * (needs.weights - 2 * embedding) / 2
    assert at_best.prefill_s(2048) == pytest.approx(products / chip.flops["bfloat16"], rel=0.05)


def test_assumptions_make_it_slower_and_several_devices_exchange():
    best, real = (prediction("v5e8", Role.DECODE, each) for each in (Shares(1, 1, 1, 0), Shares()))
    assert real.decode_s(64, 1024) > best.decode_s(64, 1024) + Shares().host_s
    alone = prediction("gpu4", Role.DECODE, Shares(1, 1, 1, 0))
    moved = best.needs.weights / best.chip.bandwidth
    assert best.decode_s(1, 64) > moved > alone.needs.weights / alone.chip.bandwidth / 4


def test_a_predicted_profile_can_be_scheduled_by():
    config, chip = planned("v6e8")
    needs = {role: needs_of(config, LLAMA, role, chip) for role in set(config.roles)}
    prefill, decode = (
        Prediction(LLAMA, config, needs[role], chip, Shares())
        for role in (config.roles[0], config.roles[-1])
    )
    profile = predict(prefill, decode)
    assert profile["source"] == "predicted"
    assert profile["devices"] == {"prefill": 1, "decode": 4}
    cost = CostModel.from_profile(profile)
    assert cost.decode_s([1024] * 64) == pytest.approx(decode.decode_s(64, 1024), rel=0.15)
    assert cost.prefill_s(2048) == pytest.approx(prefill.prefill_s(2048), rel=0.15)


def test_what_compiled_steps_do_takes_the_place_of_shapes():
    """Between two steps lies a line; a limit stays what the chip could do."""
    by_shapes = prediction("gpu1", Role.BOTH, Shares(1, 1, 1, 0))
    same = [
        Counted(tokens, 64, *by_shapes._apart_from_attention(tokens, 64)) for tokens in (64, 2112)
    ]
    exact = dataclasses.replace(by_shapes, counted=same)
    assert exact.decode_s(64, 1024) == pytest.approx(by_shapes.decode_s(64, 1024))
    assert exact.step_s(63, 0, 1000) == pytest.approx(by_shapes.step_s(63, 0, 1000), rel=0.01)
    twice = [each._replace(operations=2 * each.operations, moved=2 * each.moved) for each in same]
    wasteful = dataclasses.replace(by_shapes, counted=twice)
    assert wasteful.prefill_s(2048) == pytest.approx(2 * by_shapes.prefill_s(2048), rel=0.05)
    assert wasteful.prefill_limit_s(2048) == by_shapes.prefill_limit_s(2048)
    weights = twice[0].moved
    alone = dataclasses.replace(by_shapes, counted=twice[:1])
    kv = 16 * 1025 * by_shapes.needs.token
    assert alone.decode_s(16, 1024) == pytest.approx((weights + kv) / by_shapes.chip.bandwidth)
