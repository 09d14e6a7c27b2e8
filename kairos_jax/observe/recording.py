"""Writes the journal of a run to a file while it grows."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import flags

from kairos_jax.process.command import UsageError
from kairos_jax.process.outputs import file_to_write
from schedulers.ledger.journal import Journal, Record, to_lines

log = logging.getLogger(__name__)

_PERIOD_S = 0.5


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    flags.DEFINE_string("journal", None, "File for a record of every decision, in JSON lines.")


Watch = Callable[[Sequence[Record]], object]


def from_flags(watch: Watch | None = None) -> contextlib.AbstractContextManager[Journal | None]:
    """What `recording` gives, or None without --journal and a watch. Raises UsageError."""
    path = flags.FLAGS.journal
    if not path and watch is None:
        return contextlib.nullcontext()
    # Where nobody asked for a file, there is a writer for the watch's sake.
    return recording(file_to_write("journal", path) if path else Path(os.devnull), watch)


@contextlib.contextmanager
def recording(path: Path, watch: Watch | None = None) -> Iterator[Journal]:
    """A journal on the workers' clock; all of it is in the file when the block ends. If the disk
    fails before that, an error is logged, the file ends there, and the run goes on without it.

    watch: is told the records too, as they come.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        file = path.open("w")
    except OSError as error:
        raise UsageError(f"--journal: {error}") from error
    journal, ended = Journal(time.monotonic), threading.Event()

    def write() -> None:
        last = failed = False
        while not last:
            last = ended.wait(_PERIOD_S)
            records = list(journal.take())  # after a failure too, or they would pile up
            if watch:
                watch(records)
            if failed:
                continue
            try:
                file.writelines(to_lines(records))
                file.flush()
            except OSError as error:
                failed = True
                log.error("the journal %s is cut off, since it cannot be written: %s", path, error)

    # A thread: neither the event loop nor a step may wait for a disk.
    thread = threading.Thread(target=write, name="journal", daemon=True)
    thread.start()
    try:
        yield journal
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):  # logged above
            file.close()
