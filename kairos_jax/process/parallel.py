"""Jobs on threads that a Ctrl-C need not wait for."""

import queue
import threading
from collections.abc import Callable, Sequence


def parallel(jobs: Sequence[Callable[[], object]], at_once: int | None = None) -> None:
    """Runs the jobs on threads, `at_once` of them or one for each; the first error is raised here,
    and jobs that have not begun by then do not run.

    Daemon threads: what they are at, such as a compilation, may take long to end.
    """
    left: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
    for job in jobs:
        left.put(job)
    errors: list[BaseException] = []

    def run() -> None:
        while not errors:
            try:
                job = left.get_nowait()
            except queue.Empty:
                return
            try:
                job()
            except BaseException as error:
                errors.append(error)

    count = min(at_once or len(jobs), len(jobs))
    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
