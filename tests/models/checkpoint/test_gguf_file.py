"""The GGUF container, against the writer of the `gguf` package."""

import gguf
import numpy as np
import pytest

from models.checkpoint import gguf_file

FIELDS = {
    "uint8": 200,
    "int8": -7,
    "uint16": 60000,
    "int16": -30000,
    "uint32": 2**32 - 1,
    "int32": -(2**31),
    "uint64": 2**64 - 1,
    "int64": -(2**63),
    "float32": 0.25,
    "float64": 1e-300,
    "bool": True,
    "string": "a Ġ 🙂",
}
ARRAYS = {"strings": ["<s>", "é", ""], "ids": [1, -2, 3], "scores": [0.5, -1.5]}


@pytest.fixture
def file(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "any.gguf", "llama")
    for kind, value in FIELDS.items():
        getattr(writer, f"add_{kind}")(kind, value)
    for key, values in ARRAYS.items():
        writer.add_array(key, values)
    writer.add_custom_alignment(64)
    writer.add_tensor("vector", np.arange(3, dtype=np.float32))
    half = np.arange(8, dtype=np.float16).reshape(2, 4)
    writer.add_tensor("matrix", half)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "any.gguf"


def test_fields_are_plain_values(file):
    fields, _ = gguf_file.read(file)
    expected = {"general.architecture": "llama", "general.alignment": 64, **FIELDS, **ARRAYS}
    assert fields == expected
    assert {type(fields[key]) for key in FIELDS} == {int, float, bool, str}


def test_tensors_lie_where_the_alignment_says(file):
    _, tensors = gguf_file.read(file)
    np.testing.assert_array_equal(tensors["vector"].values(), [0, 1, 2])
    assert tensors["matrix"].shape == (2, 4)
    np.testing.assert_array_equal(tensors["matrix"].values(), np.arange(8).reshape(2, 4))


@pytest.mark.parametrize(
    ("at", "written", "message"),
    [
        (4, b"\0\0\0\3", "version must be in .*, got 50331648"),  # of the other byte order
        (8, b"\xff" * 8, "end past its end"),
        (16, b"\xff" * 8, "at byte|end past its end"),
    ],
)
def test_a_broken_header_is_refused(file, at, written, message):
    data = bytearray(file.read_bytes())
    data[at : at + len(written)] = written
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        gguf_file.read(file)
