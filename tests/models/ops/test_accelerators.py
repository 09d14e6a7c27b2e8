"""The kernels for GPU and TPU as far as they go without one: against the reference in interpret
mode, against JAX's own reference, and compiled for the platform up to what its compiler is given.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from models.kv_cache import StepInput
from models.ops import KERNELS, attention_gpu, attention_tpu

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


@pytest.mark.parametrize(("name", "atol"), [("gpu", 2e-6), ("tpu", 0.02)])
def test_long_tables_are_split_among_programs(name, atol):
    config = described(4, 2, 64)
    inputs = problem(config, 3, 1, 16, 37)
    expected = run(REFERENCE, jax.jit(REFERENCE.attention), config, *inputs)
    got = run(KERNELS[name], jax.jit(KERNELS[name].attention), config, *inputs)
    np.testing.assert_allclose(got, expected, atol=atol)


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
        (attention_gpu.attention, "gpu", "cuda", "triton", 64, 1),
        (attention_gpu.attention, "gpu", "cuda", "triton", 1, 1),
        (attention_tpu.attention, "tpu", "tpu", "tpu_custom_call", 64, 1),
        (attention_tpu.attention, "tpu", "tpu", "tpu_custom_call", 4, 512),
    ],
)
def test_the_kernels_lower_for_their_platform(
    shape, attention, layout, platform, target, rows, queries
):
    """As far as JAX goes: no compiler of the platform has seen the result."""
    heads, kv, head = SHAPES[shape]
    zeros, of = KERNELS[layout].layout.zeros, jax.ShapeDtypeStruct
    layer = jax.eval_shape(lambda: zeros(described(heads, kv, head), 256, 64, jnp.bfloat16))
    q, k, v = (of((rows, queries, n, head), jnp.bfloat16) for n in (heads, kv, kv))
    step = StepInput(
        *(of(size, jnp.int32) for size in ((rows, queries), (rows,), (rows,), (rows, 128)))
    )
    traced = jax.jit(attention).trace(q, k, v, layer, step)
    assert target in traced.lower(lowering_platforms=(platform,)).as_text()
