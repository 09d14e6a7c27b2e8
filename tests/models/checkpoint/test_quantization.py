"""Each quantization that is read, against values that are not the `gguf` package's own."""

import ggml_blocks
import gguf
import numpy as np
import pytest
from checkpoints import close
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from models.checkpoint import gguf_file

# What the package can quantize as well, and how far off a number in -1...1 may come back: half a
# step, and what the scale loses to its 16 bits (or to its power of 2).
STEPS = {
    **{"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.55 / 127},
    **{"Q4_0": 1.01 / 8, "Q4_1": 0.51 * 2 / 15, "Q5_0": 1.01 / 16, "Q5_1": 0.51 * 2 / 31},
    **{"TQ1_0": 0.501, "TQ2_0": 0.501, "MXFP4": 1.0},
}


def read_back(path, kind, rows):
    """The tensor that a GGUF file with these bytes holds."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", rows, raw_dtype=kind)
    close(writer)
    return gguf_file.read(path)[1]["w"].values()


def random_rows(kind, rng):
    """Three rows of two blocks: bytes at random, but for the floats, which are finite."""
    numbers, size = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (6, size), dtype=np.uint8)
    for at in ggml_blocks.HALVES.get(kind.name, ()):
        halves = rng.uniform(-1, 1, 6).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(6, 2)
    if kind.name == "F32":
        blocks[:] = rng.normal(size=6).astype(np.float32).view(np.uint8).reshape(6, 4)
    if kind.name == "IQ1_M":  # The exponent of its float: the high nibble of the last byte.
        blocks[:, 55] = blocks[:, 55] & 0x8F | 0x30
    if kind.name == "MXFP4":
        blocks[:, 0] = rng.integers(100, 140, 6)
    return blocks.reshape(3, 2 * size), blocks, numbers


@pytest.mark.parametrize("kind", [GGMLQuantizationType[name] for name in gguf_file.KINDS])
def test_random_blocks_are_what_their_layout_says(tmp_path, kind):
    rows, blocks, numbers = random_rows(kind, np.random.default_rng(kind.value))
    expected = [ggml_blocks.REFERENCES[kind.name](bytes(block)) for block in blocks]
    assert {len(values) for values in expected} == {numbers}
    expected = np.array(expected).reshape(3, 2 * numbers)
    found = read_back(tmp_path / "any.gguf", kind, rows)
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    assert len(np.unique(np.abs(found))) > 2, "not all alike"


@pytest.mark.parametrize("name", STEPS)
def test_what_the_package_quantizes_comes_back_within_a_step(tmp_path, name):
    kind = GGMLQuantizationType[name]
    values = np.random.default_rng(0).uniform(-1, 1, (5, 512)).astype(np.float32)
    rows = gguf.quants.quantize(values, kind)
    found = read_back(tmp_path / "any.gguf", kind, rows)
    np.testing.assert_allclose(found, values, rtol=0, atol=STEPS[name])


@pytest.mark.parametrize("kind", ggml_blocks.SHA256)
def test_the_lattices_are_those_of_ggml(kind):
    assert ggml_blocks.checksum(kind) == ggml_blocks.SHA256[kind]


def test_blocks_with_known_values():
    """A few by hand, so that the reference does not only agree with the package."""
    one = np.float16(1).tobytes()
    assert ggml_blocks.q4_0(one + bytes([0x98] * 16)) == [0] * 16 + [1] * 16
    assert ggml_blocks.q8_0(one + bytes([255] * 32)) == [-1] * 32
    scales = bytes([1] * 4 + [0] * 4 + [1] * 4)  # of 1 in each 32, of 0 for each minimum
    assert ggml_blocks.q4_k(one * 2 + scales + bytes([0x21] * 128)) == ([1] * 32 + [2] * 32) * 4
    assert ggml_blocks.q6_k(bytes([0x11] * 128 + [0] * 64 + [1] * 16) + one) == [-31] * 256
    assert ggml_blocks.mxfp4(bytes([128] + [0x7F] * 16)) == [-12] * 16 + [12] * 16
    # Lattice point 0 of IQ2_XXS is all 8; a scale of 0.5 / 4 and no signs.
    assert ggml_blocks.iq2_xxs(one + bytes(64)) == [1] * 256
