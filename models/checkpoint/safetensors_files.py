"""The *.safetensors files of a directory as one set of tensors, each in one file."""

import contextlib
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from models.checkpoint.files import check_regular, is_there, read_json, unreadable

INDEX = "model.safetensors.index.json"

# Not weights, but buffers that old versions saved.
_BUFFER = re.compile(
    r"(.*\.)?(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|(self_)?attn\.bias)"
)
# Mistral's own form of the same weights, which lies beside that of transformers.
_OTHER_FORM = "consolidated*.safetensors"
_DTYPES = ("F64", "F32", "F16", "BF16")


def open_tensors(
    stack: contextlib.ExitStack,
    directory: Path,
    *,
    ignored: Collection[str],
    known: Collection[str],
) -> dict[str, Any]:
    """Name -> safetensors slice, of all files of a directory or of those in its index.

    ignored: names that are left out, as buffers are. known: names of weights: their dtypes are
    checked. A tensor that the index promises in one file is not read from another.

    Raises:
        ValueError: a file cannot be read or lacks a tensor that the index promises, two files have
            the same tensor, or a weight is of no float type that can be read.
    """
    promised = _promised(directory)
    slices, holders = {}, {}
    for file in _files(directory, promised):
        opened = _open(stack, file)
        names = set(opened.keys())
        for name in sorted(names):
            if name in ignored or _BUFFER.fullmatch(name) or promised.get(name, file) != file:
                continue
            if name in holders:
                raise ValueError(f"checkpoint {file}: tensor {name!r} is also in {holders[name]}")
            slices[name], holders[name] = opened.get_slice(name), file
            if name in known and (dtype := slices[name].get_dtype()) not in _DTYPES:
                raise ValueError(
                    f"checkpoint {file}: tensor {name!r} must be of dtype {', '.join(_DTYPES)}, "
                    f"got {dtype}: quantized weights are not supported"
                )
        for name, holder in promised.items():
            if holder == file and name not in names:
                raise ValueError(
                    f"checkpoint {file}: tensor {name!r} is missing, which {INDEX} says is there"
                )
    return slices


def _files(directory: Path, promised: dict[str, Path]) -> list[Path]:
    if promised:
        return sorted(set(promised.values()))
    files = set(directory.glob("*.safetensors"))
    return sorted(files - set(directory.glob(_OTHER_FORM)) or files)


def _promised(directory: Path) -> dict[str, Path]:
    """Tensor -> the file that holds it, as the index says; empty if there is none."""
    index = directory / INDEX
    if not is_there(index):
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"checkpoint {index}: weight_map must be an object of file names by tensor, got "
            f"{'none' if weight_map is None else type(weight_map).__name__}"
        )
    for name, file in weight_map.items():
        inside = isinstance(file, str) and file and not PurePosixPath(file).is_absolute()
        if not inside or ".." in PurePosixPath(file).parts:
            raise ValueError(
                f"checkpoint {index}: weight_map of {name!r} must be a file in this directory, got "
                f"{file!r}"
            )
    return {name: directory / file for name, file in weight_map.items()}


def _open(stack: contextlib.ExitStack, file: Path) -> Any:
    check_regular(file)
    try:
        return stack.enter_context(safe_open(file, framework="numpy"))
    except OSError as error:
        raise unreadable(file, error) from None
    except SafetensorError as error:
        raise ValueError(f"checkpoint {file}: {error}") from error
