"""The user's cache: what a start keeps for later ones. Each folder may be deleted at any time.

Without it a start takes longer, and that is all.
"""

import contextlib
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kairos_jax.process.logs import ONCE

log = logging.getLogger(__name__)


class NotPrivate(Exception):
    """A folder of the cache cannot be used, since others could have changed what it holds, or it
    cannot be made or written to; the message says which, and what to do.
    """


def cache_dir(name: str) -> Path:
    """A folder of ours in the user's cache, whether it is there yet or not."""
    root = os.environ.get("XDG_CACHE_HOME")
    if not root:
        try:
            root = Path.home() / ".cache"
        except RuntimeError:  # of a user without a home, as in a container
            root = "/.cache"
    return Path(root) / "kairos_jax" / name


def private_cache_dir(name: str) -> Path:
    """As `cache_dir`, for files that are run or trusted as they are: made if it is not there, and
    closed to others. Raises NotPrivate.
    """
    path = cache_dir(name)
    make_private(path.parent)
    make_private(path)
    return path


@contextlib.contextmanager
def cache_or_temporary(name: str) -> Iterator[Path]:
    """As `private_cache_dir`; where the cache cannot be used, a folder that is there for as long as
    the context lasts.
    """
    try:
        path = private_cache_dir(name)
    except NotPrivate as error:
        say_unusable(error)
        with tempfile.TemporaryDirectory(prefix="kairos_jax-") as temporary:
            yield Path(temporary)
        return
    yield path


def say_unusable(error: NotPrivate) -> None:
    """Logs, once for all folders, that the process goes on without the cache."""
    log.warning("nothing is kept for later starts: %s", error, extra=ONCE)


def make_private(folder: Path) -> None:
    """Makes a folder, or checks that it is this user's own and not writable by others; what others
    may read is closed to them. Raises NotPrivate.
    """
    advice = "XDG_CACHE_HOME names another place for the cache"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        mode = stat.S_IMODE(found.st_mode)
        if found.st_uid != os.getuid() or mode & 0o022:
            raise NotPrivate(
                f"{folder} belongs to another user, or others can write to it (mode {mode:o}): "
                f"remove it, or {advice}"
            )
        if mode & 0o077:
            folder.chmod(0o700)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise NotPrivate(f"{folder} cannot be written to; {advice}")
    except OSError as error:
        raise NotPrivate(f"{folder}: {error.strerror}; {advice}") from error
