"""Paged attention for GPU by the Pallas Triton kernel that comes with JAX, which JAX has deprecated
and will remove: for GPUs and versions of JAX that are older than `models.ops.attention_hopper`.

It decodes; prefill is left to `models.ops.attention_gpu`. Not yet run on a GPU: only in interpret
mode, against the plain softmax of the tests. Dimension letters as in `models.ops.attention`.
"""

import functools
import warnings
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from models.kv_cache import LayerCache, Layout, StepInput, pad_heads
from models.ops.attention_gpu import gathered

# The kernel's blocks are powers of two, of 16 at least.
LAYOUT = Layout(
    LayerCache(k="kpgh", v="kpgh"),
    head_dims=(16, 32, 64, 128, 256),
    page_sizes=(16, 32, 64, 128),
)

# Tokens that one iteration of the kernel loads: with 256 of head dim 128, keys, values and the next
# ones would not fit into a multiprocessor's shared memory.
_BLOCK_TOKENS = 128
# Programs that keep a large GPU busy, two for each of 132 multiprocessors; below that, the pages of
# a sequence are split among several, 16 at most.
_PROGRAMS, _MAX_SPLITS = 264, 16


def attention(
    q: Float[Array, "R Q N H"],
    k: Float[Array, "R Q K H"],
    v: Float[Array, "R Q K H"],
    layer: LayerCache,
    step: StepInput,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "R Q N H"], LayerCache]:
    """Appends k and v to the layer's pages and attends. See `models.ops.attention.Attention`.

    interpret: run where there is no GPU, slowly.
    """
    layer = LAYOUT.append(k, v, layer, step)
    scale = q.shape[-1] ** -0.5
    wide = pad_heads(q, layer.k.shape[-1])
    if q.shape[1] == 1:
        out = _decode(wide[:, 0] * scale, layer, step, interpret)[:, None]
    else:
        return gathered(LAYOUT, q, k, v, layer, step, cudnn=not interpret), layer
    return out[..., : q.shape[-1]], layer


def _decode(
    q: Float[Array, "R N H"], layer: LayerCache, step: StepInput, interpret: bool
) -> Float[Array, "R N H"]:
    rows, pages = step.page_table.shape
    kv, num_pages, page_size, _ = layer.k.shape
    block = min(_BLOCK_TOKENS // page_size, _power_of_two(pages))
    wanted = min(_MAX_SPLITS, -(-_PROGRAMS // (rows * kv)), -(-pages // block))
    splits = _power_of_two(wanted)
    # A whole number of blocks for every split.
    table = jnp.pad(step.page_table, ((0, 0), (0, -pages % (block * splits))))
    return _kernel()(
        q,
        layer.k,
        layer.v,
        # The kernel reads what entries past a sequence's last page point to, if not for long.
        jnp.clip(table, 0, num_pages - 1),
        step.start + step.count,
        pages_per_compute_block=block,
        k_splits=splits,
        interpret=interpret,
    )


def _power_of_two(number: int) -> int:
    """The least that is no smaller."""
    return 1 << (number - 1).bit_length()


@functools.cache
def _kernel() -> Callable[..., Array]:
    # Not at the top: servers on other platforms need not wait for it. JAX from 0.12 on says that it
    # will go, and names no other that takes pages.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
    return paged_attention
