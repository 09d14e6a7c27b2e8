"""Paged attention for CPU by XLA: page by page with a running softmax.

The loop ends at the longest context of the blocks it covers, so one compiled shape serves every
context length. Dimension letters as in `models.ops.attention`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.kv_cache import LayerCache, StepInput
from models.ops.attention import LAYOUT, MASKED, by_blocks

_BLOCK = 64


def attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    layer: LayerCache,
    step: StepInput,
) -> tuple[Float[Array, "T N H"], LayerCache]:
    """Appends k and v to the layer's pages and attends. See `models.ops.attention.Attention`."""
    layer = LAYOUT.append(k, v, layer, step)
    # Each block loops over its own pages only, which skips the upper triangle.
    return by_blocks(functools.partial(_attend, layer), q, step, _BLOCK), layer


def _attend(
    layer: LayerCache, q: Float[Array, "W B N H"], table: Array, start: Array, count: Array
) -> Float[Array, "W B N H"]:
    blocks, queries, heads, head = q.shape
    kv, page_size = layer.v.shape[1:3]
    group = heads // kv
    grouped = q.reshape(blocks, queries, kv, group, head).transpose(0, 2, 3, 1, 4) * head**-0.5
    grouped = grouped.reshape(blocks, kv, group * queries, head)
    # Position of each of the group * queries rows of scores.
    position = start[:, None] + jnp.arange(queries, dtype=jnp.int32)[None, :]
    position = jnp.tile(position, (1, group))[:, None, :, None]
    slots = jnp.arange(page_size, dtype=jnp.int32)[None, None, None, :]

    def one_page(index, carry):
        peak, total, acc = carry
        pages = table[:, index]
        scores = jnp.einsum(
            "wkqh,wkhg->wkqg", grouped, layer.k[pages], preferred_element_type=jnp.float32
        )
        scores = jnp.where(index * page_size + slots <= position, scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights = jnp.exp(scores - new_peak[..., None])
        decay = jnp.exp(peak - new_peak)
        values = jnp.einsum(
            "wkqg,wkgh->wkqh",
            weights.astype(layer.v.dtype),
            layer.v[pages],
            preferred_element_type=jnp.float32,
        )
        return new_peak, total * decay + weights.sum(-1), acc * decay[..., None] + values

    shape = (blocks, kv, group * queries)
    carry = (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head), jnp.float32),
    )
    num_pages = (jnp.max(jnp.where(count > 0, start + count, 0)) + page_size - 1) // page_size
    _, total, acc = jax.lax.fori_loop(0, num_pages, one_page, carry)
    # A block of padding may have seen no page at all.
    out = acc / jnp.maximum(total, 1e-30)[..., None]
    out = out.reshape(blocks, kv, group, queries, head).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape).astype(q.dtype)
