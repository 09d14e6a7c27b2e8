"""How far a long stage is, on stderr: bars on a terminal, elsewhere a line every ten seconds."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

PERIOD_S = 10.0


class Progress(Protocol):
    """Shows how far a stage is. May be called from any thread."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


def say_on_stderr(line: str) -> None:
    """Prints a line at once."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def bars(say: Callable[[str], object] = say_on_stderr) -> Iterator[Progress]:
    """Yields what shows a bar a stage, for as long as the context lasts. say: takes the lines where
    stderr is no terminal.
    """
    if not sys.stderr.isatty():
        with _every_period(Lines(say)) as lines:
            yield lines.update
        return
    # Not worth the wait where there is no terminal.
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as shown:
        tasks: dict[str, rich_progress.TaskID] = {}
        lock = threading.Lock()

        def update(stage: str, done: int, total: int) -> None:
            with lock:
                if stage not in tasks:
                    tasks[stage] = shown.add_task(stage, total=total)
                shown.update(tasks[stage], completed=done, total=total)

        yield update


@contextlib.contextmanager
def waiting(stage: str) -> Iterator[None]:
    """Prints a line every ten seconds while the context lasts: for what is over soon as a rule, and
    then says nothing.
    """
    lines = Lines(say_on_stderr)
    lines.begin(stage)
    with _every_period(lines):
        yield


class Lines:
    """Progress as lines: when a stage begins and ends, and what is under way at each `tick`.

    say: takes a line. May be used from any thread.
    """

    def __init__(
        self, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._clock, self._lock = say, clock, threading.Lock()
        # Of stages under way: since when, done, total; nothing to be done: that is not known.
        self._stages: dict[str, tuple[float, int, int]] = {}

    def begin(self, stage: str) -> None:
        """A stage of which nothing is known but that it goes on."""
        self._stages[stage] = self._clock(), 0, 0

    def update(self, stage: str, done: int, total: int) -> None:
        """See `Progress`."""
        with self._lock:
            since, *_ = self._stages.get(stage, (self._clock(),))
            if done >= total:
                self._stages.pop(stage, None)
                self._say(f"{stage}: done")
                return
            if stage not in self._stages:
                self._say(f"{stage}: {total} to do")
            self._stages[stage] = since, done, total

    def tick(self) -> None:
        """Says what is under way."""
        with self._lock:
            for stage, (since, done, total) in self._stages.items():
                far = f"{done} of {total}, " if total else ""
                self._say(f"{stage}: {far}{self._clock() - since:.0f} s")


@contextlib.contextmanager
def _every_period(lines: Lines) -> Iterator[Lines]:
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(PERIOD_S):
            lines.tick()

    # A daemon: a process that ends at once does not wait for it.
    threading.Thread(target=run, name="progress", daemon=True).start()
    try:
        yield lines
    finally:
        ended.set()
