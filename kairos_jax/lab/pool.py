"""A pool of processes that computes for this one."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any


@contextlib.contextmanager
def pool(
    workers: int | None = None, begin: Callable[..., object] | None = None, *args: Any
) -> Iterator[ProcessPoolExecutor]:
    """As many processes as workers, or as cores; left by an error, they end at once.

    Ctrl-C is for this process alone. begin: called with `args` in each process first.
    """
    # Spawned: a fork would copy the locks that other threads hold.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(workers or os.cpu_count() or 1, context, _begin, (begin, args))
    try:
        yield executor
    except BaseException:
        # Nobody waits for their answers any more.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(begin: Callable[..., object] | None, args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if begin:
        begin(*args)
