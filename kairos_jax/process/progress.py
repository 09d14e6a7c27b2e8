"""Progress bars on stderr; plain lines where it is no terminal."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Protocol

from rich import progress as rich_progress
from rich.console import Console


class Progress(Protocol):
    """Shows how far a stage is. May be called from any thread."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


@contextlib.contextmanager
def bars() -> Iterator[Progress]:
    """Yields what shows a bar a stage, for as long as the context lasts."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain(console)
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
    )
    with rich_progress.Progress(*columns, console=console) as shown:
        tasks: dict[str, rich_progress.TaskID] = {}
        lock = threading.Lock()

        def update(stage: str, done: int, total: int) -> None:
            with lock:
                if stage not in tasks:
                    tasks[stage] = shown.add_task(stage, total=total)
                shown.update(tasks[stage], completed=done)

        yield update


def _plain(console: Console) -> Progress:
    def update(stage: str, done: int, total: int) -> None:
        if done in (0, total):
            console.print(f"{stage}: {'done' if done else f'{total} to do'}", highlight=False)

    return update
