"""A fit finds what made the samples, and how decode steps read contexts; poor fits are named."""

import numpy as np
import pytest

from schedulers.cost import CostModel
from schedulers.fitting import fit, usable, warnings


def test_fit_leaves_out_what_was_not_measured():
    found = fit(decode=[(1, 1, 1.0), (2, 1, 2.0)], form="padded", buckets=[1, 2])
    assert set(found) == {"decode", "fit"}
    assert set(found["fit"]) == {"decode"}
    assert set(fit(prefill=[(1, 0, 1.0)])) == {"prefill", "fit"}


@pytest.mark.parametrize("form", ["ragged", "padded"])
def test_fit_recovers_the_coefficients(form):
    truth = {
        "prefill": {"base_s": 5e-3, "per_token_s": 3e-5, "per_pair_s": 1.4e-9},
        "decode": {"base_s": 7e-3, "per_seq_s": 2e-5, "per_context_token_s": 6e-8, "form": form},
        "transfer": {"base_s": 2e-3, "per_token_s": 5e-6},
        "kv_capacity_tokens": 1000,
    }
    truth["decode"] |= {"buckets": [1, 8, 64, 256], "factors": [1.0] * 4}
    cost, rng = CostModel.from_profile(truth), np.random.default_rng(0)

    def noisy(seconds):
        return seconds * rng.normal(1, 0.02)

    lengths = [16, 100, 300, 1000, 3000, 8000, 16000] * 4
    batches = [1, 7, 60, 200] * 4
    found = fit(
        [(n, c, noisy(cost.prefill_s(n, c))) for n in lengths for c in (0, 1000, 8000)],
        [(b, c, noisy(cost.decode_s([c] * b))) for b in batches for c in (100, 1000, 8000)],
        [(n, noisy(cost.transfer_s(n))) for n in lengths],
        form=form,
        buckets=[1, 8, 64, 256],
    )
    for kind in ("prefill", "decode", "transfer"):
        for name in (name for name in truth[kind] if name.endswith("_s")):
            value = truth[kind][name]
            assert found[kind][name] == pytest.approx(value, rel=0.15), (kind, name)
        residual = found["fit"][kind]
        assert residual["r2"] > 0.99
        assert 0 < residual["p50_rel_error"] < residual["p90_rel_error"] < 0.06
    assert CostModel.from_profile(truth | found).decode.form == form


