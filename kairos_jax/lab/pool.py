"""A pool of processes that computes for this one."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor


@contextlib.contextmanager
def pool(workers: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """As many processes as workers, or as cores; left by an error, they end at once.

    Ctrl-C is for this process alone.
    """
    # Spawned: a fork would copy the locks that other threads hold.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    ignore = signal.signal, (signal.SIGINT, signal.SIG_IGN)
    executor = ProcessPoolExecutor(workers or os.cpu_count() or 1, context, *ignore)
    try:
        yield executor
    except BaseException:
        # Nobody waits for their answers any more.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
