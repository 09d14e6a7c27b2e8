"""Paged attention: one signature, the plain reference that every backend is held against, and the
blocks into which some of them cut a step.

Every backend takes a step's queries, keys and values, appends the keys and values to the layer's
pages and attends, causally, to all that the pages of each token's sequence hold up to the token's
own position.

Dimension letters: T tokens, S sequences, N q heads, K kv heads, H head dim, M pages of a sequence's
table, P pages in the pool, G tokens a page, W blocks, B tokens of a block, C tokens of a context.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.kv_cache import LayerCache, Layout, StepInput

Attention = Callable[
    [Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"], Any, StepInput],
    tuple[Float[Array, "T N H"], Any],
]
"""(q, k, v, layer, step) -> (output, layer with k and v appended). A layer is a
`models.kv_cache.Layer` in the backend's own layout. The output of padding may be anything that is
finite."""

# Finite, so that a fully masked block gives exp(0) * 0 rather than NaN.
MASKED = -1e30

# Of the reference, and of all backends for CPU.
LAYOUT = Layout(LayerCache(k="pkhg", v="pkgh"))


def reference(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    layer: LayerCache,
    step: StepInput,
) -> tuple[Float[Array, "T N H"], LayerCache]:
    """Gathers the whole context of each token and attends in one softmax. Slow, easy to check."""
    layer = LAYOUT.append(k, v, layer, step)
    (tokens, heads, head), kv = q.shape, k.shape[1]
    keys, values = LAYOUT.gather(layer, jnp.asarray(step.pages)[step.owners])  # [T, C, K, H]
    grouped = q.reshape(tokens, kv, heads // kv, head) * head**-0.5
    scores = jnp.einsum("tkgh,tckh->tkgc", grouped, keys, preferred_element_type=jnp.float32)
    places = jnp.arange(keys.shape[1], dtype=jnp.int32)
    visible = places[None, :] <= jnp.asarray(step.positions)[:, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, MASKED), axis=-1)
    weights = weights.astype(values.dtype)
    out = jnp.einsum("tkgc,tckh->tkgh", weights, values, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype), layer


class Blocks(NamedTuple):
    """A step's tokens in blocks of up to B in a row of one sequence. Blocks of padding come last.

    sequence: whose tokens they are. first: the place of their first on the step's axis of tokens.
    start: that one's position. counts: how many they are; 0: padding. places: of each token among
    all places of the blocks.
    """

    sequence: Int[Array, "W"]
    first: Int[Array, "W"]
    start: Int[Array, "W"]
    counts: Int[Array, "W"]
    places: Int[Array, "T"]

    @classmethod
    def of(cls, step: StepInput, size: int) -> "Blocks":
        """size: B. There are as many blocks as any step of this shape can need."""
        starts, counts = jnp.asarray(step.starts), step.counts
        tokens, sequences = step.tokens.shape[0], step.contexts.shape[0]
        needed = -(-counts // size)
        ends = jnp.cumsum(needed, dtype=jnp.int32)
        begins = ends - needed
        index = jnp.arange(min(tokens, sequences + tokens // size), dtype=jnp.int32)
        sequence = jnp.searchsorted(ends, index, side="right", method="compare_all")
        sequence = jnp.minimum(sequence, sequences - 1).astype(jnp.int32)
        within = (index - begins[sequence]) * size
        count = jnp.clip(counts[sequence] - within, 0, size)
        owners = step.owners
        offset = jnp.arange(tokens, dtype=jnp.int32) - starts[owners]
        return cls(
            sequence,
            starts[sequence] + within,
            jnp.asarray(step.contexts)[sequence] - counts[sequence] + within,
            jnp.where(index < ends[-1], count, 0),
            (begins[owners] + offset // size) * size + offset % size,
        )

    def cut(self, x: Float[Array, "T N H"], size: int) -> Float[Array, "W B N H"]:
        """The blocks of x. Their places past `counts` hold other tokens."""
        return jnp.take(x, self.first[:, None] + jnp.arange(size)[None, :], axis=0, mode="clip")

    def joined(self, x: Float[Array, "W B N H"]) -> Float[Array, "T N H"]:
        """What `cut` has taken apart."""
        return jnp.take(x.reshape(-1, *x.shape[2:]), self.places, axis=0, mode="clip")

    @property
    def num(self) -> Int[Array, ""]:
        """How many of the blocks are not padding."""
        return jnp.sum(self.counts > 0, dtype=jnp.int32)


def by_blocks(
    attend: Callable[[Array, Array, Array, Array], Array],
    q: Float[Array, "T N H"],
    step: StepInput,
    most: int,
) -> Float[Array, "T N H"]:
    """Attention in blocks of up to `most` tokens. attend: (q [W, B, N, H], the pages of each
    block's sequence [W, M], `Blocks.start`, `Blocks.counts`) -> output [W, B, N, H].

    Where a step of this shape has no more tokens than sequences, as decode steps do, blocks of one
    token attend all at once. Else one after the other: they differ in length, and the contexts of
    all of them at once would fill the memory.
    """
    tokens = step.tokens.shape[0]
    size = 1 if tokens <= step.contexts.shape[0] else min(most, tokens)
    blocks = Blocks.of(step, size)
    table = jnp.asarray(step.pages)[blocks.sequence]
    arrays = blocks.cut(q, size), table, blocks.start, blocks.counts
    if size == 1:
        return blocks.joined(attend(*arrays))

    def one(index, out):
        some = [jax.lax.dynamic_slice_in_dim(array, index, 1) for array in arrays]
        return jax.lax.dynamic_update_slice_in_dim(out, attend(*some), index, 0)

    return blocks.joined(jax.lax.fori_loop(0, blocks.num, one, jnp.zeros_like(arrays[0])))
