"""Counts of the last minutes."""

import math
from collections import deque
from collections.abc import Sequence


class RecentCounts:
    """Counts of the last minutes, by slots of time: `width` of them side by side in each.

    One thread adds; others may look.
    """

    def __init__(self, width: int, slot_s: float = 5.0, num_slots: int = 60):
        self.slot_s, self.num_slots, self._width = slot_s, num_slots, width
        self._slots: deque[tuple[int, list[int]]] = deque(maxlen=num_slots)
        # The counts of the present slot, and when it ends.
        self._row, self._until = [0] * width, -math.inf

    def add(self, now: float, counts: Sequence[int]) -> None:
        """Adds to the counts of the present slot."""
        for index, count in enumerate(counts):
            self.add_one(now, index, count)

    def add_one(self, now: float, index: int, count: int = 1) -> None:
        """Adds to one of the counts. Quick, because tokens come by the ten thousand a second."""
        if now >= self._until:
            number = int(now // self.slot_s)
            self._row, self._until = [0] * self._width, (number + 1) * self.slot_s
            self._slots.append((number, self._row))
        self._row[index] += count

    def slots(self, now: float) -> list[list[int]]:
        """The counts of each slot up to the present one, which is the last [num_slots, width]."""
        known, last = dict(list(self._slots)), int(now // self.slot_s)
        none = [0] * self._width
        return [known.get(last - back, none) for back in reversed(range(self.num_slots))]
