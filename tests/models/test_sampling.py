import functools

import jax
import numpy as np
import pytest

from models import sampling
from models.sampling import INVALID, SamplingInput

VOCAB = 50


def inputs(rows, **given):
    defaults = {
        "temperature": (0.0, np.float32),
        "top_k": (0, np.int32),
        "top_p": (1.0, np.float32),
        "min_p": (0.0, np.float32),
        "position": (0, np.int32),
        "logprobs": (False, np.bool_),
    }
    made = {
        name: np.broadcast_to(np.asarray(given.get(name, value), dtype), (rows,))
        for name, (value, dtype) in defaults.items()
    }
    seeds = np.broadcast_to(np.asarray(given.get("seed", 0), np.uint64), (rows,))
    halves = np.stack([seeds & 0xFFFFFFFF, seeds >> 32], axis=1).astype(np.uint32)
    return SamplingInput(**made, seed=halves)


draw = jax.jit(sampling.sample)


def sample(logits, finite=True, **given):
    rows = len(logits)
    finite = np.broadcast_to(finite, (rows,))
    return sampling.unpack(np.asarray(draw(logits, inputs(rows, **given), finite)))


def kept(logits, draws=4000, **given):
    """The tokens that ever come, over many positions."""
    rows = np.repeat(logits[None], draws, axis=0)
    return set(sample(rows, temperature=1.0, position=np.arange(draws), **given).token.tolist())


def logits_of(probabilities):
    return np.log(np.asarray(probabilities, np.float32))


def test_temperature_zero_takes_the_likeliest():
    logits = np.random.default_rng(0).normal(size=(7, VOCAB)).astype(np.float32)
    np.testing.assert_array_equal(sample(logits).token, logits.argmax(1))


def test_frequencies_follow_the_softmax():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    rows = np.repeat(logits_of(probabilities)[None], 20_000, axis=0)
    tokens = sample(rows, temperature=1.0, seed=3, position=np.arange(20_000)).token
    counts = np.bincount(tokens, minlength=4) / 20_000
    np.testing.assert_allclose(counts, probabilities, atol=0.015)


@pytest.mark.parametrize("block", [1, 4, 8, 64])
def test_given_tokens_are_scored_block_by_block(block, monkeypatch):
    monkeypatch.setattr(sampling, "_SCORED", block)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(12, 8)).astype(np.float32)
    head = rng.normal(size=(8, VOCAB)).astype(np.float32)
    targets = rng.integers(0, VOCAB, 12).astype(np.int32)
    targets[:4], targets[9:] = -1, -1
    packed = np.asarray(
        jax.jit(functools.partial(sampling.score, lambda x: x @ head))(hidden, targets)
    )
    if block < 8:
        assert not packed[:4].any(), "nothing is wanted of them"
    wanted = slice(4, 9)
    logprobs = np.asarray(jax.nn.log_softmax(hidden @ head))[wanted]
    got = sampling.unpack(packed[wanted])
    np.testing.assert_array_equal(got.token, targets[wanted])
    np.testing.assert_allclose(got.logprob, logprobs[np.arange(5), targets[wanted]], rtol=1e-5)
    np.testing.assert_allclose(got.top_logprobs, -np.sort(-logprobs)[:, :20], rtol=1e-5)


def test_filters_keep_what_they_should():
    logits = logits_of([0.4, 0.3, 0.2, 0.06, 0.04])
    assert kept(logits, top_k=2) == {0, 1}
    assert kept(logits, top_p=0.65) == {0, 1}
    assert kept(logits, top_p=0.75) == {0, 1, 2}
    assert kept(logits, top_p=1e-6) == {0}
    assert kept(logits, min_p=0.4) == {0, 1, 2}
    # top_p counts within what top_k has left: 0.4 of 0.7 is 0.57.
    assert kept(logits, top_k=2, top_p=0.55) == {0}
    assert kept(logits) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("k", [1, 3, 17, VOCAB, 10 * VOCAB])
def test_top_k_matches_a_sort(k):
    logits = np.random.default_rng(k).normal(size=VOCAB).astype(np.float32) * 0.1
    assert kept(logits, top_k=k) <= set(np.argsort(logits)[-k:].tolist())


def test_a_row_does_not_depend_on_the_batch_around_it():
    logits = np.random.default_rng(0).normal(size=(8, VOCAB)).astype(np.float32)
    how = {"temperature": 0.9, "top_p": 0.8, "seed": np.arange(8), "position": np.arange(8) * 3}
    together = sample(logits, **how).token
    alone = [
        sample(logits[i : i + 1], temperature=0.9, top_p=0.8, seed=i, position=3 * i).token[0]
        for i in range(8)
    ]
    np.testing.assert_array_equal(together, alone)


def test_greedy_rows_stay_greedy_beside_sampled_ones():
    logits = np.random.default_rng(0).normal(size=(4, VOCAB)).astype(np.float32)
    tokens = sample(logits, temperature=[0, 5, 0, 5], top_k=[0, 0, 3, 3]).token
    np.testing.assert_array_equal(tokens[[0, 2]], logits.argmax(1)[[0, 2]])


