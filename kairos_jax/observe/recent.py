"""Counts of the last minutes."""

from collections import deque
from collections.abc import Sequence


class RecentCounts:
    """Counts of the last minutes, by slots of time: `width` of them side by side in each.

    One thread adds; others may look.
    """

    def __init__(self, width: int, slot_s: float = 5.0, num_slots: int = 60):
        self.slot_s, self.num_slots, self._width = slot_s, num_slots, width
        self._slots: deque[tuple[int, list[int]]] = deque(maxlen=num_slots)

    def add(self, now: float, counts: Sequence[int]) -> None:
        """Adds to the counts of the present slot."""
        number = int(now // self.slot_s)
        if not self._slots or self._slots[-1][0] != number:
            self._slots.append((number, [0] * self._width))
        row = self._slots[-1][1]
        for index, count in enumerate(counts):
            row[index] += count

    def slots(self, now: float) -> list[list[int]]:
        """The counts of each slot up to the present one, which is the last [num_slots, width]."""
        known, last = dict(list(self._slots)), int(now // self.slot_s)
        none = [0] * self._width
        return [known.get(last - back, none) for back in reversed(range(self.num_slots))]
