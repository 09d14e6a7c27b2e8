"""One suite for every attention backend, against a plain softmax over contiguous tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import packed

from models.config import ModelConfig
from models.ops import KERNELS, native
from models.ops.attention import Blocks

NUM_PAGES, PAGE, KV, GROUP, HEAD, TABLE = 40, 16, 2, 3, 12, 5
CONFIG = ModelConfig("llama", 8, 8, 1, KV * GROUP, KV, HEAD, 8)
TOLERANCE = 2e-6


class Sequences:
    """Random whole sequences and an empty pool; `step` feeds parts of them in.

    shared: pages that all begin with, which hold the same tokens.
    """

    def __init__(self, lengths, kernels, dtype=np.float32, seed=0, shared=0):
        rng = np.random.default_rng(seed)
        self.attention = jax.jit(kernels.attention)
        self.lengths = lengths
        self.q, self.k, self.v = (
            [rng.normal(size=(n, width, HEAD)).astype(dtype) for n in lengths]
            for width in (KV * GROUP, KV, KV)
        )
        pages = rng.permutation(NUM_PAGES)[: TABLE * len(lengths)]
        self.tables = pages.reshape(len(lengths), TABLE)
        self.tables[:, :shared] = self.tables[0, :shared]
        for source in (self.k, self.v):
            for each in source:
                each[: shared * PAGE] = source[0][: shared * PAGE]
        self.layer = kernels.layout.zeros(CONFIG, NUM_PAGES, PAGE, dtype)

    def step(self, parts, size=None):
        """parts: (sequence, start, count). Returns [count, N, H] of each."""
        inputs = packed(parts, self.tables, PAGE, NUM_PAGES, size)
        tokens = inputs.tokens.shape[0]

        def flat(source):
            rows = [source[seq][start : start + count] for seq, start, count in parts]
            out = np.concatenate([source[0][:0], *rows])
            return jnp.pad(jnp.asarray(out), ((0, tokens - len(out)), (0, 0), (0, 0)))

        qkv = flat(self.q), flat(self.k), flat(self.v)
        out, self.layer = self.attention(*qkv, self.layer, inputs)
        ends = np.cumsum([count for *_, count in parts])
        assert np.isfinite(np.asarray(out, np.float32)).all(), "padding is finite too"
        return np.split(np.asarray(out, np.float32), ends)[: len(parts)]

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

    def check(self, parts, size=None, atol=TOLERANCE):
        for part, got in zip(parts, self.step(parts, size), strict=True):
            np.testing.assert_allclose(got, self.expected(*part), atol=atol)


def test_chunks_then_decode_are_whole_attention(kernels):
    seqs = Sequences([50, 21], KERNELS[kernels])
    seqs.check([(0, 0, 32), (1, 0, 11)], (48, 3))
    seqs.check([(1, 11, 9), (0, 32, 17)], (48, 3))
    seqs.check([(0, 49, 1), (1, 20, 1)], (3, 3))


@pytest.mark.parametrize("seed", range(4))
def test_random_ragged_batches(kernels, seed):
    """Sequences that come in at any rate, from one token to all, at the edges of pages too; some
    share their first pages.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2 * PAGE + 1, TABLE * PAGE, 8)
    seqs = Sequences(lengths, KERNELS[kernels], seed=seed, shared=2)
    done = np.zeros(8, int)
    seqs.check([(0, 0, 2 * PAGE)], (64, 8))
    done[:] = 2 * PAGE
    while (done < lengths).any():
        parts, room = [], 64
        for seq in rng.permutation(8):
            left = int(lengths[seq] - done[seq])
            edge = PAGE - int(done[seq]) % PAGE
            count = min(int(rng.choice([0, 1, 1, edge, edge + 1, left])), left, room)
            if count:
                parts.append((int(seq), int(done[seq]), count))
                done[seq] += count
                room -= count
        seqs.check(parts, (64, 8))


@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_a_step_with_a_token_for_each_sequence_may_hold_a_chunk(kernels, tokens):
    """Such shapes have decode steps, but nothing keeps other work out of them."""
    seqs = Sequences([30, 20], KERNELS[kernels])
    seqs.check([(0, 0, 20), (1, 0, 12)])
    seqs.check([(0, 20, tokens)], (tokens, tokens))
    if tokens > 2:
        seqs.check([(1, 12, tokens - 2), (0, 28, 1)], (tokens, tokens))