def test_logprobs_are_the_models_own():
    logits = np.random.default_rng(0).normal(size=(3, VOCAB)).astype(np.float32)
    got = sample(logits, temperature=0.3, logprobs=True, seed=[1, 2, 3])
    expected = np.asarray(jax.nn.log_softmax(logits))
    rows = np.arange(3)
    np.testing.assert_allclose(got.logprob, expected[rows, got.token], rtol=1e-6)
    np.testing.assert_array_equal(got.top_tokens[:, 0], logits.argmax(1))
    np.testing.assert_allclose(got.top_logprobs[:, :20], -np.sort(-expected)[:, :20], rtol=1e-6)


@pytest.mark.parametrize(
    "how",
    [
        {"top_p": 1e-40},  # below the least f32 that is not subnormal
        {"top_p": 1e-45},
        {"top_p": 1e-38, "top_k": 3},
        {"top_p": 1e-40, "min_p": 1.0},
        {"min_p": 1.0},
        {"min_p": np.nextafter(np.float32(1), np.float32(0))},
        {"top_k": 1},
        {"top_k": 1, "top_p": 1e-40, "min_p": 1.0},
    ],
)
def test_the_likeliest_token_is_kept_however_little_is(how):
    assert kept(logits_of([0.2, 0.1, 0.4, 0.3]), draws=50, **how) == {2}


def test_limits_that_keep_all_keep_all():
    logits = logits_of([0.2, 0.1, 0.4, 0.3])
    for how in ({"top_k": 2**31 - 1}, {"top_p": 1 - 1e-7}, {"min_p": 1e-40}):
        assert kept(logits, **how) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 1e30, 3e38])
@pytest.mark.parametrize("scale", [1.0, 1e30, 3e37])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_extremes_of_temperature_give_tokens(temperature, scale, top_p):
    logits = np.random.default_rng(0).normal(size=(20, VOCAB)).astype(np.float32) * scale
    got = sample(logits, temperature=temperature, top_p=top_p, position=np.arange(20)).token
    assert ((got >= 0) & (got < VOCAB)).all()
    if temperature <= 1e-6 and scale > 1:
        np.testing.assert_array_equal(got, logits.argmax(1))


def test_seeds_differ_in_all_of_their_64_bits():
    logits = np.zeros((1, VOCAB), np.float32)
    seeds = [0, 1, 2**64 - 1, 2**32, 2**32 - 1, 2**63, *(1 << bit for bit in range(2, 64))]
    drawn = set()
    for seed in set(seeds):
        rows = np.repeat(logits, 24, axis=0)
        tokens = sample(rows, temperature=1.0, seed=seed, position=np.arange(24)).token
        drawn.add(tuple(tokens.tolist()))
    assert len(drawn) == len(set(seeds))


@pytest.mark.parametrize("count", [1, 50, 4097])
def test_random_numbers_are_those_of_jax(count):
    rng = np.random.default_rng(count)
    seeds = rng.integers(0, 2**64, 9, np.uint64)
    positions = rng.integers(0, 2**31, 9)

    def expected(halves, position):
        key = jax.random.wrap_key_data(halves[::-1], impl="threefry2x32")
        tiny = np.finfo(np.float32).tiny
        return jax.random.uniform(jax.random.fold_in(key, position), (count,), minval=tiny)

    how = inputs(9, seed=seeds, position=positions)
    made = jax.jit(sampling._uniform, static_argnums=1)(how, count)
    np.testing.assert_array_equal(made, jax.vmap(expected)(how.seed, how.position))


def test_a_seed_of_32_bits_is_the_key_that_jax_makes_of_it():
    key = jax.random.fold_in(jax.random.key(7), 3)
    noise = jax.random.gumbel(key, (VOCAB,), np.float32)
    got = sample(np.zeros((1, VOCAB), np.float32), temperature=1.0, seed=7, position=3)
    assert got.token[0] == np.argmax(noise)


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_row_that_is_not_finite_gives_no_token(temperature, top_p, logprobs):
    good = np.random.default_rng(0).normal(size=(VOCAB,)).astype(np.float32)
    rows = np.repeat(good[None], 7, axis=0)
    rows[1, 7] = np.nan
    rows[2, [3, 9]] = -np.nan, np.inf
    rows[3, 5] = np.inf
    rows[4] = -np.inf
    rows[5, 1:] = -np.inf  # the usual form of "never"
    how = {"temperature": temperature, "top_p": top_p, "logprobs": logprobs, "seed": 3}
    finite = np.array([True] * 6 + [False])
    got, alone = sample(rows, finite=finite, **how), sample(good[None], **how)
    assert (got.token[[1, 2, 3, 4, 6]] == INVALID).all()
    assert got.token[0] == alone.token[0]
    assert got.token[5] == 0
    if logprobs:
        assert got.logprob[0] == alone.logprob[0]


def test_the_likeliest_are_as_many_as_were_asked_for_whatever_is_sampled():
    logits = np.random.default_rng(0).normal(size=(50, VOCAB)).astype(np.float32)
    got = sample(logits, temperature=5.0, logprobs=True, position=np.arange(50))
    order = np.argsort(-logits, axis=1)[:, :20]
    assert (got.token[:, None] != order[:, :5]).all(axis=1).any(), "some were not likely"
    np.testing.assert_array_equal(got.top_tokens, order)
