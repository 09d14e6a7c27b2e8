"""Paged attention for Hopper GPUs in Pallas Mosaic-GPU, which reads the pages where they lie:
decode, prefill, and both in one call.

A block of the kernel has 64 rows of one kv head: the q heads that share it, of one or more tokens
of one sequence. It takes the sequence's pages one after another, the next ones on their way while
it computes, with a running softmax. What the kernel does not take is left to
`models.ops.attention_gpu`.

Compiled for an H100, and run by Pallas's interpreter in the tests, which replaces the two products
of matrices; not yet run on a GPU. Dimension letters as in `models.ops.attention`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models.kv_cache import LayerCache, Layout, StepInput, pad_heads
from models.ops.attention import MASKED, Blocks
from models.ops.attention_gpu import gathered

_HEAD_DIMS, _PAGE_SIZES = (64, 128), (64, 128)
# Larger heads are left to XLA, which takes them as they are.
LAYOUT = Layout(LayerCache(k="pgkh", v="pgkh"), (*_HEAD_DIMS, 192, 256, 512))

# Rows of the product that a warpgroup computes.
_ROWS = 64
# Bytes of keys and values that are on their way, or being computed with: of the 227 KiB of a
# multiprocessor's shared memory, queries and results take up to 48 KiB more.
_STAGED, _MOST_STAGES = 128 << 10, 4
# Blocks that keep an H100 busy, two for each of 132 multiprocessors; below that, the pages of a
# sequence are split among several, 16 at most.
_BLOCKS, _MAX_SPLITS = 264, 16


def takes(dtype: DTypeLike, head_dim: int, page_size: int) -> bool:
    """Whether the kernel computes with these."""
    sixteen_bit = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return sixteen_bit and head_dim <= _HEAD_DIMS[-1] and page_size in _PAGE_SIZES


def attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    layer: LayerCache,
    step: StepInput,
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "T N H"], LayerCache]:
    """Appends k and v to the layer's pages and attends. See `models.ops.attention.Attention`.

    interpret: how Pallas is to interpret the kernel where there is no GPU; None: not at all.
    """
    layer = LAYOUT.append(k, v, layer, step)
    (_, heads, head), kv, page_size = q.shape, k.shape[1], layer.k.shape[1]
    if heads // kv > _ROWS or not takes(q.dtype, head, page_size):
        return gathered(LAYOUT, q, layer, step, cudnn=interpret is None), layer
    size = _tokens_of(heads // kv)
    blocks = Blocks.of(step, size)
    wide = blocks.cut(pad_heads(q * head**-0.5, layer.k.shape[-1]), size)
    # A step with more tokens than sequences has blocks enough.
    decodes = q.shape[0] <= step.contexts.shape[0]
    splits = _splits(q.shape[0] * kv, step.pages.shape[1]) if decodes else 1
    table = jnp.asarray(step.pages)
    out = paged_blocks(wide, layer, table, blocks, splits=splits, interpret=interpret)
    return blocks.joined(out)[..., :head], layer


def _tokens_of(group: int) -> int:
    """Tokens of a block, whose rows are divided by the q heads of each kv head."""
    return _ROWS // (1 << (group - 1).bit_length())


def _splits(blocks: int, pages: int) -> int:
    """Among how many the pages of a sequence are split: a power of two."""
    wanted = min(_MAX_SPLITS, -(-_BLOCKS // blocks), pages)
    return 1 << (wanted - 1).bit_length() if wanted > 1 else 1


def paged_blocks(
    q: Float[Array, "W B N H"],
    layer: LayerCache,
    table: Int[Array, "S M"],
    blocks: Blocks,
    *,
    splits: int = 1,
    stages: int | None = None,
    interpret: Any = None,
) -> Float[Array, "W B N H"]:
    """Attention of blocks of tokens over their sequences' pages; a block of padding gives zeros.

    q: scaled. splits: among how many programs a sequence's pages are divided, whose results are
    merged afterwards. stages: pages on their way; None: as many as suit.
    """
    num_blocks, tokens, heads, head = q.shape
    num_pages, page_size, kv, _ = layer.k.shape
    group = _ROWS // tokens
    of_page = 2 * page_size * head * q.dtype.itemsize
    stages = stages or min(_MOST_STAGES, _STAGED // of_page)
    grouped = q.reshape(num_blocks, tokens, kv, heads // kv, head)
    more = ((0, 0), (0, 0), (0, 0), (0, group - heads // kv), (0, 0))
    packed = jnp.pad(grouped, more).swapaxes(1, 2).reshape(num_blocks, kv, _ROWS, head)
    kernel = _kernel(
        num_blocks, kv, group, head, page_size, table.shape[1], splits, stages, q.dtype, interpret
    )
    # The kernel looks no page up that is not there, but for those that entries past the end name.
    table = jnp.clip(table, 0, num_pages - 1)
    numbers = blocks.sequence, blocks.start, blocks.counts
    out, peak, total = kernel(packed, layer.k, layer.v, table, *numbers)
    if splits > 1:
        weight = jnp.exp2(peak - peak.max(0, keepdims=True))
        total = (total * weight).sum(0)
        out = (out * weight[..., None]).sum(0) / jnp.maximum(total, 1e-30)[..., None]
    else:
        out = out[0]
    out = out.reshape(num_blocks, kv, tokens, group, head).swapaxes(1, 2)
    return out[:, :, :, : heads // kv].reshape(q.shape).astype(q.dtype)


def _kernel(
    blocks: int,
    kv: int,
    group: int,
    head: int,
    page_size: int,
    table_pages: int,
    splits: int,
    stages: int,
    dtype: DTypeLike,
    interpret: Any,
) -> Callable[..., Any]:
    # Not at the top: servers on other platforms need not wait for it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu  # which lists too little of what it has
    pages_each = -(-table_pages // splits)
    # The interpreter knows no layouts of registers, no transposed references and no products of
    # shared memory: what stands for them there is the same in plain JAX.
    real = interpret is None
    accumulator = plgpu.Layout.WGMMA

    def laid_out(x: Array, layout: Any) -> Array:
        return plgpu.layout_cast(x, layout) if real else x

    def counted(dim: int) -> Array:
        shape = (_ROWS, page_size)
        if real:
            return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=accumulator)
        return lax.broadcasted_iota(jnp.int32, shape, dim)

    def body(
        q_ref,
        k_ref,
        v_ref,
        table_ref,
        row_ref,
        start_ref,
        count_ref,
        out_ref,
        peak_ref,
        total_ref,
        q_s,
        k_s,
        v_s,
        out_s,
        peak_s,
        total_s,
        q_there,
        k_there,
        v_there,
    ):
        h, b, split = (lax.axis_index(name) for name in ("head", "block", "split"))
        row, start, count = row_ref[b], start_ref[b], count_ref[b]
        length = jnp.where(count > 0, start + count, 0)
        first = split * pages_each
        pages = jnp.clip(lax.div(length + (page_size - 1), page_size) - first, 0, pages_each)

        def fetch(index, slot):
            page = table_ref[row, jnp.minimum(first + index, table_pages - 1)]
            plgpu.copy_gmem_to_smem(k_ref.at[page, :, h], k_s.at[slot], k_there.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[page, :, h], v_s.at[slot], v_there.at[slot])

        plgpu.copy_gmem_to_smem(q_ref.at[b, h], q_s, q_there)
        for index in range(stages):
            pl.when(index < pages)(functools.partial(fetch, index, index))
        plgpu.barrier_wait(q_there)

        def one_page(index, carry):
            acc, peak, total = carry
            slot = lax.rem(index, jnp.int32(stages))
            plgpu.barrier_wait(k_there.at[slot])

            def scores_in(ref):
                if not real:
                    return _product(q_s[...], k_s[slot].T)
                plgpu.wgmma(ref, q_s, k_s.at[slot].transpose((1, 0)))
                return ref[...]

            scores = pl.run_scoped(scores_in, plgpu.ACC((_ROWS, page_size), jnp.float32))
            # Row r is of token r // group: seen is what lies at its position or before.
            at = counted(1) + (first + index) * page_size
            scores = jnp.where(at * group <= start * group + counted(0), scores, MASKED)
            scores = scores * math.log2(math.e)
            higher = jnp.maximum(peak, scores.max(axis=1))
            decay = jnp.exp2(peak - higher)
            weights = jnp.exp2(scores - lax.broadcast_in_dim(higher, scores.shape, [0]))
            acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
            total = total * decay + weights.sum(axis=1)
            narrow = weights.astype(dtype)
            plgpu.barrier_wait(v_there.at[slot])

            def values_in(ref):
                if not real:
                    return _product(narrow, v_s[slot])
                plgpu.wgmma(ref, narrow, v_s.at[slot])
                return ref[...]

            acc = acc + pl.run_scoped(values_in, plgpu.ACC((_ROWS, head), jnp.float32))
            pl.when(index + stages < pages)(functools.partial(fetch, index + stages, slot))
            return acc, higher, total

        def filled(shape, value, layout):
            return laid_out(jnp.full(shape, value, jnp.float32), layout)

        empty = (
            filled((_ROWS, head), 0, accumulator),
            filled((_ROWS,), MASKED, accumulator.reduce(1)),
            filled((_ROWS,), 0, accumulator.reduce(1)),
        )
        acc, peak, total = lax.fori_loop(0, pages, one_page, empty)
        if splits == 1:
            acc = acc / lax.broadcast_in_dim(jnp.maximum(total, 1e-30), acc.shape, [0])
        out_s[...] = acc.astype(out_s.dtype)
        peak_s[...] = peak
        total_s[...] = total
        plgpu.commit_smem()
        for made, ref in ((out_s, out_ref), (peak_s, peak_ref), (total_s, total_ref)):
            plgpu.copy_smem_to_gmem(made, ref.at[split, b, h])
        plgpu.wait_smem_to_gmem(0)

    def swizzled(width: int) -> tuple[Any, ...]:
        return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)

    # What is to be merged with others keeps all its digits.
    made = dtype if splits == 1 else jnp.float32
    small, wide = swizzled(64), swizzled(64 if splits == 1 else 32)
    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((splits, blocks, kv, _ROWS, head), made),
            jax.ShapeDtypeStruct((splits, blocks, kv, _ROWS), jnp.float32),
            jax.ShapeDtypeStruct((splits, blocks, kv, _ROWS), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((_ROWS, head), dtype, transforms=small),
            plgpu.SMEM((stages, page_size, head), dtype, transforms=small),
            plgpu.SMEM((stages, page_size, head), dtype, transforms=small),
            plgpu.SMEM((_ROWS, head), made, transforms=wide),
            plgpu.SMEM((_ROWS,), jnp.float32),
            plgpu.SMEM((_ROWS,), jnp.float32),
            plgpu.Barrier(num_barriers=1),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        grid=(kv, blocks, splits),
        grid_names=("head", "block", "split"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )


def _product(a: Array, b: Array) -> Array:
    """In place of one by the device: of narrow numbers, summed up in f32."""
    return jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32))