def test_padding_writes_nothing(kernels):
    seqs = Sequences([8], KERNELS[kernels])
    for size in ((8, 2), (2, 2)):
        assert seqs.step([], size) == []
    assert not any(np.asarray(array).any() for array in seqs.layer)


def test_bfloat16(kernels):
    seqs = Sequences([21], KERNELS[kernels], dtype=jnp.bfloat16)
    seqs.check([(0, 0, 20)], (32, 2), atol=0.03)
    seqs.check([(0, 20, 1)], (1, 1), atol=0.03)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_blocks_hold_each_token_once_and_lie_within_a_sequence(size):
    rng = np.random.default_rng(size)
    for _ in range(20):
        counts = rng.integers(1, 20, rng.integers(0, 6))
        tables = np.zeros((6, 8), int)
        parts = [(i, int(rng.integers(0, 50)), int(count)) for i, count in enumerate(counts)]
        step = packed(parts, tables, 16, 8, (128, 7))
        blocks = jax.tree.map(np.asarray, Blocks.of(step, size))
        assert int(Blocks.of(step, size).num) == sum(-(-count // size) for count in counts)
        held = [
            (int(first) + at, int(start) + at)
            for first, start, count in zip(blocks.first, blocks.start, blocks.counts, strict=True)
            for at in range(count)
        ]
        total = int(counts.sum())
        assert held == [(token, int(step.positions[token])) for token in range(total)]
        owners = np.repeat(np.arange(len(parts)), counts)
        assert [int(blocks.sequence[place // size]) for place in blocks.places[:total]] == [*owners]
        x = jnp.arange(128)[:, None, None]
        back = Blocks.of(step, size).joined(Blocks.of(step, size).cut(x, size))
        np.testing.assert_array_equal(back[:total], x[:total])


def decode_beside_a_long_one(kernels, dtype=jnp.float32):
    """A decode step of a sequence of 20 tokens and one of 600. The pages of the first one's table
    past the largest block of a kernel, 512 tokens, hold NaN. Returns the output of the first.
    """
    lengths, table, heads = (20, 600), 40, KV * GROUP
    rng = np.random.default_rng(0)
    layer = kernels.layout.zeros(CONFIG, 2 * table, PAGE, dtype)
    # In every layout, some dimension is that of the pages.
    axis = next(i for i, size in enumerate(layer[0].shape) if size == 2 * table)
    poison = [slice(None)] * axis + [slice(512 // PAGE, table)]
    layer = type(layer)(*(each.at[tuple(poison)].set(jnp.nan) for each in layer))
    q, k, v = (jnp.asarray(rng.normal(size=(2, width, HEAD)), dtype) for width in (heads, KV, KV))
    parts = [(index, length - 1, 1) for index, length in enumerate(lengths)]
    step = packed(parts, np.arange(2 * table).reshape(2, table), PAGE, 2 * table)
    out, _ = jax.jit(kernels.attention)(q, k, v, layer, step)
    return np.asarray(out[0], np.float32)


def test_kernels_read_contexts_as_they_declare(kernels):
    """A padded step reads past a short context, up to the longest one. A mask does not hide NaN."""
    declared = KERNELS[kernels].contexts_of(jnp.float32, HEAD, PAGE)
    out = decode_beside_a_long_one(KERNELS[kernels])
    assert declared == ("ragged" if np.isfinite(out).all() else "padded")


def test_what_the_kernels_in_cpp_leave_to_xla_is_padded(native_kernels):
    kernels = KERNELS["native"]
    assert kernels.contexts_of("float32", HEAD, PAGE) == "ragged"
    assert kernels.contexts_of("bfloat16", HEAD, PAGE) == "padded"
    assert np.isnan(decode_beside_a_long_one(kernels, jnp.bfloat16)).any()
    for head, page in ((6, 16), (64, 6)):
        assert kernels.contexts_of("float32", head, page) == "padded"
        assert not native.takes("float32", head, page)
    assert {name: each.contexts for name, each in KERNELS.items()} == {
        "reference": "padded",
        "cpu": "padded",
        "native": "ragged",
        "gpu": "padded",
        "gpu_hopper": "ragged",
        "tpu": "ragged",
    }
