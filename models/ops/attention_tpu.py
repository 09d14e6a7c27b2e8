"""Paged attention for TPU by ragged paged attention, the kernel that comes with JAX.

It takes a step as it is: a flat axis of tokens, with where each sequence's tokens start. Heads that
it does not take are left to `models.ops.attention_gpu`.

Compiled for TPUs; not yet run on one. The kernel does not run in interpret mode (JAX 0.10.2): in
the tests JAX's reference for it stands in. Dimension letters as in `models.ops.attention`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from models.kv_cache import Interleaved, Layout, StepInput, pad_heads
from models.ops.attention_gpu import gathered

# Lanes of a register: what a head of the kernel takes. Larger ones are left to XLA.
_LANES = 128
LAYOUT = Layout(Interleaved("pgkh"), (_LANES, 2 * _LANES, 4 * _LANES), (16, 32, 64, 128, 256))

# Of a block, which must fit into a core's 16 MB of fast memory: what the kernel itself chooses for
# some sizes takes more than there is. It computes all queries of a block for each sequence that has
# one there: many are in vain where each sequence has a single one.
_BLOCK_TOKENS, _BLOCK_QUERIES, _SINGLE_QUERIES = 1024, 64, 8


def takes(head_dim: int, kv_heads: int) -> bool:
    """Whether the kernel computes with these. kv_heads: of a device."""
    return head_dim <= _LANES and (kv_heads in (1, 2, 4) or kv_heads % 8 == 0)


def attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    layer: Interleaved,
    step: StepInput,
    *,
    kernel: Callable[..., Array] | None = None,
) -> tuple[Float[Array, "T N H"], Interleaved]:
    """Appends k and v to the layer's pages and attends. See `models.ops.attention.Attention`.

    kernel: another one with the signature of JAX's.
    """
    layer = LAYOUT.append(k, v, layer, step)
    tokens, _, head = q.shape
    if not takes(head, k.shape[1]):
        return gathered(LAYOUT, q, layer, step, cudnn=False), layer
    num_pages, page_size, _, width = layer.kv.shape
    if kernel is None:
        single = tokens <= step.pages.shape[0]
        queries = min(tokens, _SINGLE_QUERIES if single else _BLOCK_QUERIES)
        kernel = _ragged_kernel(queries, step.pages.shape[1], page_size)
    out = kernel(
        pad_heads(q, width),
        layer.kv,
        step.contexts,
        jnp.clip(step.pages, 0, num_pages - 1),
        step.starts,
        step.num_sequences.reshape(1),
        sm_scale=head**-0.5,
    )
    return out[..., :head], layer


def _ragged_kernel(queries: int, table_pages: int, page_size: int) -> Callable[..., Any]:
    # Not at the top: servers on other platforms need not wait for it.
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    return functools.partial(
        ragged_paged_attention,
        num_kv_pages_per_block=min(table_pages, max(1, _BLOCK_TOKENS // page_size)),
        num_queries_per_block=queries,
    )
