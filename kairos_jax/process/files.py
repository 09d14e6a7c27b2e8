"""Files that flags name."""

import errno
import os
import stat
from pathlib import Path


def check_regular(path: str | Path) -> None:
    """Raises OSError, which says why in `strerror`, unless this is a regular file: to open a FIFO
    would wait for a writer.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
