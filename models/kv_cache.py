"""The paged KV cache as explicit pytrees, and the input of one step.

Dimension letters: R rows, Q queries a row, M pages of a row's table, P pages in the pool,
G tokens a page, L layers, K kv heads, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from models.config import ModelConfig


class StepInput(NamedTuple):
    """One step's work as rows of up to Q consecutive tokens of one sequence each.

    A decode step has Q = 1 and a row a sequence. A prefill step cuts each chunk into rows of Q
    tokens; every row carries its sequence's page table. Rows with count 0 are padding.
    """

    tokens: Int[Array, "R Q"]
    start: Int[Array, "R"]  # position of the row's first token in its sequence
    count: Int[Array, "R"]  # how many of the row's Q tokens are real
    page_table: Int[Array, "R M"]  # page ids; entries past the sequence's last page are ignored


class LayerCache(NamedTuple):
    """One layer's pool of pages."""

    k: Float[Array, "P K H G"]
    v: Float[Array, "P K G H"]


Cache = tuple[LayerCache, ...]


def allocate(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: jnp.dtype,
    sharding: NamedSharding | None = None,
) -> Cache:
    """A zeroed pool for every layer; `sharding` is that of [P, K, ...] arrays."""
    kv, head = config.num_kv_heads, config.head_dim
    shapes = ((num_pages, kv, head, page_size), (num_pages, kv, page_size, head))

    def zeros():
        layer = LayerCache(*(jnp.zeros(shape, dtype) for shape in shapes))
        return tuple(jax.tree.map(jnp.copy, layer) for _ in range(config.num_layers))

    return jax.jit(zeros, out_shardings=sharding)()
