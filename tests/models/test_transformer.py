"""The model against Hugging Face transformers, and against itself in other cuts and shardings."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import packed

from models.checkpoint import open_checkpoint
from models.kv_cache import abstract, allocate
from models.ops import KERNELS, on_mesh
from models.params import pack, pack_config
from models.sharding import Rules, make_mesh
from models.transformer import all_finite, forward, hidden_states

PAGE, PAGES, SEQUENCES = 16, 8, 6  # tokens a page, pages a sequence, sequences of a pool
RULES = Rules()

step_fn = jax.jit(forward, static_argnums=(0, 4), donate_argnums=2)


def load(directory, num_devices, dtype=jnp.float32, name="reference", rules=RULES):
    """(one step, an empty cache): the model on so many devices. A step takes a cache, parts, and
    all tokens of each sequence (tests/support/steps.py).
    """
    config, params, kernels, sharding = on_devices(directory, num_devices, dtype, name, rules)

    def run(cache, parts, tokens, size=None):
        tables = np.arange(SEQUENCES * PAGES).reshape(SEQUENCES, PAGES)
        step = packed(parts, tables, PAGE, SEQUENCES * PAGES, size, tokens)
        return step_fn(config, params, cache, step, kernels)

    return run, lambda: allocate(
        abstract(config, kernels.layout, SEQUENCES * PAGES, PAGE, dtype, sharding)
    )


def on_devices(directory, num_devices, dtype, name, rules=RULES):
    """The config, weights, kernels, and shardings of a layer's cache, as `forward` takes them."""
    checkpoint, kernels = open_checkpoint(directory), KERNELS[name]
    mesh = make_mesh(jax.devices()[:num_devices])
    params = checkpoint.load(mesh, rules, dtype)
    params = pack(checkpoint.config, params, kernels, mesh, rules)
    config = pack_config(checkpoint.config, kernels, mesh, rules)
    sharding = kernels.layout.shardings(config, mesh, rules)
    return config, params, on_mesh(kernels, config, mesh, rules), sharding


def cases(directory):
    return json.loads((directory / "golden.json").read_text())["cases"]


@pytest.mark.parametrize(
    ("family", "num_devices", "kernels"),
    [
        *itertools.product(["llama", "mistral", "qwen2", "qwen3"], [1, 2], ["reference"]),
        ("llama", 2, "gpu"),
    ],
)
def test_greedy_tokens_are_those_of_transformers(golden, family, num_devices, kernels):
    expected = cases(golden / family)
    run, empty = load(golden / family, num_devices, name=kernels)
    sequences = [list(case["prompt"]) for case in expected]
    lengths = [len(prompt) for prompt in sequences]
    parts = [(index, 0, length) for index, length in enumerate(lengths)]
    logits, cache = run(empty(), parts, sequences)
    for case, row in zip(expected, logits, strict=True):
        np.testing.assert_allclose(
            row[np.array(case["top"]["ids"])], case["top"]["logits"], rtol=1e-4, atol=1e-4
        )
    for index in range(32):
        for sequence, token in zip(sequences, np.argmax(logits, -1).tolist(), strict=True):
            sequence.append(token)
        parts = [(at, length + index, 1) for at, length in enumerate(lengths)]
        logits, cache = run(cache, parts, sequences)
    outputs = [tokens[length:] for tokens, length in zip(sequences, lengths, strict=True)]
    assert outputs == [case["output"] for case in expected]


@pytest.fixture(scope="module")
def whole(tiny_llama):
    """The longest prompt, and its logits on one device in one step."""
    run, empty = load(tiny_llama, 1)
    prompt = cases(tiny_llama)[-1]["prompt"]
    logits, _ = run(empty(), [(0, 0, len(prompt))], [prompt])
    return prompt, np.asarray(logits)


def test_a_prompt_in_chunks_gives_the_same_logits(tiny_llama, whole):
    prompt, expected = whole
    run, empty = load(tiny_llama, 1)
    cache = empty()
    for start in range(0, len(prompt), 24):
        count = min(24, len(prompt) - start)
        logits, cache = run(cache, [(0, start, count)], [prompt], (24, 1))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_padding_and_others_change_nothing(tiny_llama, whole):
    """A chunk, a whole prompt and a decode step in one."""
    prompt, expected = whole
    run, empty = load(tiny_llama, 1)
    tokens = [prompt, prompt, prompt]
    _, cache = run(empty(), [(0, 0, 9), (2, 0, len(prompt) - 1)], tokens, (128, 4))
    parts = [(0, 9, 7), (1, 0, len(prompt)), (2, len(prompt) - 1, 1)]
    logits, _ = run(cache, parts, tokens, (128, 4))
    for row in (1, 2):
        np.testing.assert_allclose(logits[row], expected[0], rtol=1e-4, atol=1e-4)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("num_devices", "rules", "kv_heads"),
    [
        (3, RULES, 4),
        (4, RULES, 3),
        (8, RULES, 3),  # of 24, which are two copies of each
        (5, Rules(vocab=None, heads=None, kv_heads=None, mlp=None), 12),
    ],
)
def test_tensor_parallel_gives_the_same_logits(tiny_llama, whole, num_devices, rules, kv_heads):
    prompt, expected = whole
    run, empty = load(tiny_llama, num_devices, rules=rules)
    logits, cache = run(empty(), [(0, 0, len(prompt))], [prompt])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert cache[0].k.sharding.shard_shape(cache[0].k.shape)[1] == kv_heads


