"""The GGUF container: metadata and where the tensors lie.

The reader of the `gguf` package makes several NumPy arrays of each of the 98,000 strings that
SmolLM2's tokenizer has, which took four seconds; this takes a tenth of one.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

_VERSIONS = (2, 3)
# struct's letters by GGUF's numbers.
_SCALARS: dict[int, str] = dict(
    zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
)
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """One tensor, quantized as it lies in the file. shape: outermost dimension first."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: NDArray[np.uint8]

    def values(self) -> NDArray[np.float32]:
        """The tensor in f32. Raises NotImplementedError for a kind that cannot be dequantized."""
        return dequantize(self.data, self.kind).reshape(self.shape)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata as plain values by key, and the tensors, mapped and not yet read, by name.

    Raises:
        ValueError: this is no GGUF file of little-endian order, or it ends too early.
    """
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    data = np.memmap(path, mode="r")
    cursor = _Cursor(data.data)
    try:
        if bytes(cursor.take(4)) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, num_tensors, num_fields = cursor.unpack("<IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"version must be in {_VERSIONS}, got {version}")
        fields = {cursor.string(): cursor.value() for _ in range(num_fields)}
        described = [_describe(cursor) for _ in range(num_tensors)]
        alignment = fields.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        begin = -(-cursor.at // alignment) * alignment
    except (struct.error, KeyError, TypeError, ArithmeticError, MemoryError) as error:
        raise ValueError(f"at byte {cursor.at}: {error!r}") from error
    return fields, {each[0]: _tensor(data, begin, *each) for each in described}


class _Cursor:
    """Reads a file's values one after the other."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def take(self, size: int) -> memoryview:
        end = self.at + size
        if end > len(self.data):
            raise ValueError(f"{size} bytes at byte {self.at} end past its end")
        part, self.at = self.data[self.at : end], end
        return part

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def string(self) -> str:
        return str(self.take(*self.unpack("<Q")), "utf-8")

    def value(self) -> Any:
        return self._value_of(self.unpack("<I")[0])

    def _value_of(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.unpack(f"<{_SCALARS[kind]}")[0]
        item, count = self.unpack("<IQ")
        if item == _STRING:
            return [self.string() for _ in range(count)]
        if item == _ARRAY:
            return [self._value_of(item) for _ in range(count)]
        return list(self.unpack(f"<{count}{_SCALARS[item]}"))


def _describe(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, kind and offset of the next tensor."""
    name = cursor.string()
    (dims,) = cursor.unpack("<I")
    shape = cursor.unpack(f"<{dims}Q")
    kind, offset = cursor.unpack("<IQ")
    return name, tuple(reversed(shape)), kind, offset


def _tensor(
    data: np.memmap, begin: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> Tensor:
    quantization = GGMLQuantizationType(kind)
    block, size = GGML_QUANT_SIZES[quantization]
    if shape and shape[-1] % block:
        raise ValueError(f"tensor {name!r} has rows of {shape[-1]}, no multiple of {block}")
    first = begin + offset
    last = first + math.prod(shape) // block * size
    if last > len(data):
        raise ValueError(f"tensor {name!r} ends at byte {last}, past its end")
    # A plain array: slices of a memmap cost more.
    raw = np.asarray(data[first:last]).reshape(*shape[:-1], -1)
    return Tensor(name, shape, quantization, raw)
