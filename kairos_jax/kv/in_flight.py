"""How many bytes are on their way from one peer at once. Used by one thread, the event loop's."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import IntEnum


class Priority(IntEnum):
    """Which transfer goes first. BULK: a prefetch, for which no step waits yet."""

    URGENT = 0
    BULK = 1
    PREFETCH = 2


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    num_bytes: int
    priority: Callable[[], Priority]
    admitted: asyncio.Future[None]


class InFlight:
    """Admits up to `limit` bytes; what is larger than that goes alone. The others wait in order,
    the urgent before the rest.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.num_bytes = 0
        self._waiting: list[_Waiting] = []

    @contextlib.asynccontextmanager
    async def admit(self, num_bytes: int, priority: Callable[[], Priority]) -> AsyncIterator[None]:
        """The block is entered when there is room, which is given back when it is left.

        priority: asked again whenever there is room, since it may have changed.
        """
        mine = _Waiting(num_bytes, priority, asyncio.get_running_loop().create_future())
        self._waiting.append(mine)
        self._let_in()
        try:
            await mine.admitted
            yield
        finally:
            if mine.admitted.cancelled():
                self._waiting.remove(mine)
            else:
                self.num_bytes -= num_bytes
            self._let_in()

    def _let_in(self) -> None:
        while waiting := [each for each in self._waiting if not each.admitted.done()]:
            first = min(waiting, key=lambda each: each.priority())
            if self.num_bytes and self.num_bytes + first.num_bytes > self.limit:
                return
            self._waiting.remove(first)
            self.num_bytes += first.num_bytes
            first.admitted.set_result(None)
