"""Cost model: the arithmetic by hand, the errors, and that a fit finds what made the samples."""

import math

import numpy as np
import pytest

from schedulers.cost import CostModel, fit

PROFILE = {
    "prefill": {"base_s": 1.0, "per_token_s": 0.1, "per_token_sq_s": 0.01},
    "decode": {"base_s": 1.0, "per_seq_s": 0.5, "per_context_token_s": 0.1, "form": "ragged"},
    "transfer": {"base_s": 2.0, "per_token_s": 0.25},
    "kv_capacity_tokens": 1000,
}


def profile(**changes):
    return PROFILE | {
        name: PROFILE[name] | change if isinstance(change, dict) else change
        for name, change in changes.items()
    }


def test_prefill():
    cost = CostModel.from_profile(PROFILE)
    assert cost.prefill_s(10) == pytest.approx(1 + 1 + 1)
    assert cost.prefill_s(10, computed=5) == pytest.approx(1 + 1 + 0.01 * (15**2 - 5**2))
    assert cost.prefill_step_s([(10, 0), (10, 5)]) == pytest.approx(1 + 2 + 3)
    assert cost.prefill_step_s([]) == 0


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 16, 23, 24])
@pytest.mark.parametrize("computed", [0, 8])
def test_a_prompt_costs_what_its_chunks_cost(num_tokens, computed):
    cost = CostModel.from_profile(profile(prefill={"row_tokens": 4}))
    chunks, done = [], 0
    while done < num_tokens:
        chunks.append((min(8, num_tokens - done), computed + done))
        done += chunks[-1][0]
    whole = cost.prompt_s(num_tokens, computed, max_chunk=8)
    assert whole == pytest.approx(sum(cost.prefill_s(*chunk) for chunk in chunks))


def test_prefill_rows_are_padded():
    cost = CostModel.from_profile(profile(prefill={"row_tokens": 64}))
    assert cost.prefill_s(1) == cost.prefill_s(64) < cost.prefill_s(65)


def test_decode_ragged_and_padded():
    assert CostModel.from_profile(PROFILE).decode_s([10, 20, 30]) == pytest.approx(1 + 1.5 + 6)
    padded = profile(decode={"form": "padded"})
    assert CostModel.from_profile(padded).decode_s([10, 20, 30]) == pytest.approx(1 + 1.5 + 9)
    bucketed = CostModel.from_profile(profile(decode={"form": "padded", "buckets": [4, 1, 2]}))
    assert bucketed.decode_s([10, 20, 30]) == pytest.approx(1 + 2 + 12)
    assert bucketed.decode_s([10] * 5) == pytest.approx(1 + 2.5 + 5), "above the largest bucket"
    assert bucketed.decode_s([]) == 0


def test_transfer():
    assert CostModel.from_profile(PROFILE).transfer_s(8) == 4


@pytest.mark.parametrize("kind", ["prefill", "decode", "transfer"])
@pytest.mark.parametrize("value", [None, -1.0, math.nan, math.inf, "1", True])
def test_a_bad_coefficient_is_named(kind, value):
    with pytest.raises(ValueError, match=f"{kind}.base_s"):
        CostModel.from_profile(profile(**{kind: {"base_s": value}}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"decode": {"form": "square"}}, "decode.form"),
        ({"decode": {"buckets": [0]}}, "decode.buckets"),
        ({"decode": {"buckets": 8}}, "decode.buckets"),
        ({"decode": {"buckets": [1, 2], "factors": [1.0]}}, "decode.factors"),
        ({"decode": {"buckets": [1], "factors": [0.0]}}, "decode.factors"),
        ({"decode": {"factors": 1.0}}, "decode.factors"),
        ({"prefill": {"row_tokens": 0}}, "prefill.row_tokens"),
        ({"kv_capacity_tokens": 1.5}, "kv_capacity_tokens"),
        ({"transfer": None}, "transfer"),
    ],
)
def test_a_bad_entry_is_named(changes, named):
    with pytest.raises(ValueError, match=named):
        CostModel.from_profile(profile(**changes))


def test_what_one_role_needs_is_enough_for_it_and_the_rest_is_no_answer():
    of_prefill = {k: v for k, v in PROFILE.items() if k in ("prefill", "kv_capacity_tokens")}
    cost = CostModel.from_profile(of_prefill, ["prefill"])
    assert cost.prefill_s(3) == CostModel.from_profile(PROFILE).prefill_s(3)
    assert math.isnan(cost.decode_s([10]))
    assert math.isnan(cost.transfer_s(10))
    assert CostModel.from_profile(PROFILE, ["prefill"]).decode_s([10]) > 0, "taken if it is there"
    with pytest.raises(ValueError, match="profile decode must be a table"):
        CostModel.from_profile(of_prefill, ["decode"])


def test_fit_leaves_out_what_was_not_measured():
    found = fit(decode=[(1, 1, 1.0), (2, 1, 2.0)], form="padded", buckets=[1, 2])
    assert set(found) == {"decode", "fit"}
    assert set(found["fit"]) == {"decode"}
    assert set(fit(prefill=[(1, 0, 1.0)])) == {"prefill", "fit"}


@pytest.mark.parametrize("form", ["ragged", "padded"])
def test_fit_recovers_the_coefficients(form):
    truth = {
        "prefill": {"base_s": 5e-3, "per_token_s": 3e-5, "per_token_sq_s": 7e-10, "row_tokens": 64},
        "decode": {"base_s": 7e-3, "per_seq_s": 2e-5, "per_context_token_s": 6e-8, "form": form},
        "transfer": {"base_s": 2e-3, "per_token_s": 5e-6},
        "kv_capacity_tokens": 1000,
    }
    truth["decode"]["buckets"] = [1, 8, 64, 256]
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
        row_tokens=64,
    )
    for kind in ("prefill", "decode", "transfer"):
        for name in (name for name in truth[kind] if name.endswith("_s")):
            value = truth[kind][name]
            assert found[kind][name] == pytest.approx(value, rel=0.15), (kind, name)
        residual = found["fit"][kind]
        assert residual["r2"] > 0.99
        assert 0 < residual["p50_rel_error"] < residual["p90_rel_error"] < 0.06
    assert CostModel.from_profile(truth | found).decode.form == form


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
