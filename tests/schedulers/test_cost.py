"""Cost model: the arithmetic by hand, and the errors."""

import math

import pytest

from schedulers.cost import CostModel

PROFILE = {
    "prefill": {"base_s": 1.0, "per_token_s": 0.1, "per_token_sq_s": 0.01},
    "decode": {"base_s": 1.0, "per_seq_s": 0.5, "per_context_token_s": 0.1, "form": "ragged"},
    "transfer": {"base_s": 2.0, "per_token_s": 0.25},
    "kv_capacity_tokens": 1000,
}


def profile(**changes):
    return PROFILE | {
        name: PROFILE.get(name, {}) | change if isinstance(change, dict) else change
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
    both = {"per_seq_s": 0.3, "per_context_token_s": 0.02}
    cost = CostModel.from_profile(profile(prefill=both))
    chunks, done = [], 0
    while done < num_tokens:
        chunks.append((min(8, num_tokens - done), computed + done))
        done += chunks[-1][0]
    whole = cost.prompt_s(num_tokens, computed, max_chunk=8)
    assert whole == pytest.approx(sum(cost.prefill_s(*chunk) for chunk in chunks))


STEP = {
    "base_s": 1.0,
    "per_token_s": 0.1,
    "per_pair_s": 0.02,
    "per_seq_s": 0.5,
    "per_context_token_s": 0.03,
}
BOTH = {"step": STEP, "transfer": PROFILE["transfer"], "kv_capacity_tokens": 1000}


def test_an_instance_that_does_both_has_one_row():
    cost = CostModel.from_profile(BOTH)
    assert cost.prefill == cost.decode
    # 10 tokens after 5: 10 * 5 + 10 * 10 / 2 pairs, a context of 15.
    assert cost.prefill_s(10, computed=5) == pytest.approx(1 + 1 + 0.02 * 100 + 0.5 + 0.03 * 15)
    assert cost.decode_s([10, 20]) == pytest.approx(1 + 2 * (0.1 + 0.5) + (0.02 + 0.03) * 30)
    assert cost.shared_s == 1.0
    scaled = cost.scaled(2)
    assert scaled.prefill_s(10, 5) == pytest.approx(2 * cost.prefill_s(10, 5))
    assert scaled.decode_s([10, 20]) == pytest.approx(2 * cost.decode_s([10, 20]))


def test_a_row_of_one_job_goes_before_that_of_both():
    cost = CostModel.from_profile(BOTH | {"decode": PROFILE["decode"]})
    assert cost.decode == CostModel.from_profile(PROFILE).decode
    assert cost.prefill == CostModel.from_profile(BOTH).prefill


def test_older_files_count_the_square_of_a_chunk():
    """A token of a chunk attends to half of the chunk, on the average."""
    newer = {"base_s": 1.0, "per_token_s": 0.1, "per_pair_s": 0.02}
    cost = CostModel.from_profile(PROFILE | {"prefill": newer})
    assert cost == CostModel.from_profile(PROFILE)


def test_decode_ragged_and_padded():
    assert CostModel.from_profile(PROFILE).decode_s([10, 20, 30]) == pytest.approx(1 + 1.5 + 6)
    padded = profile(decode={"form": "padded"})
    assert CostModel.from_profile(padded).decode_s([10, 20, 30]) == pytest.approx(1 + 1.5 + 9)
    bucketed = CostModel.from_profile(profile(decode={"form": "padded", "buckets": [4, 1, 2]}))
    assert bucketed.decode_s([10, 20, 30]) == pytest.approx(1 + 2 + 12)
    assert bucketed.decode_s([10] * 5) == pytest.approx(1 + 2.5 + 5), "above the largest bucket"
    assert bucketed.decode_s([]) == 0


def test_a_ragged_step_may_compute_a_bucket_of_sequences():
    """Each context at its own length all the same."""
    ragged = {"buckets": [4, 1, 2], "factors": [2.0, 1.0, 1.0]}
    cost = CostModel.from_profile(profile(decode=ragged))
    assert cost.decode_s([10, 20, 30]) == pytest.approx(2 * (1 + 2 + 6))
    assert cost.decode_s([10, 20]) == pytest.approx(1 + 1 + 3)


def test_in_old_ragged_profiles_buckets_do_not_count():
    cost = CostModel.from_profile(profile(decode={"buckets": [1, 2, 4]}))
    assert cost.decode_s([10, 20, 30]) == CostModel.from_profile(PROFILE).decode_s([10, 20, 30])


def test_no_step_is_shorter_than_its_base():
    assert CostModel.from_profile(PROFILE).decode_base_s == 1.0
    bucketed = profile(decode={"form": "padded", "buckets": [1, 2], "factors": [0.8, 1.0]})
    assert CostModel.from_profile(bucketed).decode_base_s == 0.8


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
        ({"prefill": {"per_token_sq_s": -1}}, "prefill.per_token_sq_s"),
        ({"prefill": {"per_seq_s": -1}}, "prefill.per_seq_s"),
        ({"step": {"base_s": 1.0}, "prefill": None}, "prefill must be a table"),
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


@pytest.mark.parametrize("name", STEP)
def test_a_row_of_both_must_be_whole(name):
    step = {key: value for key, value in STEP.items() if key != name}
    with pytest.raises(ValueError, match=f"step.{name} must be finite"):
        CostModel.from_profile(BOTH | {"step": step})