@pytest.mark.parametrize("form", ["ragged", "padded"])
def test_one_row_is_fitted_to_all_steps_of_an_engine_that_does_both(form):
    """Steps of one kind alone would not tell tokens from sequences, nor pairs from contexts."""
    step = {
        "base_s": 0.02,
        "per_token_s": 1.4e-3,
        "per_pair_s": 5e-7,
        "per_seq_s": 9e-4,
        "per_context_token_s": 3e-6,
        "form": form,
        "buckets": BUCKETS,
        "factors": [1.0] * len(BUCKETS),
    }
    profile = {"step": step, "transfer": {"base_s": 0.0, "per_token_s": 1.0}}
    cost = CostModel.from_profile(profile | {"kv_capacity_tokens": 100})
    rng = np.random.default_rng(0)

    def noisy(seconds):
        return seconds * rng.normal(1, 0.01)

    def beside(batch, context, tokens):
        return cost.decode_s([context] * batch) + cost.prefill_s(tokens) - cost.shared_s

    mixtures = [[2047] * long + [64] * (n - long) for n in (4, 8, 32) for long in (1, n // 2)]
    found = fit(
        [(n, c, noisy(cost.prefill_s(n, c))) for n in (32, 64, 128, 256) for c in (0, 256, 512)],
        [(b, c, noisy(cost.decode_s([c] * b))) for b in BUCKETS for c in (64, 256, 1024)],
        mixed=[(len(c), sum(c), max(c), noisy(cost.decode_s(c))) for c in mixtures],
        beside=[(b, 256, n, noisy(beside(b, 256, n))) for b in (4, 16, 32) for n in (64, 256)],
        form=form,
        buckets=BUCKETS,
    )
    assert set(found) == {"step", "fit"}
    for name, value in step.items():
        if name.endswith("_s"):
            assert found["step"][name] == pytest.approx(value, rel=0.2), name
    assert found["step"]["form"] == form
    assert set(found["fit"]) == {"prefill", "decode", "beside"}
    for residual in found["fit"].values():
        assert residual["r2"] > 0.98
        assert residual["p90_rel_error"] < 0.05


def test_fit_never_goes_negative():
    falling = [(n, 0, 1.0 / n) for n in (1, 2, 4, 8)]
    found = fit(falling, [(1, 1, 1.0), (2, 1, 1.0)], [(1, 1.0), (9, 1.0)])
    assert min(found["prefill"].values()) >= 0
    assert found["transfer"] == {"base_s": pytest.approx(1.0), "per_token_s": pytest.approx(0.0)}
    assert found["fit"]["transfer"]["r2"] is None, "equal times leave nothing to explain"


@pytest.mark.parametrize("bad", [[], [(1, 0.0)]])
def test_fit_wants_positive_samples(bad):
    with pytest.raises(ValueError, match="transfer needs samples"):
        fit([(1, 0, 1.0)], [(1, 1, 1.0)], bad)


def test_fit_finds_how_far_each_bucket_is_off_the_line():
    """Small batches cost less than the line says, middle ones more, as measured on a CPU."""
    buckets, factors = [1, 2, 4, 8], {1: 0.8, 2: 1.1, 4: 1.2, 8: 0.95}
    steps = [
        (b, c, factors[b] * (0.02 + b * (0.003 + 5e-6 * c)))
        for b in buckets
        for c in (64, 256, 1024)
    ]
    found = fit([(1, 0, 1.0)], steps[:3] + steps[6:], [(1, 1.0)], form="padded", buckets=buckets)
    assert len(found["decode"]["factors"]) == len(buckets), "one not measured too"
    found = fit([(1, 0, 1.0)], steps, [(1, 1.0)], form="padded", buckets=buckets)
    assert found["fit"]["decode"]["p90_rel_error"] < 0.03
    cost = CostModel.from_profile(found | {"kv_capacity_tokens": 100})
    for batch, context, seconds in steps:
        assert cost.decode_s([context] * batch) == pytest.approx(seconds, rel=0.05)
    assert cost.decode_s([64] * 3) == cost.decode_s([64] * 4)
    in_one = cost.decode_step_s(np.array([1, 3, 8]), 0, np.array([64, 64, 64]))
    assert in_one.tolist() == [cost.decode_s([64] * n) for n in (1, 3, 8)]


# Of SmolLM2 135M on two cores: seconds of a step, a sequence and a token of context.
BASE_S, SEQ_S, TOKEN_S = 0.0275, 0.0024, 2.9e-6
BUCKETS = [1, 2, 4, 6, 8, 12, 16, 24, 32]


def seconds(form, contexts, noise=1.0):
    rows = min(size for size in BUCKETS if size >= len(contexts))
    tokens = sum(contexts) if form == "ragged" else rows * max(contexts)
    return noise * (BASE_S + SEQ_S * rows + TOKEN_S * tokens)


def measured(form, mixtures, noise=0.0, token_s=TOKEN_S):
    """Samples of even batches, and of these, as kernels of this form would give them."""
    rng = np.random.default_rng(0)

    def timed(contexts):
        took_s = seconds(form, contexts) + (token_s - TOKEN_S) * sum(contexts)
        return took_s * rng.lognormal(0, noise)

    even = [(b, c, timed([c] * b)) for b in BUCKETS for c in (64, 256, 1024)]
    return even, [(len(each), sum(each), max(each), timed(each)) for each in mixtures]


MIXTURES = [[2047] * long + [64] * (n - long) for n in (4, 8, 32) for long in (1, n // 2)]


@pytest.mark.parametrize("declared", ["ragged", "padded"])
@pytest.mark.parametrize("truth", ["ragged", "padded"])
def test_mixed_batches_tell_how_contexts_are_read(truth, declared):
    even, mixed = measured(truth, MIXTURES, noise=0.03)
    found = fit(decode=even, mixed=mixed, form=declared, buckets=BUCKETS)
    assert found["decode"]["form"] == truth
    of_decode = found["fit"]["decode"]
    assert of_decode["declared"] == declared
    other = ({"ragged", "padded"} - {truth}).pop()
    assert of_decode["forms"][truth]["p90_rel_error"] == of_decode["p90_rel_error"] < 0.1
    assert of_decode["forms"][other]["p90_rel_error"] > 0.1
    assert of_decode["forms"][truth]["r2"] > of_decode["forms"][other]["r2"]


def test_one_long_context_among_short_ones_costs_its_own_length():
    """As found: 15 of 200 tokens and one of 1,900 took 88 ms, and 191 were predicted."""
    even, mixed = measured("ragged", MIXTURES)
    contexts = [200] * 15 + [1900]
    for form, ratio in (("ragged", 1.0), ("padded", 1.9)):
        # Without mixed batches the declared form is taken.
        found = fit(decode=even, form=form, buckets=BUCKETS)
        cost = CostModel.from_profile(found | {"kv_capacity_tokens": 1}, ["decode"])
        predicted_s = cost.decode_s(contexts)
        assert predicted_s == pytest.approx(ratio * seconds("ragged", contexts), rel=0.05)
    found = fit(decode=even, mixed=mixed, form="padded", buckets=BUCKETS)
    cost = CostModel.from_profile(found | {"kv_capacity_tokens": 1}, ["decode"])
    assert cost.decode_s(contexts) == pytest.approx(seconds("ragged", contexts), rel=0.02)


@pytest.mark.parametrize("declared", ["ragged", "padded"])
def test_where_contexts_cost_nothing_the_declared_form_is_used(declared):
    even, mixed = measured("ragged", MIXTURES, noise=0.05, token_s=0.0)
    assert (
        fit(decode=even, mixed=mixed, form=declared, buckets=BUCKETS)["decode"]["form"] == declared
    )


def profile_with(transfer_r2, samples=((256, 0.006), (512, 0.002))):
    """A profile whose transfer part has this R2."""
    made = fit(
        [(n, 0, 0.001 + n * 1e-5) for n in (64, 128, 256)],
        [(b, c, 0.01 + b * 1e-3 + b * c * 1e-6) for b in (1, 2, 8) for c in (64, 256)],
        [(256, 0.005), (512, 0.01)],
        buckets=[1, 2, 8],
    )
    made["fit"]["transfer"]["r2"] = transfer_r2
    return made | {"kv_capacity_tokens": 1000, "samples": {"transfer": [list(s) for s in samples]}}


def test_a_part_that_is_worse_than_the_mean_of_its_samples_is_left_out():
    profile = profile_with(-0.3)
    cost = CostModel.from_profile(usable(profile))
    assert cost.transfer_s(1) == cost.transfer_s(9999) == pytest.approx(0.004)
    whole = CostModel.from_profile(profile)
    assert (cost.prefill, cost.decode) == (whole.prefill, whole.decode)
    assert usable(profile)["fit"]["transfer"]["left_out"]
    assert "left_out" not in profile["fit"]["transfer"], "what is given stays as it is"
    assert usable(usable(profile)) == usable(profile)


@pytest.mark.parametrize("r2", [0.0, 0.4, 0.99, None])
def test_a_part_that_is_better_than_the_mean_stays(r2):
    assert usable(profile_with(r2)) == profile_with(r2)


def test_a_decode_part_that_is_left_out_takes_one_time_for_all_steps():
    profile = profile_with(0.9)
    profile["fit"]["decode"]["r2"] = -1.0
    profile["samples"] |= {"decode": [[1, 64, 0.01], [8, 64, 0.02]], "mixed": [[2, 128, 99, 0.03]]}
    cost = CostModel.from_profile(usable(profile))
    assert cost.decode_s([64]) == cost.decode_s([900] * 8) == pytest.approx(0.02)


def test_a_poor_part_is_named():
    assert warnings(profile_with(0.6)) == []
    assert warnings(profile_with(0.31)) == [
        "The step-time profile fits transfer poorly: R2 is 0.31, below 0.5. Decisions that depend "
        "on it may be wrong."
    ]
    for profile in (profile_with(-0.3), usable(profile_with(-0.3))):
        assert warnings(profile) == [
            "The step-time profile fits transfer poorly: R2 is -0.30. Below 0 it predicts worse "
            "than the mean of its samples, so it is left out of decisions: they take the mean, "
            "4 ms."
        ]


@pytest.mark.parametrize("samples", [None, 3, {"transfer": [[1, "x"]]}, {"transfer": [3]}, {}])
def test_without_samples_there_is_no_mean_to_take(samples):
    profile = profile_with(-0.3) | {"samples": samples}
    assert usable(profile) == profile
    (warning,) = warnings(profile)
    assert warning.endswith("R2 is -0.30, and there are no samples to take the mean of.")
    for odd in (None, 3, {"transfer": 3}, {"transfer": {"r2": "x"}}):
        assert usable(profile | {"fit": odd}) == profile | {"fit": odd}
        assert warnings(profile | {"fit": odd}) == []
