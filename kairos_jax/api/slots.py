"""The requests that a server holds: each has a slot from the first byte of its body to the last
byte of its answer, whatever API it comes by. Here too is what its body may take.
"""

import asyncio
import os
from collections.abc import Callable
from enum import Enum
from typing import TypeVar

from kairos_jax.routing.fleet import Full, no_slot

T = TypeVar("T")

# Bytes of all bodies in progress; those of up to so many bytes each do not count.
MAX_BYTES = 256 << 20
SMALL_BYTES = 64 << 10
# From so many bytes on, a body may hold text for long: 1 MiB takes a second or two.
_LONG_BYTES = 128 << 10
# A client that takes nothing of its answer for so long is cut off, and its slot is free.
WRITE_S = 30.0
# Requests with a template of their own, at once: each may take all of its time.
_MOST_TEMPLATES = 8


class Lane(Enum):
    """What a request waits behind before it is tokenized: others of its lane alone, so that what
    takes long holds up nothing that does not.
    """

    SHORT = "short"
    LONG = "long"
    TEMPLATE = "a client's chat template"

    @classmethod
    def of(cls, size: int, has_template: bool) -> "Lane":
        """size: of the body, in bytes. has_template: it brings a chat template."""
        if has_template:
            return cls.TEMPLATE
        return cls.LONG if size > _LONG_BYTES else cls.SHORT


class Slots:
    """Used on one event loop. limit: slots in all; a request takes one for each of its choices.
    max_bytes: of all bodies. wait_s: predicts in how many seconds a slot may be free. on_full:
    called when none is.
    """

    def __init__(self, limit: int = 0):
        self.limit, self.num_held = limit, 0
        self.max_bytes, self.num_bytes = MAX_BYTES, 0
        self.wait_s: Callable[[], float] = lambda: 0.0
        self.on_full: Callable[[], None] = lambda: None
        self._idle = asyncio.Event()
        self._idle.set()
        # Few at once: a long text takes much memory and a core while it is tokenized.
        cores = os.cpu_count() or 1
        self._lanes = {
            Lane.SHORT: asyncio.Semaphore(max(1, cores // 2)),
            Lane.LONG: asyncio.Semaphore(min(max(1, cores // 4), 4)),
            Lane.TEMPLATE: asyncio.Semaphore(1),
        }
        self._num_templates = 0

    def take(self) -> "Slot":
        """A slot for a request that has come. Raises Full."""
        slot = Slot(self)
        slot.grow(1)
        return slot

    async def idle(self) -> None:
        """Returns when no slot is held."""
        await self._idle.wait()

    async def tokenize(self, job: Callable[[], T], lane: Lane = Lane.SHORT) -> T:
        """What `job` returns, which reads or tokenizes, on a thread. Raises Full."""
        if lane is not Lane.TEMPLATE:
            return await self._in_lane(job, lane)
        if self._num_templates >= _MOST_TEMPLATES:
            reason = f"{_MOST_TEMPLATES} requests with chat templates of their own are rendered"
            raise self._full(Full(f"{reason}, the most at once", "max_requests", self.wait_s()))
        self._num_templates += 1
        try:
            return await self._in_lane(job, lane)
        finally:
            self._num_templates -= 1

    async def _in_lane(self, job: Callable[[], T], lane: Lane) -> T:
        async with self._lanes[lane]:
            return await asyncio.to_thread(job)

    def _change(self, count: int) -> None:
        if count > 0 and self.num_held + count > self.limit:
            raise self._full(no_slot(self.limit, self.wait_s()))
        self.num_held += count
        if self.num_held:
            self._idle.clear()
        else:
            self._idle.set()

    def _change_bytes(self, count: int) -> None:
        if count > 0 and self.num_bytes + count > self.max_bytes:
            reason = f"the bodies of requests in progress have {self.num_bytes >> 20} MiB"
            limit = f"at most {self.max_bytes >> 20} MiB are taken"
            raise self._full(Full(f"{reason}; {limit}", "max_requests", self.wait_s()))
        self.num_bytes += count

    def _full(self, error: Full) -> Full:
        self.on_full()
        return error


class Slot:
    """What one request holds; given back when the block ends."""

    def __init__(self, slots: Slots):
        self._slots, self._count, self._bytes = slots, 0, 0

    def grow(self, count: int) -> None:
        """Holds so many in all, one for each choice. Raises Full; then it holds what it held."""
        self._slots._change(count - self._count)
        self._count = count

    def hold_body(self, size: int) -> None:
        """Its body has so many bytes now. Raises Full; then it holds what it held."""
        size = size if size > SMALL_BYTES else 0
        self._slots._change_bytes(size - self._bytes)
        self._bytes = size

    def __enter__(self) -> "Slot":
        return self

    def __exit__(self, *error: object) -> None:
        self.hold_body(0)
        self.grow(0)
