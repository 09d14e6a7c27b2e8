import jax
import numpy as np

from models import kv_cache
from models.kv_cache import LayerCache


def test_pages_survive_the_wire_into_other_pages():
    rng = np.random.default_rng(0)

    def pool(num_pages, fill):
        layers = []
        for _ in range(3):
            k, v = fill((num_pages, 2, 16, 8)), fill((num_pages, 2, 8, 16))
            layers.append(LayerCache(jax.numpy.asarray(k), jax.numpy.asarray(v)))
        return tuple(layers)

    source = pool(6, lambda shape: rng.normal(size=shape).astype(np.float32))
    target = pool(9, lambda shape: np.zeros(shape, np.float32))
    wire = kv_cache.read_pages(source, np.array([4, 1, 0, 0]))
    assert wire.shape == (3, 4 * 8, 2, 2, 16)
    # The wire is token-major: token 3 of page 1 is token 8 + 3 of the wire.
    np.testing.assert_array_equal(wire[2, 11, 1, 0], source[2].k[1, 1, :, 3])
    np.testing.assert_array_equal(wire[2, 11, 1, 1], source[2].v[1, 1, 3])
    written = kv_cache.write_pages(target, np.array([7, 2, 9, 9]), wire)
    for layer, (old, new) in enumerate(zip(source, written, strict=True)):
        for name in ("k", "v"):
            got, want = getattr(new, name), getattr(old, name)
            np.testing.assert_array_equal(got[7], want[4], err_msg=f"layer {layer}")
            np.testing.assert_array_equal(got[2], want[1])
            others = np.delete(np.asarray(got), [7, 2], axis=0)
            assert not others.any(), "page ids past the pool must be dropped"
