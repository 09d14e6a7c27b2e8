"""The model against Hugging Face transformers, and against itself in other cuts and shardings."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoint import open_checkpoint
from models.kv_cache import StepInput, abstract, allocate
from models.ops import KERNELS, on_mesh
from models.params import pack, pack_config
from models.sharding import Rules, make_mesh
from models.transformer import all_finite, forward, hidden_states

PAGE, PAGES = 16, 8  # tokens a page, pages a sequence
RULES = Rules()

step_fn = jax.jit(forward, static_argnums=(0, 4), donate_argnums=2)


def load(directory, num_devices, dtype=jnp.float32, name="reference", rules=RULES):
    """(one step, empty cache for R sequences): the model on so many devices."""
    config, params, kernels, sharding = on_devices(directory, num_devices, dtype, name, rules)

    def run(cache, tokens, start, count):
        rows = len(tokens)
        table = jnp.arange(rows * PAGES, dtype=jnp.int32).reshape(rows, PAGES)
        step = StepInput(*(jnp.asarray(x, jnp.int32) for x in (tokens, start, count)), table)
        return step_fn(config, params, cache, step, kernels)

    return run, lambda rows: allocate(
        abstract(config, kernels.layout, rows * PAGES, PAGE, dtype, sharding)
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


def padded(prompts):
    width = max(map(len, prompts))
    return [prompt + [0] * (width - len(prompt)) for prompt in prompts]


def cases(directory):
    return json.loads((directory / "golden.json").read_text())["cases"]


@pytest.mark.parametrize(
    ("family", "num_devices", "kernels"),
    [
        *itertools.product(["llama", "mistral", "qwen2", "qwen3"], [1, 2], ["reference"]),
        ("llama", 2, "gpu"),
        ("llama", 2, "gpu_triton"),
    ],
)
def test_greedy_tokens_are_those_of_transformers(golden, family, num_devices, kernels):
    expected = cases(golden / family)
    run, empty = load(golden / family, num_devices, name=kernels)
    prompts = [case["prompt"] for case in expected]
    lengths = np.array([len(prompt) for prompt in prompts])
    logits, cache = run(empty(len(prompts)), padded(prompts), np.zeros_like(lengths), lengths)
    for case, row in zip(expected, logits, strict=True):
        np.testing.assert_allclose(
            row[np.array(case["top"]["ids"])], case["top"]["logits"], rtol=1e-4, atol=1e-4
        )
    tokens = [np.argmax(logits, -1)]
    for index in range(31):
        logits, cache = run(cache, tokens[-1][:, None], lengths + index, np.ones_like(lengths))
        tokens.append(np.argmax(logits, -1))
    assert np.stack(tokens, 1).tolist() == [case["output"] for case in expected]


@pytest.fixture(scope="module")
def whole(tiny_llama):
    """The longest prompt, and its logits on one device in one step."""
    run, empty = load(tiny_llama, 1)
    prompt = cases(tiny_llama)[-1]["prompt"]
    logits, _ = run(empty(1), [prompt], [0], [len(prompt)])
    return prompt, np.asarray(logits)


def test_a_prompt_in_chunks_gives_the_same_logits(tiny_llama, whole):
    prompt, expected = whole
    run, empty = load(tiny_llama, 1)
    cache = empty(1)
    for start in range(0, len(prompt), 24):
        chunk = prompt[start : start + 24]
        row = [chunk + [0] * (24 - len(chunk))]
        logits, cache = run(cache, row, [start], [len(chunk)])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_rows_of_padding_change_nothing(tiny_llama, whole):
    prompt, expected = whole
    run, empty = load(tiny_llama, 1)
    rows = [[0] * len(prompt), prompt, prompt]
    logits, _ = run(empty(3), rows, [0, 0, 0], [0, len(prompt), 5])
    np.testing.assert_allclose(logits[1], expected[0], rtol=1e-4, atol=1e-4)
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
    logits, cache = run(empty(1), [prompt], [0], [len(prompt)])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert cache[0].k.sharding.shard_shape(cache[0].k.shape)[1] == kv_heads


def test_bfloat16_gives_f32_logits_that_are_near(tiny_llama, whole):
    prompt, expected = whole
    run, empty = load(tiny_llama, 1, jnp.bfloat16)
    logits, cache = run(empty(1), [prompt], [0], [len(prompt)])
    assert logits.dtype == jnp.float32
    assert cache[0].k.dtype == jnp.bfloat16
    error = np.abs(np.asarray(logits) - expected).mean() / expected.std()
    assert error < 0.1


BAD = 200  # a token whose embedding is not finite


def stepper(directory, kernels, weight, value, at=0):
    """A step with one number of the weights replaced, and an empty cache for it. A step takes
    (tokens, start, page) of each row, and gives hidden states, which rows are finite, the cache.
    """
    config, params, on_mesh, _ = on_devices(directory, 1, jnp.float32, kernels)
    place = (at,) + (0,) * (params[weight].ndim - 1)
    params = {**params, weight: params[weight].at[place].set(value)}

    @jax.jit
    def step(cache, tokens, start, count, table):
        inputs = StepInput(tokens, start, count, table)
        hidden, cache = hidden_states(config, params, cache, inputs, on_mesh)
        return hidden, all_finite(hidden, inputs), cache

    def run(cache, rows, queries):
        tokens = np.zeros((len(rows), queries), np.int32)
        for row, (ids, _, _) in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        counts = np.array([len(ids) for ids, _, _ in rows], np.int32)
        starts = np.array([start for _, start, _ in rows], np.int32)
        table = np.zeros((len(rows), 2), np.int32)  # as of a worker: page 0 where there is no more
        table[:, 0] = [page for _, _, page in rows]
        hidden, finite, cache = step(cache, tokens, starts, counts, table)
        return np.asarray(hidden), finite.tolist(), cache

    return run, allocate(abstract(config, KERNELS[kernels].layout, 4, PAGE, jnp.float32))


def test_what_is_not_finite_stays_with_its_own_row(tiny_llama, kernels):
    """Kernels read whole pages of what a row does not see, and 0 * NaN is NaN."""
    run, empty = stepper(tiny_llama, kernels, "embed", np.nan, at=BAD)
    prompt = [5, 9, 17, 4, 30]
    count = len(prompt)
    hidden, finite, cache = run(empty, [([7], 0, 0), (prompt, 0, 1)], 8)
    assert finite == [True, True]
    expected = hidden[1, :count]
    hidden, _, _ = run(cache, [([7], 1, 0), ([11], count, 1)], 1)
    following = hidden[1]

    def check(got, what):
        np.testing.assert_allclose(got, what, atol=1e-4)

    # Beside a bad one, whose page the prompt's table is filled up with.
    long = [7] * 7 + [BAD]
    hidden, finite, cache = run(empty, [(long, 0, 0), (prompt, 0, 1)], 8)
    assert finite == [False, True]
    check(hidden[1, :count], expected)
    hidden, finite, cache = run(cache, [([BAD], PAGE, 0), ([11], count, 1)], 1)
    assert finite == [False, True]
    check(hidden[1], following)
    # In the page that it has left behind; and padding is not looked at.
    hidden, finite, _ = run(cache, [(prompt, 0, 0), ([], 0, 2)], 8)
    assert finite == [True, True]
    check(hidden[0, :count], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["q", "k", "v", "o"])
def test_a_bad_weight_shows_in_every_row(tiny_llama, part, value):
    """That keys and values of it are kept out of the pool must not hide it."""
    run, empty = stepper(tiny_llama, "cpu", f"layers.0.attention.{part}", value)
    _, finite, cache = run(empty, [([7, 8], 0, 0), ([5, 9, 17], 0, 1)], 4)
    assert finite == [False, False]
    for layer in cache:
        assert all(bool(jnp.isfinite(array).all()) for array in layer)
