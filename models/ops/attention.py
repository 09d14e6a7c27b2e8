"""Paged attention: one signature and the plain reference that every backend is held against.

Every backend takes a step's queries, keys and values, appends the keys and values to the layer's
pages and attends, causally, to all that each row's page table holds up to the row's own position.

Dimension letters: R rows, Q queries a row, N q heads, K kv heads, H head dim, M pages of a row's
table, P pages in the pool, G tokens a page.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.kv_cache import LayerCache, Layout, StepInput, pad_heads

Attention = Callable[
    [
        Float[Array, "R Q N H"],
        Float[Array, "R Q K H"],
        Float[Array, "R Q K H"],
        Any,
        StepInput,
    ],
    tuple[Float[Array, "R Q N H"], Any],
]
"""(q, k, v, layer, step) -> (output, layer with k and v appended). A layer is a
`models.kv_cache.Layer` in the backend's own layout."""

Attend = Callable[
    [Float[Array, "R Q N H"], Float[Array, "R T K H"], Float[Array, "R T K H"], int],
    Float[Array, "R Q N H"],
]
"""(q, k, v, earlier) -> output. The last Q of the T tokens are the row's own, seen causally; before
them is room for `earlier` tokens from the row's pages, of which those before its start are seen."""

# Finite, so that a fully masked block gives exp(0) * 0 rather than NaN.
MASKED = -1e30


# Of the reference, and of all backends for CPU.
LAYOUT = Layout(LayerCache(k="pkhg", v="pkgh"))


def reference(
    q: Float[Array, "R Q N H"],
    k: Float[Array, "R Q K H"],
    v: Float[Array, "R Q K H"],
    layer: LayerCache,
    step: StepInput,
) -> tuple[Float[Array, "R Q N H"], LayerCache]:
    """Gathers each row's whole page table and attends in one softmax. Slow, and easy to check."""
    layer = LAYOUT.append(k, v, layer, step)
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


def over_pages(
    attend: Attend,
    layout: Layout,
    q: Float[Array, "R Q N H"],
    k: Float[Array, "R Q K H"],
    v: Float[Array, "R Q K H"],
    layer: LayerCache,
    step: StepInput,
    granule: int = 1,
) -> Float[Array, "R Q N H"]:
    """Attention of prefill rows by a kernel that knows nothing of pages: the earlier tokens of each
    row are gathered before its own.

    As many as the longest row needs, out of six sizes: none, which is a prompt's first row, and a
    sixteenth, an eighth, ..., all of the page table, in multiples of `granule` tokens.
    """
    sizes = dict(zip(layout.arrays[-1], layer.v.shape, strict=True))
    page_size, head = sizes["g"], sizes["h"]
    k, v = pad_heads(k, head), pad_heads(v, head)
    unit = math.lcm(page_size, granule) // page_size
    units = -(-step.page_table.shape[1] // unit)
    counts = [0, *sorted({unit * -(-units // part) for part in (16, 8, 4, 2, 1)})]
    table = jnp.pad(step.page_table, ((0, 0), (0, counts[-1] - step.page_table.shape[1])))

    def part(pages: int) -> Array:
        if not pages:
            return attend(q, k, v, 0)
        earlier = layout.gather(layer, table[:, :pages])
        both = zip(earlier, (k, v), strict=True)
        keys, values = (jnp.concatenate([old.astype(k.dtype), new], axis=1) for old, new in both)
        return attend(q, keys, values, pages * page_size)

    longest = jnp.max(jnp.where(step.count > 0, step.start, 0))
    index = jnp.searchsorted(jnp.asarray(counts), -(-longest // page_size))
    return jax.lax.switch(index, [functools.partial(part, pages) for pages in counts])
