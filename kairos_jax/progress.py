"""Progress bars on stderr; plain lines where it is no terminal."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function (stage, steps done, steps in all) that may be called from any thread."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        tasks: dict[str, int] = {}
        lock = threading.Lock()

        def update(stage: str, done: int, total: int) -> None:
            with lock:
                if stage not in tasks:
                    tasks[stage] = progress.add_task(stage, total=total)
                progress.update(progress.tasks[tasks[stage]].id, completed=done)

        yield update


def _plain(console: Console) -> Callable[[str, int, int], None]:
    def update(stage: str, done: int, total: int) -> None:
        if done in (0, total):
            console.print(f"{stage}: {'done' if done else f'{total} to do'}", highlight=False)

    return update
