"""Reads profiles: files that `kairos_jax.profile` measured, or ones that come with the package."""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from absl import flags

from kairos_jax.process.command import UsageError
from kairos_jax.process.files import check_regular
from schedulers.cost import KINDS, CostModel
from schedulers.fitting import usable


def define_flags() -> None:
    """Of servers. Not at import: other binaries have flags of the same names."""
    flags.DEFINE_string(
        "profile", None, "Step-time profile; default: its own is measured and kept."
    )


def read(path: str | Path, kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """The profile in a file, or of that name among `packaged()`, with times of these kinds at
    least. Parts that are worse than none are left out: see `schedulers.fitting.usable`.

    Raises UsageError if there is none, or a cost model cannot use it.
    """
    try:
        named = packaged().get(str(path))
        if named is None and not Path(path).exists():
            raise ValueError(
                f"no such file, nor a profile of the package ({', '.join(packaged())})"
            )
        if named is None:
            check_regular(path)
        profile = json.loads((named or Path(path)).read_text(encoding="utf-8"))
        if not isinstance(profile, dict):
            raise ValueError(f"must be a JSON object, got {type(profile).__name__}")
        CostModel.from_profile(profile, kinds)
        profile = usable(profile)
    except OSError as error:
        raise UsageError(f"profile {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"profile {path}: {error}") from error
    return profile


def packaged() -> dict[str, Any]:
    """Where the profiles that come with the package are, by name."""
    files = (resources.files("schedulers") / "profiles").iterdir()
    return {
        file.name.removesuffix(".json"): file
        for file in sorted(files, key=lambda file: file.name)
        if file.name.endswith(".json")
    }
