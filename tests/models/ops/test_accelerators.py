"""The kernels for GPU and TPU as far as they go without one: against the reference in interpret
mode, against JAX's own reference, and compiled for the platform up to what its compiler is given.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import packed

from models.config import ModelConfig
from models.ops import KERNELS, attention_hopper, attention_tpu

REFERENCE = KERNELS["reference"]
SHAPES = {"llama3_8b": (32, 8, 128), "smollm2_135m": (9, 3, 64)}


def described(heads, kv_heads, head_dim):
    return ModelConfig("llama", 8, 8, 1, heads, kv_heads, head_dim, 8)


def problem(config, parts, page_size, table_pages, size=None, dtype=np.float32, seed=0):
    """(q, k, v, the pool in wire form, step): sequences that share no page."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    heads, kv, head = config.num_heads, config.num_kv_heads, config.head_dim
    sequences = max(max((sequence for sequence, *_ in parts), default=0) + 1, 1)
    num_pages = sequences * table_pages
    tables = rng.permutation(num_pages).reshape(sequences, table_pages)
    step = packed(parts, tables, page_size, num_pages, size)
    wire = normal(num_pages * page_size, kv, 2, head)
    q, k, v = (normal(step.tokens.shape[0], n, head) for n in (heads, kv, kv))
    return q, k, v, wire, step


def run(kernels, attention, config, pages, q, k, v, wire, step):
    layer = kernels.layout.zeros(config, pages, wire.shape[0] // pages, wire.dtype)
    layer = kernels.layout.write(layer, jnp.arange(pages), wire)
    return np.asarray(attention(q, k, v, layer, step)[0], np.float32)


def check(name, attention, config, inputs, page_size, atol):
    """Against the reference in float32, whatever the inputs are in."""
    pages, real = inputs[3].shape[0] // page_size, int(inputs[4].num_tokens)
    got = run(KERNELS[name], attention, config, pages, *inputs)
    wide = [x.astype(jnp.float32) for x in inputs[:4]]
    exact = run(REFERENCE, jax.jit(REFERENCE.attention), config, pages, *wide, inputs[4])
    np.testing.assert_allclose(got[:real], exact[:real], atol=atol)
    assert np.isfinite(got).all(), "padding is finite too"


@pytest.mark.parametrize("name", ["gpu", "gpu_hopper", "tpu"])
def test_what_the_kernels_leave_is_gathered(name):
    """Three kv heads of 160 dimensions in float32, which no kernel takes."""
    config = described(6, 3, 160)
    for parts, size in (
        ([(0, 590, 1), (1, 3, 1), (2, 15, 1)], (4, 4)),
        ([(0, 100, 150), (1, 0, 1), (2, 16, 40)], (256, 4)),
    ):
        inputs = problem(config, parts, 16, 37, size)
        check(name, jax.jit(KERNELS[name].attention), config, inputs, 16, 2e-6)


def interpreted():
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


HOPPER = functools.partial(attention_hopper.attention, interpret=interpreted())


@pytest.mark.parametrize(
    ("shape", "splits"),
    [
        ((8, 2, 128), 1),
        pytest.param((9, 3, 64), 1, marks=pytest.mark.slow),
        ((6, 1, 80), 2),
    ],
)
def test_the_kernel_for_hopper_decodes_a_ragged_batch(shape, splits, monkeypatch):
    """Contexts of one token, at and around the edges of pages, and padding."""
    monkeypatch.setattr(attention_hopper, "_splits", lambda blocks, pages: splits)
    config, page_size = described(*shape), 64
    parts = [(i, at, 1) for i, at in enumerate((0, 62, 63, 64, 127, 190, 191))]
    inputs = problem(config, parts, page_size, 3, (8, 8), jnp.bfloat16)
    assert attention_hopper.takes(jnp.bfloat16, shape[2], page_size)
    check("gpu_hopper", HOPPER, config, inputs, page_size, 0.02)


@pytest.mark.parametrize(
    ("shape", "seed"),
    [
        ((8, 2, 128), 0),
        pytest.param((8, 2, 128), 1, marks=pytest.mark.slow),
        ((9, 3, 64), 2),
        pytest.param((4, 4, 128), 3, marks=pytest.mark.slow),
    ],
)
def test_the_kernel_for_hopper_takes_random_ragged_batches(shape, seed):
    """Decodes, chunks that begin and end anywhere, and padding in one call."""
    rng, config, page_size = np.random.default_rng(seed), described(*shape), 64
    counts = [1, *rng.choice([1, 1, 7, 40, 64, 65], 3, replace=False), 1]
    parts = [(i, int(rng.integers(0, 192 - count)), int(count)) for i, count in enumerate(counts)]
    inputs = problem(config, parts, page_size, 3, (192, 6), jnp.bfloat16, seed)
    check("gpu_hopper", HOPPER, config, inputs, page_size, 0.02)


def test_a_kernel_that_looks_one_token_too_far_is_noticed(monkeypatch):
    """That the comparison can fail: a block that starts a token later sees one more."""
    config = described(8, 2, 128)
    inputs = problem(config, [(0, 60, 40), (1, 10, 1)], 64, 3, (48, 3), jnp.bfloat16)
    of = attention_hopper.Blocks.of

    def shifted(step, size):
        blocks = of(step, size)
        return blocks._replace(start=blocks.start + 1)

    monkeypatch.setattr(attention_hopper.Blocks, "of", shifted)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check("gpu_hopper", HOPPER, config, inputs, 64, 0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts", [[(0, 40, 1), (1, 0, 1)], [(0, 10, 24)], [(0, 5, 20), (1, 30, 1), (2, 0, 16)]]
)
def test_ragged_attention_by_the_reference_that_comes_with_its_kernel(parts):
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

    config = described(4, 2, 64)
    assert attention_tpu.takes(64, 2)
    inputs = problem(config, parts, 16, 3, (sum(n for *_, n in parts), 4))

    def ragged(*inputs):
        # Its loop is over values: it cannot be compiled.
        return attention_tpu.attention(*inputs, kernel=ref_ragged_paged_attention)

    check("tpu", ragged, config, inputs, 16, 1e-5)


def test_kernels_say_which_heads_they_take():
    assert [heads for heads in range(1, 17) if attention_tpu.takes(128, heads)] == [1, 2, 4, 8, 16]
    assert not attention_tpu.takes(160, 8)
    assert attention_hopper.takes("bfloat16", 128, 64)
    for other in (("float32", 128, 64), ("bfloat16", 256, 64), ("bfloat16", 128, 16)):
        assert not attention_hopper.takes(*other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(64, 64), (1, 1), (576, 64)])
def test_the_kernel_for_hopper_lowers(shape, size):
    """As far as JAX goes without a GPU; `make aot` has the compilers see this and the others."""
    heads, kv, head = SHAPES[shape]
    zeros, of = KERNELS["gpu_hopper"].layout.zeros, jax.ShapeDtypeStruct
    layer = jax.eval_shape(lambda: zeros(described(heads, kv, head), 256, 64, jnp.bfloat16))
    q, k, v = (of((size[0], n, head), jnp.bfloat16) for n in (heads, kv, kv))
    step = jax.eval_shape(lambda: packed([], np.zeros((1, 128), int), 64, 256, size))
    traced = jax.jit(attention_hopper.attention).trace(q, k, v, layer, step)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
