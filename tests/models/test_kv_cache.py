"""Every layout of the pool: what goes in comes out, through the wire and into any other."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from steps import packed

from models import kv_cache
from models.config import ModelConfig
from models.ops import KERNELS

LAYERS, KV, PAGE, HEAD = 3, 2, 16, 24
CONFIG = ModelConfig("llama", 8, 8, LAYERS, KV, KV, HEAD, 8)
LAYOUTS = {kernels.layout: name for name, kernels in KERNELS.items() if name != "native"}
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUTS.values())


def filled(layout, num_pages, wire, config=CONFIG):
    """A pool with these tokens on its first pages."""
    cache = kv_cache.allocate(kv_cache.abstract(config, layout, num_pages, PAGE, wire.dtype))
    return kv_cache.write_pages(layout, cache, jnp.arange(wire.shape[1] // PAGE), wire)


def copied(times):
    return dataclasses.replace(CONFIG, num_heads=KV * times, num_kv_heads=KV * times)


def random_wire(pages, dtype=np.float32):
    shape = (LAYERS, pages * PAGE, KV, 2, HEAD)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def test_the_layouts_differ():
    assert len(LAYOUTS) >= 3


@pytest.mark.parametrize("source", LAYOUTS, ids=LAYOUTS.values())
@pytest.mark.parametrize("target", LAYOUTS, ids=LAYOUTS.values())
def test_pages_survive_the_wire_into_other_pages(source, target):
    """From a pool that has each head twice into one that has it three times."""
    sent, (twice, thrice) = random_wire(6, jnp.bfloat16), map(copied, (2, 3))
    pool = filled(source, 6, sent, twice)
    read = kv_cache.read_pages(CONFIG, source, pool, np.array([4, 1, 0, 0]))
    assert read.shape == (LAYERS, 4 * PAGE, KV, 2, HEAD)
    # The wire is token-major: token 3 of page 1 is token 16 + 3 of what was read.
    np.testing.assert_array_equal(read[:, PAGE + 3], sent[:, PAGE + 3])
    empty = kv_cache.allocate(kv_cache.abstract(thrice, target, 9, PAGE, jnp.bfloat16))
    written = kv_cache.write_pages(target, empty, np.array([7, 2, 9, 9]), read)
    back = kv_cache.read_pages(CONFIG, target, written, np.arange(9))
    back = np.asarray(back).reshape(LAYERS, 9, PAGE, KV, 2, HEAD)
    want = np.zeros_like(back)
    want[:, 7] = sent[:, 4 * PAGE : 5 * PAGE]
    want[:, 2] = sent[:, PAGE : 2 * PAGE]
    # Page ids past the pool were dropped.
    np.testing.assert_array_equal(back, want)


@each_layout
def test_appended_tokens_are_those_of_the_wire(layout):
    wire = random_wire(4)[0]
    tables = np.array([[3, 1], [4, 0]])
    layer = layout.zeros(CONFIG, 5, PAGE, jnp.float32)
    # 20 tokens on pages 3 and 1, then one more; the second sequence on page 4; and padding.
    for parts in ([(0, 0, 20)], [(0, 20, 1), (1, 0, 3)]):
        step = packed(parts, tables, PAGE, 5, (24, 3))
        firsts = [24 * sequence + start for sequence, start, _ in parts]
        spans = zip(firsts, parts, strict=True)
        rows = jnp.concatenate([wire[first : first + part[2]] for first, part in spans])
        rows = jnp.pad(rows, ((0, 24 - len(rows)), *((0, 0),) * 3), constant_values=7)
        layer = layout.append(rows[:, :, 0], rows[:, :, 1], layer, step)
    back = kv_cache.read_pages(CONFIG, layout, (layer,), np.arange(5))[0]
    back = np.asarray(back).reshape(5, PAGE, KV, 2, HEAD)
    want = np.zeros_like(back)
    want[3], want[1, :5], want[4, :3] = wire[:16], wire[16:21], wire[24:27]
    np.testing.assert_array_equal(back, want)


@each_layout
def test_pages_are_gathered_in_the_order_of_the_table(layout):
    wire = random_wire(4)
    layer = filled(layout, 4, wire)[1]
    table = jnp.array([[3, 0], [1, 1]])
    both = layout.gather(layer, table)
    assert both[0].shape == (2, 2 * PAGE, KV, layout.head_dim(HEAD))
    paged = wire[1].reshape(4, PAGE, KV, 2, HEAD)
    for side, got in enumerate(both):
        want = paged[table, :, :, side].reshape(2, 2 * PAGE, KV, HEAD)
        np.testing.assert_array_equal(got[..., :HEAD], want)
        assert not got[..., HEAD:].any()


def test_what_kernels_cannot_take_is_refused():
    layout = KERNELS["tpu"].layout
    with pytest.raises(ValueError, match=r"page_size must be one of 16, 32, 64, 128.*, got 48"):
        layout.zeros(CONFIG, 4, 48, jnp.float32)
    with pytest.raises(ValueError, match=r"head_dim must be at most .*, got 600"):
        layout.head_dim(600)
