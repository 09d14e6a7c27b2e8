"""Checks files before they are opened, so that nothing blocks and every error is a ValueError."""

import json
import os
import stat
from pathlib import Path
from typing import Any

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: Path) -> None:
    """Raises ValueError unless this is a regular file: to open a FIFO would wait for a writer."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ValueError(f"checkpoint {path}: no such file") from None
    except OSError as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "of an unknown kind")
        raise ValueError(f"checkpoint {path}: must be a regular file, but is {kind}")


def is_there(path: Path) -> bool:
    """Whether a directory has this entry, even if it is a link to a file that is gone."""
    return os.path.lexists(path)


def unreadable(path: Path, error: OSError) -> ValueError:
    """That the system refuses to read a file, and why."""
    return ValueError(f"checkpoint {path}: cannot be read: {error.strerror or error}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError, with the file's name, if there is none."""
    check_regular(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {path}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"checkpoint {path}: expected a JSON object, got {type(raw).__name__}")
    return raw
