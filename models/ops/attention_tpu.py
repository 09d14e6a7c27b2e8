"""Paged attention for TPU, by the kernels that come with JAX: two backends.

`attention` takes paged attention for decode and splash attention for prefill. `ragged` takes ragged
paged attention for both, from another layout.

Not yet run on a TPU. The first runs in interpret mode in the tests; the kernel of the second does
not (JAX 0.10.2), there JAX's reference for it stands in. Dimension letters as in
`models.ops.attention`.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.kv_cache import Interleaved, LayerCache, Layout, StepInput, pad_heads
from models.ops.attention import over_pages

# A register has 128 lanes, and 16 rows of them in bfloat16.
_LANES = 128
_PAGE_SIZES = (16, 32, 64, 128, 256)
LAYOUT = Layout(LayerCache(k="kpgh", v="kpgh"), (_LANES, 2 * _LANES), _PAGE_SIZES)
RAGGED_LAYOUT = Layout(Interleaved("pgkh"), (_LANES,), _PAGE_SIZES, (1, 2, 4, 8))

# Tokens that the decode kernel brings into fast memory at a time: 128 KiB of keys of one head.
_BLOCK_TOKENS = 512
_RAGGED_BLOCK_TOKENS, _RAGGED_BLOCK_QUERIES = 1024, 64


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

    interpret: run where there is no TPU, slowly.
    """
    layer = LAYOUT.append(k, v, layer, step)
    wide = pad_heads(q, layer.k.shape[-1]) * q.shape[-1] ** -0.5
    if q.shape[1] == 1:
        out = _decode(wide[:, 0], layer, step, interpret)[:, None]
    else:
        attend = functools.partial(_prefill, step, interpret)
        out = over_pages(attend, LAYOUT, wide, k, v, layer, step, _LANES)
    return out[..., : q.shape[-1]], layer


def _decode(
    q: Float[Array, "R N H"], layer: LayerCache, step: StepInput, interpret: bool
) -> Float[Array, "R N H"]:
    # Here, as below, so that servers on other platforms need not wait for it.
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    pages = step.page_table.shape[1]
    _, num_pages, page_size, _ = layer.k.shape
    block = min(max(1, _BLOCK_TOKENS // page_size), pages)
    table = jnp.pad(step.page_table, ((0, 0), (0, -pages % block)))
    # The kernel has no flag of its own.
    interpreted = pltpu.force_tpu_interpret_mode() if interpret else contextlib.nullcontext()
    with interpreted:
        return paged_attention(
            q,
            layer.k,
            layer.v,
            # It knows no empty rows; those of padding read one token of some page.
            jnp.maximum(step.start + step.count, 1),
            jnp.clip(table, 0, num_pages - 1),
            pages_per_compute_block=block,
        )


def _prefill(
    step: StepInput,
    interpret: bool,
    q: Float[Array, "R Q N H"],
    k: Float[Array, "R T K H"],
    v: Float[Array, "R T K H"],
    earlier: int,
) -> Float[Array, "R Q N H"]:
    """See `models.ops.attention.Attend`.

    Splash attention takes a mask that is known when it is compiled: all earlier tokens are seen,
    and the row's own causally. Slots that hold no earlier token are in another segment.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    queries = q.shape[1]
    # Tokens are padded behind, where causality hides them from the real ones.
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, -queries % _LANES), (0, 0), (0, 0))).swapaxes(1, 2)
        for x in (q, k, v)
    )
    heads, padded, tokens = q.shape[1], q.shape[2], k.shape[2]
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((padded, tokens), offset=earlier)] * heads),
        block_sizes=splash.BlockSizes(_block(padded), _block(tokens)),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def one_row(q, k, v, start):
        slots = jnp.arange(tokens, dtype=jnp.int32)
        hidden = (slots >= start) & (slots < earlier)
        ids = splash.SegmentIds(jnp.zeros(padded, jnp.int32), hidden.astype(jnp.int32))
        return kernel(q, k, v, segment_ids=ids)

    out = jnp.asarray(jax.vmap(one_row)(q, k, v, step.start))
    return out.swapaxes(1, 2)[:, :queries]


def _block(tokens: int) -> int:
    return next(size for size in (512, 256, _LANES) if tokens % size == 0)


def ragged(
    q: Float[Array, "R Q N H"],
    k: Float[Array, "R Q K H"],
    v: Float[Array, "R Q K H"],
    layer: Interleaved,
    step: StepInput,
    *,
    kernel: Callable[..., Array] | None = None,
) -> tuple[Float[Array, "R Q N H"], Interleaved]:
    """Appends k and v to the layer's pages and attends. See `models.ops.attention.Attention`.

    Every row is a sequence of Q queries to the kernel. Those of padding come last and see what is
    behind the sequence's end, in whatever page that is. kernel: another one with the signature of
    JAX's.
    """
    layer = RAGGED_LAYOUT.append(k, v, layer, step)
    rows, queries, heads, head_dim = q.shape
    num_pages, page_size, _, width = layer.kv.shape
    table = jnp.pad(step.page_table, ((0, 0), (0, -(-queries // page_size))))
    if kernel is None:
        kernel = _ragged_kernel(rows * queries, table.shape[1], page_size)
    out = kernel(
        pad_heads(q, width).reshape(-1, heads, width),
        layer.kv,
        step.start + queries,
        jnp.clip(table, 0, num_pages - 1),
        jnp.arange(rows + 1, dtype=jnp.int32) * queries,
        jnp.full(1, rows, jnp.int32),
        sm_scale=head_dim**-0.5,
    )
    return out.reshape(rows, queries, heads, width)[..., :head_dim], layer


def _ragged_kernel(tokens: int, table_pages: int, page_size: int) -> Callable[..., Any]:
    """With blocks of queries and of keys that fit into a core's 16 MB of fast memory: what the
    kernel itself chooses for some sizes takes more than there is.
    """
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    return functools.partial(
        ragged_paged_attention,
        num_kv_pages_per_block=min(table_pages, max(1, _RAGGED_BLOCK_TOKENS // page_size)),
        num_queries_per_block=min(tokens, _RAGGED_BLOCK_QUERIES),
    )
