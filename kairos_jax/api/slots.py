"""The requests that a server holds: each has a slot from the first byte of its body to the last
byte of its answer, whatever API it comes by.
"""

import asyncio
import os
from collections.abc import Callable
from typing import TypeVar

from kairos_jax.routing.fleet import no_slot

T = TypeVar("T")


class Slots:
    """Used on one event loop. limit: slots in all; a request takes one for each of its choices.
    wait_s: predicts in how many seconds a slot may be free. on_full: called when none is.
    """

    def __init__(self, limit: int = 0):
        self.limit, self.num_held = limit, 0
        self.wait_s: Callable[[], float] = lambda: 0.0
        self.on_full: Callable[[], None] = lambda: None
        self._idle = asyncio.Event()
        self._idle.set()
        # Few at once: a long text takes much memory and a core while it is tokenized.
        self._tokenizing = asyncio.Semaphore(max(1, (os.cpu_count() or 1) // 2))

    def take(self) -> "Slot":
        """A slot for a request that has come. Raises Full."""
        slot = Slot(self)
        slot.grow(1)
        return slot

    async def idle(self) -> None:
        """Returns when no slot is held."""
        await self._idle.wait()

    async def tokenize(self, job: Callable[[], T]) -> T:
        """What `job` returns, which tokenizes, on a thread."""
        async with self._tokenizing:
            return await asyncio.to_thread(job)

    def _change(self, count: int) -> None:
        if count > 0 and self.num_held + count > self.limit:
            self.on_full()
            raise no_slot(self.limit, self.wait_s())
        self.num_held += count
        if self.num_held:
            self._idle.clear()
        else:
            self._idle.set()


class Slot:
    """What one request holds; given back when the block ends."""

    def __init__(self, slots: Slots):
        self._slots, self._count = slots, 0

    def grow(self, count: int) -> None:
        """Holds so many in all, one for each choice. Raises Full; then it holds what it held."""
        self._slots._change(count - self._count)
        self._count = count

    def __enter__(self) -> "Slot":
        return self

    def __exit__(self, *error: object) -> None:
        self.grow(0)