def test_bfloat16_gives_f32_logits_that_are_near(tiny_llama, whole):
    prompt, expected = whole
    run, empty = load(tiny_llama, 1, jnp.bfloat16)
    logits, cache = run(empty(), [(0, 0, len(prompt))], [prompt])
    assert logits.dtype == jnp.float32
    assert cache[0].k.dtype == jnp.bfloat16
    error = np.abs(np.asarray(logits) - expected).mean() / expected.std()
    assert error < 0.1


BAD = 200  # a token whose embedding is not finite


def stepper(directory, kernels, weight, value, at=0):
    """A step with one number of the weights replaced, and an empty cache for it. A step takes
    (tokens, start, page) of each sequence, and gives each one's hidden states and whether they are
    finite, and the cache.
    """
    config, params, on_mesh, _ = on_devices(directory, 1, jnp.float32, kernels)
    place = (at,) + (0,) * (params[weight].ndim - 1)
    params = {**params, weight: params[weight].at[place].set(value)}

    @jax.jit
    def step(cache, inputs):
        hidden, cache = hidden_states(config, params, cache, inputs, on_mesh)
        return hidden, all_finite(hidden, inputs), cache

    def run(cache, rows, size=(16, 2)):
        # As of a worker: page 0 where there is no more.
        tables = np.array([[page, 0] for _, _, page in rows])
        parts = [(index, start, len(ids)) for index, (ids, start, _) in enumerate(rows)]
        tokens = [[0] * start + list(ids) for ids, start, _ in rows]
        hidden, finite, cache = step(cache, packed(parts, tables, PAGE, 4, size, tokens))
        ends = np.cumsum([len(ids) for ids, _, _ in rows])
        return np.split(np.asarray(hidden), ends), finite.tolist(), cache

    return run, allocate(abstract(config, KERNELS[kernels].layout, 4, PAGE, jnp.float32))


def test_what_is_not_finite_stays_with_its_own_sequence(tiny_llama, kernels):
    """Kernels read whole pages of what a token does not see, and 0 * NaN is NaN."""
    run, empty = stepper(tiny_llama, kernels, "embed", np.nan, at=BAD)
    prompt = [5, 9, 17, 4, 30]
    count = len(prompt)
    hidden, finite, cache = run(empty, [([7], 0, 0), (prompt, 0, 1)])
    assert finite == [True, True]
    expected = hidden[1]
    hidden, _, _ = run(cache, [([7], 1, 0), ([11], count, 1)], (2, 2))
    following = hidden[1]

    def check(got, what):
        np.testing.assert_allclose(got, what, atol=1e-4)

    # Beside a bad one, whose page the prompt's table is filled up with.
    long = [7] * 7 + [BAD]
    for rows, which in (([(long, 0, 0), (prompt, 0, 1)], 1), ([(prompt, 0, 1), (long, 0, 0)], 0)):
        hidden, finite, cache = run(empty, rows)
        assert finite == [at == which for at in range(2)]
        check(hidden[which], expected)
    hidden, finite, cache = run(cache, [([BAD], PAGE, 0), ([11], count, 1)], (2, 2))
    assert finite == [False, True]
    check(hidden[1], following)
    # In the page that it has left behind; and padding is not looked at.
    hidden, finite, _ = run(cache, [(prompt, 0, 0)])
    assert finite == [True, True]
    check(hidden[0], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["q", "k", "v", "o"])
def test_a_bad_weight_shows_in_every_sequence(tiny_llama, part, value):
    """That keys and values of it are kept out of the pool must not hide it."""
    run, empty = stepper(tiny_llama, "cpu", f"layers.0.attention.{part}", value)
    _, finite, cache = run(empty, [([7, 8], 0, 0), ([5, 9, 17], 0, 1)])
    assert finite == [False, False]
    for layer in cache:
        assert all(bool(jnp.isfinite(array).all()) for array in layer)
