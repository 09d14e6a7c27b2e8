"""Products with weights: one signature, and XLA's own.

Dimension letters: I inputs, O outputs.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Linear = Callable[..., Float[Array, "..."]]
"""(x [..., I], w, *out, dtype=None, rows=None) -> x @ w as [..., *out], in that dtype or in x's. w
holds I x prod(out) numbers, in the form that the backend's `pack` gives them. rows: how many rows
of x are wanted, the first ones, as a number on the device; None: all. The others may be anything
that is finite."""


def as_matrix(w: Float[Array, "I O"]) -> Float[Array, "I O"]:
    """For accelerators: the weight as the one matrix that it is in a product. As [D, N, H] it has
    another layout on a TPU, which is changed at every step: v5e took a fifth more for decode.
    """
    return w


def linear(
    x: Float[Array, "... I"],
    w: Float[Array, "..."],
    *out: int,
    dtype: DTypeLike | None = None,
    rows: Any = None,
) -> Float[Array, "..."]:
    """See `Linear`. w is [*I, *out], where I may be several axes. All rows are computed.

    As one plain product of matrices: given einsums over [D, N, H], XLA for CPU transposed weights
    at every step, and prefill took twice the time.
    """
    matrix = w.reshape(x.shape[-1], math.prod(out))
    product = jnp.matmul(x, matrix, preferred_element_type=dtype)
    return product.reshape(*x.shape[:-1], *out)
