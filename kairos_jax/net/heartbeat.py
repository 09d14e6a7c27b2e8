"""Ends a stream whose other side has stopped."""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any


class Heartbeat:
    """Counts for how long nothing came.

    A stall of this process itself counts for two beats at most: messages may have come during it
    that are not read yet.
    """

    def __init__(self, period_s: float, limit_s: float):
        self.period_s, self.limit_s = period_s, limit_s
        self._silent_s = 0.0
        self._asleep_since, self._stalled_at = time.monotonic(), -math.inf

    @property
    def stalled(self) -> bool:
        """Whether this process itself stood still for the limit, now or less than the limit ago:
        the other side may have given it up for that.
        """
        now = time.monotonic()
        return (
            max(now - self._asleep_since, 0.0) > self.limit_s
            or now - self._stalled_at < self.limit_s
        )

    def heard(self) -> None:
        """Something came."""
        self._silent_s = 0.0

    async def lost(self, beat: Callable[[], None] = lambda: None) -> None:
        """Calls `beat` at once and then each period, until nothing came for the limit; then raises
        TimeoutError.
        """
        while self._silent_s < self.limit_s:
            beat()
            self._asleep_since = time.monotonic()
            await asyncio.sleep(self.period_s)
            now = time.monotonic()
            slept_s, self._asleep_since = now - self._asleep_since, now
            if slept_s > self.limit_s:
                self._stalled_at = now
            self._silent_s += min(slept_s, 2 * self.period_s)
        raise TimeoutError(f"nothing came from it for {self.limit_s:g} s")


async def first_of(*parts: Coroutine[Any, Any, None]) -> None:
    """Runs all until the first ends; raises what it raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
