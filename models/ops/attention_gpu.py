"""Paged attention for GPU by XLA and cuDNN: the pages of each row are gathered, and attended to.

What every GPU takes, and what the kernels for some of them leave: it moves three times the bytes
that a kernel reads which takes pages where they lie. Compiled for an H100, and run on CPU in the
tests; not yet run on a GPU. Dimension letters as in `models.ops.attention`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.kv_cache import LayerCache, Layout, StepInput, pad_heads
from models.ops.attention import over_pages

# A token's keys lie together: what is gathered comes in pieces that are as large as can be, and no
# kernel for GPU has the pool laid out anew.
LAYOUT = Layout(LayerCache(k="pgkh", v="pgkh"))


def attention(
    q: Float[Array, "R Q N H"],
    k: Float[Array, "R Q K H"],
    v: Float[Array, "R Q K H"],
    layer: LayerCache,
    step: StepInput,
    *,
    cudnn: bool = True,
) -> tuple[Float[Array, "R Q N H"], LayerCache]:
    """Appends k and v to the layer's pages and attends. See `models.ops.attention.Attention`.

    cudnn: False where there is none.
    """
    layer = LAYOUT.append(k, v, layer, step)
    return gathered(LAYOUT, q, k, v, layer, step, cudnn), layer


def gathered(
    layout: Layout,
    q: Float[Array, "R Q N H"],
    k: Float[Array, "R Q K H"],
    v: Float[Array, "R Q K H"],
    layer: LayerCache,
    step: StepInput,
    cudnn: bool = True,
) -> Float[Array, "R Q N H"]:
    """Attention over a pool of any layout, k and v appended to it before. cudnn: by cuDNN, if
    it takes these arrays.
    """
    head = q.shape[-1]
    width = layer.v.shape[layout.arrays[-1].index("h")]
    wide = pad_heads(q, width)
    attend = functools.partial(_attend, step, head**-0.5, cudnn)
    return over_pages(attend, layout, wide, k, v, layer, step)[..., :head]


def _attend(
    step: StepInput,
    scale: float,
    cudnn: bool,
    q: Float[Array, "R Q N H"],
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    earlier: int,
) -> Float[Array, "R Q N H"]:
    """See `models.ops.attention.Attend`. cuDNN takes no float32, and heads of 128 at most."""
    cudnn = cudnn and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128
    mask = None
    if earlier:
        slots = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, :]
        queries = jnp.arange(q.shape[1], dtype=jnp.int32)[None, :, None]
        own = (slots >= earlier) & (slots - earlier <= queries)
        mask = ((slots < step.start[:, None, None]) & (slots < earlier) | own)[:, None]

    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        # cuDNN leaves out what is above the diagonal, which it does with no mask given.
        is_causal=not earlier,
        implementation="cudnn" if cudnn else "xla",
    )
