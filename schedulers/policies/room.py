"""The pages of a decode instance during one decision: which sequences may be fetched, and which
must be evicted.
"""

import math
from collections.abc import Callable

import numpy as np

from schedulers.ledger.instance import Instance


class Room:
    """The pages of an instance in the making of one decision.

    free: pages left when each running sequence has had one more, which most do not need now: so
    that they can go on for a while without an eviction. evict: rows of running ones to evict. Their
    pages are free when their KV has been copied out, so they are evicted a step before the others
    need these. Earlier still, there would be more evictions: half a page ahead, half as many again.
    """

    __slots__ = ("evict", "free", "instance")

    def __init__(self, instance: Instance):
        self.instance = instance
        self.free = instance.pages.num_free - len(instance.running.seqs)
        self.evict: list[int] = []

    @property
    def all(self) -> np.ndarray:
        """The rows of all running ones."""
        return np.arange(len(self.instance.running))

    def make(self, order: Callable[[], np.ndarray]) -> np.ndarray:
        """Evicts running sequences, least in `order` first, until the others will have the pages
        that they need for two steps. Returns the rows of the others that may step now: those that
        lack no page, and of those that lack one the last in `order`, while any is free.
        """
        running = self.instance.running
        if self.free >= 0:
            return self.all
        num_free = self.instance.pages.num_free
        soon = running.length + 1 > running.capacity
        short = int(np.count_nonzero(soon)) - num_free - self.instance.num_leaving
        lacking = running.length > running.capacity
        if short <= 0 and np.count_nonzero(lacking) <= num_free:
            return self.all
        rows = order().argsort(kind="stable")
        if short > 0:
            freed = (self._freed(rows) + soon[rows]).cumsum()
            count = int(np.searchsorted(freed, short)) + 1  # all, where pages are shared among them
            self.evict += rows[:count].tolist()
            rows = rows[count:]
        lacking = lacking[rows]
        may = ~lacking | (lacking[::-1].cumsum()[::-1] <= num_free)
        return np.sort(rows[may])

    def evict_for(self, lengths: np.ndarray, rows: np.ndarray) -> None:
        """Evicts as few of the running `rows` as will make room for so many tokens [S], the longest
        first; none if they do not even make room for the first of those.
        """
        size, running = self.instance.limits.page_size, self.instance.running
        free = self.free + self.instance.num_leaving
        short = int(np.ceil(lengths / size).sum()) - free
        if short <= 0 or not rows.size:
            return
        rows = rows[~np.isin(rows, self.evict)]
        rows = rows[(-running.capacity[rows]).argsort(kind="stable")]
        freed = self._freed(rows).cumsum()
        if rows.size and freed[-1] + free >= -(-lengths[0] // size):
            self.evict += rows[: int(np.searchsorted(freed, short)) + 1].tolist()

    def _freed(self, rows: np.ndarray) -> np.ndarray:
        """Pages that each of the running `rows` would free, if it alone gave back its own [S]."""
        running, table = self.instance.running, self.instance.pages
        if table.num_shared:
            return np.array([table.num_freed_by(running.at(row).pages) for row in rows.tolist()])
        return running.capacity[rows] // self.instance.limits.page_size

    def fetch(self, order: np.ndarray, held: float = 0.0, limit: float = math.inf) -> np.ndarray:
        """Which of the waiting `order` to fetch now: those that are neither here nor under way, in
        order, while pages are left, and while they hold at most `limit` with `held`, or hold alone
        what is held at all.
        """
        rows = self.instance.waiting
        order = order[rows.capacity[order] == 0]
        if not order.size or self.free <= 0:
            return order[:0]
        needed = np.ceil(rows.length[order] / self.instance.limits.page_size)
        total = needed.cumsum()
        if limit == math.inf and total[-1] <= self.free:
            self.free -= int(total[-1])
            return order
        within = total <= self.free
        if limit < math.inf:
            within &= held + total <= limit
            within[0] |= not held and needed[0] <= self.free
        order = order[: prefix(within)]
        self.free -= int(needed[: order.size].sum())
        return order

    def take(self, count: int) -> bool:
        """Takes so many pages for one to fetch, if they are left."""
        if count > self.free:
            return False
        self.free -= count
        return True


def prefix(within: np.ndarray) -> int:
    """How many of the first are all true."""
    first = int(within.argmin()) if within.size else 0
    return within.size if within.size and within[first] else first
