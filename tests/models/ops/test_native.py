"""The products with packed weights, and how the kernels in C++ come to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ops import native


@pytest.mark.parametrize("out", [16, 64, 5, 131])
@pytest.mark.parametrize("rows", [(1,), (7,), (4, 33)])
@pytest.mark.parametrize("inputs", [24, 600])
def test_products_are_those_of_numpy(native_kernels, rows, out, inputs):
    rng = np.random.default_rng(0)
    # Also more inputs and outputs than are taken at once, and rows for several tasks.
    x, w = rng.normal(size=(*rows, inputs)), rng.normal(size=(inputs, out))
    packed = native.pack(jnp.asarray(w, jnp.float32))
    assert packed.ndim == 3
    got = jax.jit(native.linear, static_argnums=2)(jnp.asarray(x, jnp.float32), packed, out)
    assert got.shape == (*rows, out)
    np.testing.assert_allclose(got, x @ w, atol=2e-4)


def test_a_product_with_heads_as_its_outputs(native_kernels):
    x, w = np.ones((2, 3, 8), np.float32), np.arange(8 * 24, dtype=np.float32).reshape(8, 24)
    got = native.linear(jnp.asarray(x), native.pack(jnp.asarray(w)), 4, 6)
    np.testing.assert_array_equal(got, (x @ w).reshape(2, 3, 4, 6))


def test_other_dtypes_are_left_as_they_are(native_kernels):
    w = jnp.ones((8, 24), jnp.bfloat16)
    assert native.pack(w) is w
    assert (
        native.linear(jnp.ones((2, 8), jnp.bfloat16), w, 24, dtype=jnp.float32).dtype == "float32"
    )


def test_a_weight_packed_for_another_product_is_refused(native_kernels):
    packed = native.pack(jnp.ones((8, 24)))
    with pytest.raises(Exception, match="the weight is not packed for this product"):
        native.linear(jnp.ones((2, 4)), packed, 24).block_until_ready()


def test_a_missing_or_failing_compiler_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.NotAvailable, match="no-such-compiler"):
        native.load(tmp_path)
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(native.NotAvailable, match="failed"):
        native.load(tmp_path)
    assert not list(tmp_path.iterdir())
