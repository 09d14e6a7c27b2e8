"""Paged attention: one signature and the plain reference that every backend is held against.

Every backend takes a step's queries, keys and values, appends the keys and values to the layer's
pages and attends, causally, to all that each row's page table holds up to the row's own position.

Dimension letters: R rows, Q queries a row, N q heads, K kv heads, H head dim, M pages of a row's
table, P pages in the pool, G tokens a page.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.kv_cache import LayerCache, StepInput

Attention = Callable[
    [
        Float[Array, "R Q N H"],
        Float[Array, "R Q K H"],
        Float[Array, "R Q K H"],
        LayerCache,
        StepInput,
    ],
    tuple[Float[Array, "R Q N H"], LayerCache],
]
"""(q, k, v, layer, step) -> (output, layer with k and v appended)."""

# Finite, so that a fully masked block gives exp(0) * 0 rather than NaN.
MASKED = -1e30


def append(
    k: Float[Array, "R Q K H"], v: Float[Array, "R Q K H"], layer: LayerCache, step: StepInput
) -> LayerCache:
    """Writes a step's keys and values into the pages; those of padding tokens are dropped."""
    num_pages, kv, head, page_size = layer.k.shape
    queries = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]
    position = step.start[:, None] + queries
    page = jnp.take_along_axis(step.page_table, position // page_size, axis=1, mode="clip")
    # Past the end of the pool: the scatter drops what points there.
    page = jnp.where(queries < step.count[:, None], page, num_pages).reshape(-1)
    slot = (position % page_size).reshape(-1)
    rows = (-1, kv, head)
    return LayerCache(
        k=layer.k.at[page, :, :, slot].set(k.reshape(rows).astype(layer.k.dtype), mode="drop"),
        v=layer.v.at[page, :, slot, :].set(v.reshape(rows).astype(layer.v.dtype), mode="drop"),
    )


def reference(
    q: Float[Array, "R Q N H"],
    k: Float[Array, "R Q K H"],
    v: Float[Array, "R Q K H"],
    layer: LayerCache,
    step: StepInput,
) -> tuple[Float[Array, "R Q N H"], LayerCache]:
    """Gathers each row's whole page table and attends in one softmax. Slow, and easy to check."""
    layer = append(k, v, layer, step)
    rows, queries, heads, head = q.shape
    kv = k.shape[2]
    keys = layer.k[step.page_table]  # [R, M, K, H, G]
    values = layer.v[step.page_table]  # [R, M, K, G, H]
    keys = keys.transpose(0, 2, 3, 1, 4).reshape(rows, kv, head, -1)
    values = values.transpose(0, 2, 1, 3, 4).reshape(rows, kv, -1, head)
    grouped = q.reshape(rows, queries, kv, heads // kv, head) * head**-0.5
    scores = jnp.einsum("rqkgh,rkht->rkgqt", grouped, keys, preferred_element_type=jnp.float32)
    position = step.start[:, None] + jnp.arange(queries, dtype=jnp.int32)[None, :]
    slots = jnp.arange(keys.shape[-1], dtype=jnp.int32)
    visible = slots[None, None, :] <= position[:, :, None]
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = jnp.einsum("rkgqt,rkth->rqkgh", weights, values, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype), layer
