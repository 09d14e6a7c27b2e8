"""Where a run writes: found out before the work whether it can, and not after it."""

import os
import tempfile
from pathlib import Path

from kairos_jax.process.command import UsageError


def folder_to_write(flag: str, path: str | Path) -> Path:
    """A folder that a flag names, made if it is not there. Raises UsageError."""
    folder = Path(path)
    try:
        _make(folder)
    except OSError as error:
        raise UsageError(f"--{flag}={path}: {_reason(folder, error)}") from error
    return folder


def file_to_write(flag: str, path: str | Path) -> Path:
    """A file that a flag names. It may be there already; else its folder is made. Raises
    UsageError.
    """
    file = Path(path)
    if file.is_dir():
        raise UsageError(f"--{flag}={path}: it is a folder")
    if file.exists():
        if not os.access(file, os.W_OK):
            raise UsageError(f"--{flag}={path}: it cannot be written to")
        return file
    try:
        _make(file.parent)
    except OSError as error:
        raise UsageError(f"--{flag}={path}: {_reason(file.parent, error)}") from error
    return file


def _make(folder: Path) -> None:
    """Raises OSError where nothing can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _reason(folder: Path, error: OSError) -> str:
    for each in (folder, *folder.parents):
        if each.exists() and not each.is_dir():
            return f"{each} is not a folder"
    return error.strerror or str(error)
