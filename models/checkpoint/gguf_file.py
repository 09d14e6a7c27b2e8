"""The GGUF container: metadata and where the tensors lie.

The reader of the `gguf` package makes several NumPy arrays of each of the 98,000 strings that
SmolLM2's tokenizer has, which took four seconds; this takes a tenth of one.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from models.checkpoint.files import check_regular, unreadable

KINDS = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
"""Names of the quantizations that are read, each held against values that are not this package's
(tests/models/checkpoint/test_quantization.py).
"""

_VERSIONS = (2, 3)
# struct's letters by GGUF's numbers.
_SCALARS: dict[int, str] = dict(
    zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
)
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """One tensor, quantized as it lies in its file. shape: outermost dimension first."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: NDArray[np.uint8]

    def values(self) -> NDArray[np.float32]:
        """The tensor in f32."""
        return dequantize(self.data, self.kind).reshape(self.shape)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata as plain values by key, and the tensors, mapped and not yet read, by name.

    Raises:
        ValueError: this is no GGUF file of little-endian order, it ends too early, it has a key or
            a tensor twice, or a tensor of a quantization that is not read.
    """
    check_regular(path)
    try:
        size = path.stat().st_size
        data = np.memmap(path, mode="r") if size else np.empty(0, np.uint8)
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        fields, described, begin = _parse(_Cursor(data.data))
    except ValueError as error:
        raise ValueError(
            f"checkpoint {path}: not a GGUF file, or cut short at {size} bytes ({error})"
        ) from error
    try:
        return fields, {each[0]: _tensor(path, data, begin, *each) for each in described}
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from error


_Described = tuple[str, tuple[int, ...], int, int]
"""Name, shape, kind and offset of a tensor."""


def _parse(cursor: "_Cursor") -> tuple[dict[str, Any], list[_Described], int]:
    """Metadata, tensors, and the byte at which their data begins."""
    try:
        if bytes(cursor.take(4)) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, num_tensors, num_fields = cursor.unpack("<IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"version must be in {_VERSIONS}, got {version}")
        pairs = [(cursor.string(), cursor.value()) for _ in range(num_fields)]
        fields = dict(pairs)
        _refuse_twice("field", [key for key, _ in pairs])
        described = [_describe(cursor) for _ in range(num_tensors)]
        _refuse_twice("tensor", [each[0] for each in described])
        alignment = fields.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment must be at least 1, got {alignment!r}")
        return fields, described, -(-cursor.at // alignment) * alignment
    except (
        *(struct.error, KeyError, TypeError, ArithmeticError, MemoryError, RecursionError),
        UnicodeDecodeError,
    ) as error:
        raise ValueError(f"at byte {cursor.at}: {error!r}") from error


def _refuse_twice(what: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"{what} {twice!r} is there twice")


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


def _describe(cursor: _Cursor) -> _Described:
    name = cursor.string()
    (dims,) = cursor.unpack("<I")
    shape = cursor.unpack(f"<{dims}Q")
    kind, offset = cursor.unpack("<IQ")
    return name, tuple(reversed(shape)), kind, offset


def _tensor(
    file: Path,
    data: np.ndarray,
    begin: int,
    name: str,
    shape: tuple[int, ...],
    number: int,
    offset: int,
) -> Tensor:
    kind = next((each for each in GGMLQuantizationType if each == number), None)
    if kind is None or kind.name not in KINDS:
        what = f"of number {number}" if kind is None else kind.name
        raise ValueError(
            f"tensor {name!r} has quantization {what}, which is not supported; supported are "
            f"{', '.join(KINDS)}"
        )
    block, size = GGML_QUANT_SIZES[kind]
    row = shape[-1] if shape else 1
    if row % block:
        raise ValueError(
            f"tensor {name!r} has rows of {row}, which {kind.name} cannot hold: no multiple of "
            f"{block}"
        )
    first = begin + offset
    last = first + math.prod(shape) // block * size
    if last > len(data):
        raise ValueError(f"cut short at {len(data)} bytes: tensor {name!r} ends at byte {last}")
    # A plain array: slices of a memmap cost more.
    raw = np.asarray(data[first:last]).reshape(*shape[:-1], row // block * size)
    return Tensor(file, name, shape, kind, raw)
