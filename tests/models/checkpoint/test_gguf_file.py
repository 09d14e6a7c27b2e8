"""The GGUF container, against the writer of the `gguf` package."""

import struct

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
        (24, b"\0" * 8, "at byte"),  # the length of the first key
    ],
)
def test_a_broken_header_is_refused(file, at, written, message):
    data = bytearray(file.read_bytes())
    data[at : at + len(written)] = written
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        gguf_file.read(file)
    assert str(caught.value).startswith(f"checkpoint {file}: not a GGUF file, or cut short")


def a_file(path, fields=(), tensors=()):
    """A GGUF file by hand: encoded fields, and (name, kind, rows of bytes) of tensors."""
    text = lambda value: struct.pack("<Q", len(value)) + value.encode()  # noqa: E731
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for key, encoded in fields:
        head += text(key) + encoded
    for name, kind, row in tensors:
        head += text(name) + struct.pack("<IQIQ", 1, row, kind, 0)
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(1024))
    return path


ONE = struct.pack("<II", 4, 1)


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ([("a", ONE), ("a", ONE)], [], "field 'a' is there twice"),
        ([], [("w", 0, 4), ("w", 0, 4)], "tensor 'w' is there twice"),
        ([("general.alignment", struct.pack("<II", 4, 0))], [], "alignment must be at least 1"),
        ([("general.alignment", struct.pack("<II", 5, 2**31))], [], "alignment must be at least 1"),
        ([("general.alignment", struct.pack("<If", 6, 0.5))], [], "alignment must be .* got 0.5"),
        ([("a", struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000)], [], "at byte"),
        ([("a", struct.pack("<IQ", 8, 1) + b"\xff")], [], "at byte .*invalid start byte"),
        ([("a", struct.pack("<I", 99))], [], "at byte"),
    ],
)
def test_damage_is_named(tmp_path, fields, tensors, message):
    with pytest.raises(ValueError, match=f"any.gguf: not a GGUF file.*{message}"):
        gguf_file.read(a_file(tmp_path / "any.gguf", fields, tensors))


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (9, 32, "tensor 'w' has quantization Q8_1, which is not supported; supported are F32, "),
        (15, 256, "tensor 'w' has quantization Q8_K, "),
        (24, 1, "tensor 'w' has quantization I8, "),
        (28, 1, "tensor 'w' has quantization F64, "),
        (4, 32, "tensor 'w' has quantization of number 4, "),  # Q4_2, which llama.cpp dropped
        (12345, 32, "tensor 'w' has quantization of number 12345, "),
        (8, 33, "tensor 'w' has rows of 33, which Q8_0 cannot hold: no multiple of 32"),
        (0, 10**6, "cut short at .* bytes: tensor 'w' ends at byte 4000"),
        (0, 2**62, "cut short at .* bytes: tensor 'w' ends at byte"),
    ],
)
def test_a_tensor_that_cannot_be_read_is_refused_when_the_file_is_opened(
    tmp_path, kind, row, message
):
    with pytest.raises(ValueError, match=f"checkpoint .*any.gguf: {message}"):
        gguf_file.read(a_file(tmp_path / "any.gguf", tensors=[("w", kind, row)]))
