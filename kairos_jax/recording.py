"""Writes the journal of a run to a file while it grows."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from kairos_jax.launch import UsageError
from schedulers.journal import Journal, to_lines

_PERIOD_S = 0.5


@contextlib.contextmanager
def recording(path: Path) -> Iterator[Journal]:
    """A journal on the workers' clock; all of it is in the file when the block ends.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        file = path.open("w")
    except OSError as error:
        raise UsageError(f"--journal: {error}") from error
    journal, ended = Journal(time.monotonic), threading.Event()

    def write() -> None:
        last = False
        while not last:
            last = ended.wait(_PERIOD_S)
            file.writelines(to_lines(journal.take()))
            file.flush()

    # A thread: neither the event loop nor a step may wait for a disk.
    thread = threading.Thread(target=write, name="journal", daemon=True)
    with file:
        thread.start()
        try:
            yield journal
        finally:
            ended.set()
            thread.join()
