"""The paged KV cache as explicit pytrees, the input of one step, and the wire form of pages.

Dimension letters: R rows, Q queries a row, M pages of a row's table, P pages in the pool,
G tokens a page, L layers, K kv heads, H head dim.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class StepInput:
    """One step's work as rows of up to Q consecutive tokens of one sequence each.

    A decode step has Q = 1 and a row a sequence. A prefill step cuts each chunk into rows of Q
    tokens; every row carries its sequence's page table. Rows with count 0 are padding.
    """

    tokens: Int[Array | np.ndarray, "R Q"]
    start: Int[Array | np.ndarray, "R"]  # position of the row's first token in its sequence
    count: Int[Array | np.ndarray, "R"]  # how many of the row's Q tokens are real
    page_table: Int[
        Array | np.ndarray, "R M"
    ]  # page ids; entries past the sequence's last page are ignored


class LayerCache(NamedTuple):
    """One layer's pool of pages."""

    k: Float[Array, "P K H G"]
    v: Float[Array, "P K G H"]


Cache = tuple[LayerCache, ...]


def allocate(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: DTypeLike,
    sharding: Sharding | None = None,
) -> Cache:
    """A zeroed pool for every layer; `sharding` is that of [P, K, ...] arrays."""
    kv, head = config.num_kv_heads, config.head_dim

    def zeros() -> Cache:
        return tuple(
            LayerCache(
                k=jnp.zeros((num_pages, kv, head, page_size), dtype),
                v=jnp.zeros((num_pages, kv, page_size, head), dtype),
            )
            for _ in range(config.num_layers)
        )

    return jax.jit(zeros, out_shardings=sharding)()


def read_pages(cache: Cache, pages: Int[Array, "M"]) -> Float[Array, "L T K 2 H"]:
    """Copies pages out in the wire form: token-major, K and V side by side, T = M * G."""

    def one_layer(layer: LayerCache) -> Array:
        keys = layer.k[pages].transpose(0, 3, 1, 2)  # [M, G, K, H]
        values = layer.v[pages].transpose(0, 2, 1, 3)
        both = jnp.stack([keys, values], axis=3)
        return both.reshape(-1, *both.shape[2:])

    return jnp.stack([one_layer(layer) for layer in cache])


def write_pages(cache: Cache, pages: Int[Array, "M"], wire: Float[Array, "L T K 2 H"]) -> Cache:
    """Writes what `read_pages` gave into other pages. Page ids outside the pool are dropped."""

    def one_layer(layer: LayerCache, tokens: Array) -> LayerCache:
        paged = tokens.reshape(pages.shape[0], -1, *tokens.shape[1:])  # [M, G, K, 2, H]
        keys = paged[:, :, :, 0].transpose(0, 2, 3, 1)
        values = paged[:, :, :, 1].transpose(0, 2, 1, 3)
        return LayerCache(
            k=layer.k.at[pages].set(keys, mode="drop"), v=layer.v.at[pages].set(values, mode="drop")
        )

    return tuple(one_layer(layer, tokens) for layer, tokens in zip(cache, wire, strict=True))
