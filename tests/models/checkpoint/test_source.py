"""How a tensor lies follows from the declaration of its weight."""

import numpy as np
import pytest

from models.checkpoint import source
from models.weights import Weight


def weight(axes, shape, num_inputs=0):
    return Weight("w", shape, axes, num_inputs, False, "", "")


@pytest.mark.parametrize(
    ("declared", "index", "source_index"),
    [
        (
            weight(("embed", "heads", "head_dim"), (6, 4, 2), 1),
            np.s_[:, 1:3, :],
            np.s_[2:6, 0:6],
        ),
        (
            weight(("heads", "head_dim", "embed"), (4, 2, 6), 2),
            np.s_[2:4, :, :],
            np.s_[0:6, 4:8],
        ),
        (weight(("kv_heads", "head_dim"), (4, 2)), np.s_[1:2, :], np.s_[2:4]),
        (weight(("head_dim",), (4,)), np.s_[0:4,], np.s_[0:4]),
        (weight(("embed", "mlp"), (6, 8), 1), np.s_[:, 4:8], np.s_[4:8, 0:6]),
        (weight(("mlp", "embed"), (8, 6), 1), np.s_[0:4, :], np.s_[0:6, 0:4]),
        (weight(("vocab", "embed"), (8, 6)), np.s_[4:8, :], np.s_[4:8, 0:6]),
    ],
)
def test_only_the_part_asked_for_is_read(declared, index, source_index):
    shape = declared.shape
    tensor = np.arange(np.prod(shape)).reshape(source.source_shape(declared))
    asked = []

    def read(index):
        asked.append(index)
        return tensor[index]

    everything = source.take_part(declared, (slice(None),) * len(shape), tensor.__getitem__)
    part = source.take_part(declared, index, read)
    assert asked == [source_index if isinstance(source_index, tuple) else (source_index,)]
    np.testing.assert_array_equal(part, everything[index])
    np.testing.assert_array_equal(source.to_source(declared, everything), tensor)
