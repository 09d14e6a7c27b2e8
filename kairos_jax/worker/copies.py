"""Copies of KV between a pool and what is outside of it, and how much of them a step loop makes
between two steps.

A copy goes over the device between two steps, and delays the next one. So a long one is made in
parts, each behind another step: the blocks that take 2 ms, as far as is known.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

# The most that is copied between two steps.
MOST_S = 2e-3
# Where a single block takes longer, as on a CPU, it is so much of a step, and a block at least. At
# a block a step, a prompt of eight would be a second on its way.
_SHARE = 0.1


@dataclass(slots=True, eq=False)
class Copy:
    """KV of one sequence. next: the first block that is not copied yet. past: the one after the
    last that may be; more may come, unless it is `complete`.

    move: copies blocks: from which on, up to which, and whether they are the last. ended: called
    when all are copied.
    """

    move: Callable[[int, int, bool], None]
    ended: Callable[[], None]
    past: int = 0
    complete: bool = False
    next: int = 0

    @property
    def waits(self) -> bool:
        """Whether there is something to copy."""
        return self.next < self.past


class Copies:
    """Those of one instance, in the order in which they are made. The worker's thread calls it.

    block_s: seconds that a block takes (`Engine.copy_s`).
    """

    def __init__(self, block_s: Callable[[], float], clock: Callable[[], float]):
        self._block_s, self._clock = block_s, clock
        self._copies: dict[str, Copy] = {}
        self._most_s, self._spent_s = MOST_S, 0.0

    def __contains__(self, id: str) -> bool:
        return id in self._copies

    def get(self, id: str) -> Copy | None:
        """The copy of a request, unless it has ended."""
        return self._copies.get(id)

    @property
    def waiting(self) -> bool:
        """Whether any has something to copy."""
        return any(copy.waits for copy in self._copies.values())

    def add(self, id: str, copy: Copy) -> Copy:
        """Takes in one that is to be made."""
        self._copies[id] = copy
        return copy

    def drop(self, id: str) -> None:
        """Forgets one, if there is one."""
        self._copies.pop(id, None)

    def step_begun(self, step_s: float) -> None:
        """A step of about so long was dispatched: what is copied from now on delays the next."""
        block_s = self._block_s()
        self._most_s = MOST_S if block_s <= MOST_S else max(block_s, _SHARE * step_s)
        self._spent_s = 0.0

    def make(self) -> None:
        """Copies as much as may be copied before the next step: a block in any case."""
        for id, copy in list(self._copies.items()):
            while copy.waits:
                if not (count := min(copy.past - copy.next, self._room())):
                    return
                self._make(id, copy, count)

    def finish_all(self) -> None:
        """Copies all that there is."""
        for id, copy in list(self._copies.items()):
            if copy.waits:
                self._make(id, copy, copy.past - copy.next)

    def _room(self) -> int:
        """How many blocks may be copied now."""
        if not (block_s := self._block_s()):
            return 1 << 30
        # A hair more than there is: sums of floats fall short of it.
        left = math.floor((self._most_s - self._spent_s) / block_s + 1e-6)
        return max(left, 0 if self._spent_s else 1)

    def _make(self, id: str, copy: Copy, count: int) -> None:
        begun, first = self._clock(), copy.next
        copy.next += count
        ends = copy.complete and not copy.waits
        copy.move(first, copy.next, ends)
        # To dispatch them may take longer than to run them.
        self._spent_s += max(count * self._block_s(), self._clock() - begun)
        if ends:
            del self._copies[id]
            copy.ended()
