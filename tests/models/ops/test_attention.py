"""One suite for every attention backend, against a plain softmax over contiguous tensors."""

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.kv_cache import StepInput
from models.ops import KERNELS, native

NUM_PAGES, PAGE, KV, GROUP, HEAD, TABLE = 12, 16, 2, 3, 12, 5
CONFIG = ModelConfig("llama", 8, 8, 1, KV * GROUP, KV, HEAD, 8)
# The TPU's kernel multiplies in bfloat16.
TOLERANCE = {"tpu": 0.02}


class Sequences:
    """Random whole sequences and an empty pool; `step` feeds them in row by row."""

    def __init__(self, lengths, kernels, dtype=np.float32, seed=0):
        rng = np.random.default_rng(seed)
        self.attention = jax.jit(kernels.attention)
        self.lengths = lengths
        heads = KV * GROUP
        self.q = [rng.normal(size=(n, heads, HEAD)).astype(dtype) for n in lengths]
        self.k = [rng.normal(size=(n, KV, HEAD)).astype(dtype) for n in lengths]
        self.v = [rng.normal(size=(n, KV, HEAD)).astype(dtype) for n in lengths]
        pages = rng.permutation(NUM_PAGES)[: TABLE * len(lengths)]
        self.tables = pages.reshape(len(lengths), TABLE)
        self.layer = kernels.layout.zeros(CONFIG, NUM_PAGES, PAGE, dtype)

    def step(self, rows, queries):
        """rows: (sequence or None for padding, start, count). Returns [count, N, H] a row."""

        def stacked(source, width):
            out = np.zeros((len(rows), queries, width, HEAD), source[0].dtype)
            for index, (seq, start, count) in enumerate(rows):
                if seq is not None:
                    out[index, :count] = source[seq][start : start + count]
            return jnp.asarray(out)

        step = StepInput(
            tokens=np.zeros((len(rows), queries), np.int32),
            start=np.array([start for _, start, _ in rows], np.int32),
            count=np.array([count for _, _, count in rows], np.int32),
            page_table=np.stack(
                [np.zeros(TABLE) if seq is None else self.tables[seq] for seq, _, _ in rows]
            ).astype(np.int32),
        )
        q, k, v = stacked(self.q, KV * GROUP), stacked(self.k, KV), stacked(self.v, KV)
        step = jax.tree.map(jnp.asarray, step)
        out, self.layer = self.attention(q, k, v, self.layer, step)
        return [np.asarray(out[i, :count], np.float32) for i, (_, _, count) in enumerate(rows)]

    def expected(self, seq, start, count):
        q, k, v = (source[seq].astype(np.float64) for source in (self.q, self.k, self.v))
        out = []
        for position in range(start, start + count):
            keys = np.repeat(k[: position + 1], GROUP, axis=1)
            values = np.repeat(v[: position + 1], GROUP, axis=1)
            scores = np.einsum("nh,tnh->nt", q[position], keys) / np.sqrt(HEAD)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out.append(np.einsum("nt,tnh->nh", weights, values))
        return np.stack(out)


def test_chunked_prefill_then_decode_is_whole_attention(kernels):
    seqs = Sequences([50, 21], KERNELS[kernels])
    steps = [
        # Two rows of one sequence, a partial row of the other, and padding.
        ([(0, 0, 16), (0, 16, 16), (1, 0, 11), (None, 0, 0)], 16),
        ([(1, 11, 9), (0, 32, 16), (None, 0, 0), (0, 48, 1)], 16),
        ([(0, 49, 1), (1, 20, 1), (None, 0, 0)], 1),
    ]
    for rows, queries in steps:
        for row, got in zip(rows, seqs.step(rows, queries), strict=True):
            if row[0] is not None:
                expected = seqs.expected(*row)
                np.testing.assert_allclose(got, expected, atol=TOLERANCE.get(kernels, 2e-6))


def test_padding_rows_write_nothing(kernels):
    seqs = Sequences([8], KERNELS[kernels])
    seqs.step([(None, 0, 0), (None, 0, 0)], 4)
    assert not any(np.asarray(array).any() for array in seqs.layer)


def test_bfloat16(kernels):
    seqs = Sequences([21], KERNELS[kernels], dtype=jnp.bfloat16)
    for rows, queries in (([(0, 0, 20)], 32), ([(0, 20, 1)], 1)):
        (got,) = seqs.step(rows, queries)
        np.testing.assert_allclose(got, seqs.expected(*rows[0]), atol=0.03)


def decode_beside_a_long_row(kernels, dtype=jnp.float32):
    """A decode step of a row of 20 tokens and one of 600. The pages of the first row's table past
    the largest block of a kernel, 512 tokens, hold NaN. Returns the output of the first row.
    """
    lengths, table, heads = (20, 600), 40, KV * GROUP
    rng = np.random.default_rng(0)
    layer = kernels.layout.zeros(CONFIG, 2 * table, PAGE, dtype)
    # In every layout, some dimension is that of the pages.
    axis = next(i for i, size in enumerate(layer[0].shape) if size == 2 * table)
    poison = [slice(None)] * axis + [slice(512 // PAGE, table)]
    layer = type(layer)(*(each.at[tuple(poison)].set(jnp.nan) for each in layer))
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, 1, width, HEAD)), dtype) for width in (heads, KV, KV)
    )
    step = StepInput(
        tokens=jnp.zeros((2, 1), jnp.int32),
        start=jnp.asarray(lengths, jnp.int32) - 1,
        count=jnp.ones(2, jnp.int32),
        page_table=jnp.arange(2 * table, dtype=jnp.int32).reshape(2, table),
    )
    out, _ = jax.jit(kernels.attention)(q, k, v, layer, step)
    return np.asarray(out[0], np.float32)


def test_kernels_read_contexts_as_they_declare(kernels):
    """A padded step reads past a short row, up to the longest one. A mask does not hide NaN."""
    declared = KERNELS[kernels].contexts_of(jnp.float32, HEAD, PAGE)
    out = decode_beside_a_long_row(KERNELS[kernels])
    assert declared == ("ragged" if np.isfinite(out).all() else "padded")


def test_what_the_kernels_in_cpp_leave_to_xla_is_padded(native_kernels):
    kernels = KERNELS["native"]
    assert kernels.contexts_of("float32", HEAD, PAGE) == "ragged"
    assert kernels.contexts_of("bfloat16", HEAD, PAGE) == "padded"
    assert np.isnan(decode_beside_a_long_row(kernels, jnp.bfloat16)).any()
    for head, page in ((6, 16), (64, 6)):
        assert kernels.contexts_of("float32", head, page) == "padded"
        assert not native.takes("float32", head, page)
    assert {name: each.contexts for name, each in KERNELS.items()} == {
        "reference": "padded",
        "cpu": "padded",
        "native": "ragged",
        "gpu": "padded",
        "gpu_hopper": "ragged",
        "gpu_triton": "ragged",
        "tpu": "ragged",
        "tpu_ragged": "ragged",
    }
