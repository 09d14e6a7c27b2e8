"""The most jobs that any order on one server could finish in time: what policies are held against.

Jobs are taken in order of arrival and served first come, first served. Whenever the newest would
end late, the job whose removal lets the newest end soonest is dropped, be it the newest itself.
This is exact where the order of due times is that of arrivals, as with one TTFT for all: Kise,
Ibaraki and Mine, "A solvable case of the one-machine scheduling problem with ready and due times",
Operations Research 26 (1978); with a right proof in "Optimality proof of the Kise-Ibaraki-Mine
algorithm", Journal of Scheduling, doi 10.1007/s10951-010-0210-0.

Done plainly, each removal looks at every job since the server was last idle, which under a steady
overload is all of them. `_Kept` groups jobs so that a removal looks at few: 200,000 jobs at twice
the capacity take about a second.
"""

import heapq
import math

import numpy as np
from numpy.typing import ArrayLike

# A job that ends at its deadline is on time, whatever the rounding of sums. Relative to the TTFT.
_ROUNDING = 1e-9


def most_on_time(release: ArrayLike, seconds: ArrayLike, ttft: float) -> int:
    """The exact greatest number of jobs that one server can end within `ttft` of their release.

    The server knows all jobs beforehand, runs one at a time, and may leave jobs out. Interrupting
    jobs would not help it, since deadlines come in order of release.

    Args:
      release: [N], when each job arrives, in seconds, sorted.
      seconds: [N], how long each job takes.
      ttft: seconds from release to deadline, the same for all.

    Raises:
      ValueError: times that are not finite, negative `seconds`, `release` out of order, `ttft`
        not positive, or shapes that differ.
    """
    gaps, works = _checked(release, seconds, ttft)
    limit = ttft * (1 + _ROUNDING)
    kept = _Kept(len(works))
    count = 0
    # Seconds of work in hand, counted from the newest release: sums stay as small as the TTFT, and
    # so do their rounding errors, however long the trace.
    backlog = 0.0
    for gap, work in zip(gaps.tolist(), works.tolist(), strict=True):
        wait = max(backlog - gap, 0.0)
        kept.append(wait, work)
        backlog = wait + work
        if backlog > limit:
            backlog -= kept.drop()
        else:
            count += 1
    return count


class _Kept:
    """The kept jobs since the server was last idle, in groups of equal room, oldest group first.

    The room of a job is the least wait of the jobs after it: what comes after it can move up by no
    more, or one of them would start before its release. So without the job the newest ends earlier
    by the lesser of its work and its room. Of a group only the longest job matters, and room grows
    from group to group. The newest job has nothing after it, hence infinite room.

    Groups merge and never split. They could only do so if a wait that bounds the room of earlier
    jobs went away with its job; but the next job waits no longer than that once it has moved up,
    and the job after a dropped newest one waits no longer than that one would have.
    """

    def __init__(self, num_jobs: int):
        # Arrays, since a drop looks at all groups: some tens at a steady overload, but nearly one
        # for each job while waits rise slowly.
        self._room = np.empty(num_jobs + 1)
        self._longest = np.empty(num_jobs + 1)
        self._works: list[list[float]] = []  # a heap for each group, negated: longest first

    def append(self, wait: float, work: float) -> None:
        """Takes in the newest job: seconds from its release to its start, and to do it."""
        if wait <= 0:
            # It starts on release: nothing before it can be dropped in its favour any more.
            self._works.clear()
        self._merge(len(self._works), wait)
        size = len(self._works)
        self._splice(size, size, math.inf, [-work])

    def drop(self) -> float:
        """Drops the job that lets the newest end soonest; by how many seconds sooner."""
        size = len(self._works)
        savings = np.minimum(self._room[:size], self._longest[:size])
        at = int(savings.argmax())
        saving = float(savings[at])
        heapq.heappop(self._works[at])
        self._room[at:size] -= saving
        room = float(self._room[at])
        if room <= 0:
            # A job now starts on release. What came before it is settled.
            self._splice(0, at + 1, room, [])
        elif at < size - 1:
            self._merge(at + 1, room)
        else:
            self._splice(at, size, room, self._works[at])
        return saving

    def _merge(self, end: int, room: float) -> None:
        """Makes one group of those before `end` that have at least `room`."""
        begin = end
        works: list[float] = []
        while begin and self._room[begin - 1] >= room:
            begin -= 1
            works = _joined(works, self._works[begin])
        self._splice(begin, end, room, works)

    def _splice(self, begin: int, end: int, room: float, works: list[float]) -> None:
        """Puts one group in place of those from `begin` to `end`; none if it has no jobs."""
        size = len(self._works)
        after = begin + bool(works)
        if after != end and end < size:
            for values in (self._room, self._longest):
                values[after : after + size - end] = values[end:size]
        self._works[begin:end] = [works] if works else []
        if works:
            self._room[begin], self._longest[begin] = room, -works[0]


def _joined(some: list[float], others: list[float]) -> list[float]:
    """One heap of two. The smaller goes into the larger: no job moves more than log2(N) times."""
    if len(some) < len(others):
        some, others = others, some
    for work in others:
        heapq.heappush(some, work)
    return some


def _checked(release: ArrayLike, seconds: ArrayLike, ttft: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds from each release to the next (0 for the first), and of work."""
    releases = np.asarray(release, dtype=np.float64)
    works = np.asarray(seconds, dtype=np.float64)
    if releases.ndim != 1 or releases.shape != works.shape:
        raise ValueError(
            "release and seconds must be of one dimension and the same length, got shapes "
            f"{releases.shape} and {works.shape}"
        )
    if not (math.isfinite(ttft) and ttft > 0):
        raise ValueError(f"ttft must be a positive number of seconds, got {ttft}")
    for name, bad, values, limit in (
        ("release", ~np.isfinite(releases), releases, "finite"),
        ("release", np.r_[False, releases[1:] < releases[:-1]], releases, "sorted"),
        ("seconds", ~(np.isfinite(works) & (works >= 0)), works, "finite and not negative"),
    ):
        if bad.any():
            at = int(bad.argmax())
            raise ValueError(f"{name} must be {limit}, got {values[at]} at index {at}")
    return np.diff(releases, prepend=releases[:1]), works
