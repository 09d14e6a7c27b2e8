"""Models in one GGUF file or in several, as llama.cpp's gguf-split and converters write them.

The parts of NAME are NAME-00001-of-00003.gguf and so on. The first has the metadata; each has
`split.no` (from 0), `split.count` and `split.tensors.count` (of all parts together).
"""

import re
from pathlib import Path
from typing import Any

from models.checkpoint import gguf_file
from models.checkpoint.fields import Fields
from models.checkpoint.gguf_file import Tensor

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def models_in(directory: Path) -> list[Path]:
    """For each model among a directory's .gguf files, the file to open: its first part."""
    found = {}
    for path in sorted(directory.glob("*.gguf")):
        match = _NAME.fullmatch(path.name)
        first = _part(path, match[1], 1, int(match[3])) if match else path
        found[first] = None
    return list(found)


def read_parts(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As `gguf_file.read`, with the tensors of all parts.

    path: the only file of a model, or the first of its parts.

    Raises:
        ValueError: see `gguf_file.read`; or a part is missing, or is not a part of this model.
    """
    metadata, tensors = gguf_file.read(path)
    fields = Fields(f"checkpoint {path}", metadata)
    count = fields.optional_integer("split.count", least=0) or 1
    if count == 1:
        return metadata, tensors
    stem = _stem(path, fields, count)
    expected = {
        "split.count": count,
        "split.tensors.count": fields.integer("split.tensors.count", least=0),
    }
    for number in range(2, count + 1):
        part = _part(path, stem, number, count)
        if not part.exists():
            raise ValueError(f"checkpoint {part}: no such file: part {number} of {path.name}")
        theirs, more = gguf_file.read(part)
        for key, value in {"split.no": number - 1, **expected}.items():
            if theirs.get(key) != value:
                raise ValueError(
                    f"checkpoint {part}: not part {number} of {path.name}: {key} must be {value}, "
                    f"got {theirs.get(key)!r}"
                )
        for name in more.keys() & tensors.keys():
            raise ValueError(f"checkpoint {part}: tensor {name!r} is also in {tensors[name].file}")
        tensors |= more
    if len(tensors) != expected["split.tensors.count"]:
        raise fields.error("split.tensors.count", f"{len(tensors)}, as the {count} parts hold")
    return metadata, tensors


def _stem(path: Path, fields: Fields, count: int) -> str:
    """What the names of all parts begin with. Refuses a path that is not the first part's."""
    match = _NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise ValueError(
            f"checkpoint {path}: has split.count {count}, so its name must end in "
            f"-00001-of-{count:05d}.gguf for the other parts to be found"
        )
    number = fields.integer("split.no", least=0) + 1
    if number != 1 or int(match[2]) != 1:
        first = _part(path, match[1], 1, count).name
        raise ValueError(f"checkpoint {path}: part {number} of {count}: give the first, {first}")
    return match[1]


def _part(path: Path, stem: str, number: int, count: int) -> Path:
    return path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf")
