"""The kernels for GPU and TPU as far as they go without one: against the reference in interpret
mode, against JAX's own reference, and compiled for the platform up to what its compiler is given.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from models.kv_cache import StepInput
from models.ops import KERNELS, attention_hopper, attention_tpu, attention_triton

REFERENCE = KERNELS["reference"]
SHAPES = {"llama3_8b": (32, 8, 128), "smollm2_135m": (9, 3, 64)}


def described(heads, kv_heads, head_dim):
    return ModelConfig("llama", 8, 8, 1, heads, kv_heads, head_dim, 8)


def filled(config, layout, pages, page_size, wire):
    layer = layout.zeros(config, pages, page_size, wire.dtype)
    return layout.write(layer, jnp.arange(pages), wire)


def problem(config, rows, queries, page_size, table_pages, dtype=np.float32):
    """(q, k, v, the pool in wire form, step): rows of random length that share no page."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    heads, kv, head = config.num_heads, config.num_kv_heads, config.head_dim
    pages = rng.permutation(rows * table_pages).reshape(rows, table_pages)
    start = rng.integers(0, page_size * table_pages - queries, rows)
    step = StepInput(
        jnp.zeros((rows, queries), jnp.int32),
        jnp.asarray(start, jnp.int32),
        jnp.full(rows, queries, jnp.int32),
        jnp.asarray(pages, jnp.int32),
    )
    wire = normal(pages.size * page_size, kv, 2, head)
    q, k, v = (normal(rows, queries, n, head) for n in (heads, kv, kv))
    return q, k, v, wire, step


def run(kernels, attention, config, q, k, v, wire, step):
    pages = step.page_table.size
    layer = filled(config, kernels.layout, pages, wire.shape[0] // pages, wire)
    return np.asarray(attention(q, k, v, layer, step)[0])


@pytest.mark.parametrize(("name", "atol"), [("gpu_triton", 2e-6), ("tpu", 0.02)])
def test_long_tables_are_split_among_programs(name, atol):
    config = described(4, 2, 64)
    inputs = problem(config, 3, 1, 16, 37)
    expected = run(REFERENCE, jax.jit(REFERENCE.attention), config, *inputs)
    got = run(KERNELS[name], jax.jit(KERNELS[name].attention), config, *inputs)
    np.testing.assert_allclose(got, expected, atol=atol)


def interpreted():
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


@pytest.mark.parametrize(("shape", "splits"), [((8, 2, 128), 1), ((9, 3, 64), 1), ((6, 1, 80), 2)])
def test_the_kernel_for_hopper_decodes_a_ragged_batch(shape, splits, monkeypatch):
    """Contexts of one token, at and around the edges of pages, and rows of padding."""
    monkeypatch.setattr(attention_hopper, "_splits", lambda blocks, pages: splits)
    config, page_size, table_pages = described(*shape), 64, 3
    q, k, v, wire, step = problem(config, 8, 1, page_size, table_pages, jnp.bfloat16)
    start = np.array([0, 62, 63, 64, 0, 127, 190, 191], np.int32)
    count = np.array([1, 1, 1, 1, 0, 1, 1, 1], np.int32)
    inputs = q, k, v, wire, dataclasses.replace(step, start=start, count=count)
    kernel = functools.partial(attention_hopper.attention, interpret=interpreted())
    assert attention_hopper.takes(q.dtype, shape[2], page_size)
    got = run(KERNELS["gpu_hopper"], kernel, config, *inputs)
    wide = [x.astype(jnp.float32) for x in inputs[:4]]
    exact = run(REFERENCE, jax.jit(REFERENCE.attention), config, *wide, inputs[4])
    real = count > 0
    np.testing.assert_allclose(
        got[real].astype(np.float32), exact[real].astype(np.float32), atol=0.02
    )
    assert not got[~real].any(), "padding attends to nothing"


def test_the_kernel_for_hopper_takes_blocks_of_several_tokens():
    """Of decodes, chunks and padding in one call, as a packed step has them."""
    config, page_size = described(8, 2, 128), 64
    q, _, _, wire, step = problem(config, 2, 16, page_size, 3, jnp.bfloat16)
    layer = filled(config, attention_hopper.LAYOUT, 6, page_size, wire)
    rows, starts, counts = ([0, 1, 1, 0], [70, 120, 136, 0], [1, 16, 5, 0])
    blocks = jnp.concatenate([q, q[::-1]])
    numbers = (jnp.asarray(each, jnp.int32) for each in (rows, starts, counts))
    got = attention_hopper.paged_blocks(
        blocks, layer, step.page_table, *numbers, interpret=interpreted()
    )
    keys, values = attention_hopper.LAYOUT.gather(layer, step.page_table)
    for b, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
        for w in range(count):
            seen = start + w + 1
            one = blocks[b, w].reshape(2, 4, 128).astype(jnp.float32)
            scores = jnp.einsum("kgh,tkh->kgt", one, keys[row, :seen].astype(jnp.float32))
            weights = jax.nn.softmax(scores, axis=-1)
            out = jnp.einsum("kgt,tkh->kgh", weights, values[row, :seen].astype(jnp.float32))
            np.testing.assert_allclose(
                got[b, w].astype(jnp.float32), out.reshape(8, 128), atol=0.02
            )


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 24])
def test_ragged_attention_by_the_reference_that_comes_with_its_kernel(queries):
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

    def ragged(*inputs):
        return attention_tpu.ragged(*inputs, kernel=ref_ragged_paged_attention)

    config = described(4, 2, 64)
    inputs = problem(config, 1, queries, 16, 3)
    expected = run(REFERENCE, jax.jit(REFERENCE.attention), config, *inputs)
    # Its loop is over values: it cannot be compiled.
    got = run(KERNELS["tpu_ragged"], ragged, config, *inputs)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("attention", "layout", "platform", "target", "rows", "queries"),
    [
        (attention_hopper.attention, "gpu_hopper", "cuda", "mosaic_gpu", 64, 1),
        (attention_hopper.attention, "gpu_hopper", "cuda", "mosaic_gpu", 1, 1),
        (attention_triton.attention, "gpu_triton", "cuda", "triton", 64, 1),
        (attention_triton.attention, "gpu_triton", "cuda", "triton", 1, 1),
        (attention_tpu.attention, "tpu", "tpu", "tpu_custom_call", 64, 1),
        (attention_tpu.attention, "tpu", "tpu", "tpu_custom_call", 4, 512),
    ],
)
def test_the_kernels_lower_for_their_platform(
    shape, attention, layout, platform, target, rows, queries
):
    """As far as JAX goes; `make aot` has the compilers of the platforms see the results."""
    if target == "triton" and jax.__version_info__ >= (0, 12):
        pytest.skip("JAX 0.12 asks a GPU that is there; these kernels are for older versions")
    heads, kv, head = SHAPES[shape]
    zeros, of = KERNELS[layout].layout.zeros, jax.ShapeDtypeStruct
    layer = jax.eval_shape(lambda: zeros(described(heads, kv, head), 256, 64, jnp.bfloat16))
    q, k, v = (of((rows, queries, n, head), jnp.bfloat16) for n in (heads, kv, kv))
    step = StepInput(
        *(of(size, jnp.int32) for size in ((rows, queries), (rows,), (rows,), (rows, 128)))
    )
    traced = jax.jit(attention).trace(q, k, v, layer, step)
    assert target in traced.lower(lowering_platforms=(platform,)).as_text()
