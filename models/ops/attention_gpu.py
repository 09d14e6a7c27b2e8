"""Paged attention by XLA and cuDNN: the pages of each block of tokens are gathered, and attended
to.

What every accelerator takes, and what the kernels for some of them leave: it moves three times the
bytes that a kernel reads which takes pages where they lie. Compiled for an H100, and run on CPU in
the tests; not yet run on a GPU. Dimension letters as in `models.ops.attention`.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.kv_cache import Layer, LayerCache, Layout, StepInput, pad_heads
from models.ops.attention import by_blocks

# A token's keys lie together: what is gathered comes in pieces that are as large as can be, and no
# kernel for GPU has the pool laid out anew.
LAYOUT = Layout(LayerCache(k="pgkh", v="pgkh"))

_BLOCK = 128
# Of a table of pages, the parts that are gathered, where the longest context needs no more.
_PARTS = (8, 4, 2, 1)


def attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    layer: LayerCache,
    step: StepInput,
    *,
    cudnn: bool = True,
) -> tuple[Float[Array, "T N H"], LayerCache]:
    """Appends k and v to the layer's pages and attends. See `models.ops.attention.Attention`.

    cudnn: False where there is none.
    """
    layer = LAYOUT.append(k, v, layer, step)
    return gathered(LAYOUT, q, layer, step, cudnn), layer


def gathered(
    layout: Layout, q: Float[Array, "T N H"], layer: Layer, step: StepInput, cudnn: bool
) -> Float[Array, "T N H"]:
    """Attention over a pool of any layout, to which the step's keys and values were appended.
    cudnn: by cuDNN, if it takes these arrays.
    """
    head, width = q.shape[-1], layer[-1].shape[layout.arrays[-1].index("h")]
    # cuDNN takes no float32, and heads of 128 at most.
    cudnn = cudnn and q.dtype in (jnp.bfloat16, jnp.float16) and width <= 128
    attend = functools.partial(_attend, layout, layer, head**-0.5, "cudnn" if cudnn else "xla")
    return by_blocks(attend, pad_heads(q, width), step, _BLOCK)[..., :head]


def _attend(
    layout: Layout,
    layer: Layer,
    scale: float,
    implementation: Literal["cudnn", "xla"],
    q: Float[Array, "W B N H"],
    table: Int[Array, "W M"],
    start: Int[Array, "W"],
    count: Int[Array, "W"],
) -> Float[Array, "W B N H"]:
    page_size = layer[-1].shape[layout.arrays[-1].index("g")]
    parts = sorted({-(-table.shape[1] // part) for part in _PARTS})

    def part(pages: int) -> Array:
        keys, values = layout.gather(layer, table[:, :pages])
        places = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, None, :]
        positions = start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
        mask = (places <= positions[:, :, None])[:, None]
        return jax.nn.dot_product_attention(
            q, keys, values, mask=mask, scale=scale, implementation=implementation
        )

    longest = jnp.max(jnp.where(count > 0, start + count, 0))
    index = jnp.searchsorted(jnp.asarray(parts), -(-longest // page_size))
    return jax.lax.switch(index, [functools.partial(part, pages) for pages in parts])
