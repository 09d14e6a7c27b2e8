"""What a router has sent to a worker that the worker's summary does not count yet: both ends of it.

A worker says with each summary how many requests it had received by then. A router adds what it has
sent beyond those to the summary itself (`Unseen`), so that it does not send a burst of requests all
to the worker that was idle a moment ago. Where a worker has several routers, each is told how many
of its own requests are counted (`Receipts`).
"""

from collections import deque
from collections.abc import Callable, Hashable

from schedulers.policies.routing import Summary


class Unseen:
    """The router's end, of one worker. Used on one event loop, except for `summary`.

    summary: the worker's state as far as is known: its last summary, and all that it does not
    count. It is made when something changes, since it is read far more often.
    """

    def __init__(self, summary: Summary):
        self.summary = self._without_booked = summary
        self._num_sent = 0
        # What each request adds that the summary does not count yet, in the order sent.
        self._adds: deque[Callable[[Summary], Summary]] = deque()
        # What each request adds for which a place is kept, and which was not sent yet.
        self._booked: dict[str, Callable[[Summary], Summary]] = {}

    def book(self, id: str, add: Callable[[Summary], Summary]) -> None:
        """Keeps a place for a request that will be sent. add: as of `sent`."""
        self._booked[id] = add
        self._sum_up()

    def unbook(self, id: str) -> None:
        """The request was sent, or will not come. Unknown ids are ignored."""
        if self._booked.pop(id, None):
            self._sum_up()

    def sent(self, add: Callable[[Summary], Summary]) -> None:
        """A request was sent. add: what it adds to a summary that does not count it."""
        self._num_sent += 1
        self._adds.append(add)
        self.told(add)

    def told(self, add: Callable[[Summary], Summary]) -> None:
        """Something is known that the next summary will count. add: as of `sent`."""
        self._without_booked = add(self._without_booked)
        self._sum_up()

    def update(self, summary: Summary, num_received: int) -> None:
        """Takes a new summary, in which the first `num_received` requests sent count."""
        while len(self._adds) > self._num_sent - num_received:
            self._adds.popleft()
        for add in self._adds:
            summary = add(summary)
        self._without_booked = summary
        self._sum_up()

    def _sum_up(self) -> None:
        summary = self._without_booked
        for add in self._booked.values():
            summary = add(summary)
        self.summary = summary


class Receipts:
    """The worker's end: of which router each request was, in the order in which the worker gets
    them.
    """

    def __init__(self) -> None:
        self._posted: deque[Hashable] = deque()  # routers, of requests that are not counted yet
        self._num_counted = 0
        self._counts: dict[Hashable, int] = {}  # of routers that are attached

    def join(self, router: Hashable) -> None:
        """A router is attached."""
        self._counts[router] = 0

    def leave(self, router: Hashable) -> None:
        """A router is gone. Unknown ones are ignored."""
        self._counts.pop(router, None)

    def posted(self, router: Hashable) -> None:
        """A request of this router's was posted to the worker."""
        self._posted.append(router)

    def count(self, num_received: int) -> None:
        """The worker has received so many requests, from all routers together."""
        while self._posted and self._num_counted < num_received:
            router = self._posted.popleft()
            self._num_counted += 1
            if router in self._counts:
                self._counts[router] += 1

    def of(self, router: Hashable) -> int:
        """How many requests of an attached router are counted."""
        return self._counts[router]
