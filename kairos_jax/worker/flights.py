"""The steps that were dispatched and whose results are not booked, and the thread that waits for
them.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kairos_jax.engine.calls import Token
from kairos_jax.kv.transport import Ticket
from schedulers.ledger.instance import Batch
from schedulers.ledger.request import Seq


@dataclass(frozen=True, slots=True)
class Ended:
    """The first of the steps under way is over."""

    tokens: dict[str, Token] | BaseException


@dataclass(slots=True)
class Flight:
    """A step that was dispatched and whose result is not booked.

    begun_at: when it was decided, or when the step before it ended. seqs: those whose tokens are
    wanted, by id: not what is forgotten meanwhile. expected: it is in the ledger ahead of its
    result. waited_for: a decision needs its result. tickets: of the KV that was offered ahead of
    it, by id.
    """

    batch: Batch
    begun_at: float
    seqs: dict[str, Seq]
    expected: bool = False
    waited_for: bool = False
    tickets: dict[str, Ticket] = field(default_factory=dict)


class Flights:
    """Two at most, in the order in which they were dispatched and will end.

    ended: called with the result of each, on the thread that waits for them.
    """

    def __init__(self, name: str, ended: Callable[[Ended], None]):
        self._flights: deque[Flight] = deque()
        self._ended = ended
        self._waits: queue.SimpleQueue[Callable[[], dict[str, Token]] | None] = queue.SimpleQueue()
        # A daemon: a step that never ends must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def first(self) -> Flight:
        """The one that ends next."""
        return self._flights[0]

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, after the steps that were dispatched."""
        self._waits.put(None)

    def join(self, timeout_s: float | None = None) -> None:
        """Waits for the thread's end."""
        self._thread.join(timeout_s)

    def add(self, flight: Flight, wait: Callable[[], dict[str, Token]]) -> None:
        """Takes in a step that was dispatched. wait: waits for its result, and returns it."""
        self._flights.append(flight)
        self._waits.put(wait)

    def land(self, now: float) -> Flight:
        """Takes out the first, which has ended; the next one runs from now on."""
        landed = self._flights.popleft()
        for flight in self._flights:
            flight.begun_at = now
        return landed

    def drop(self, id: str) -> bool:
        """Forgets a request: its tokens are wanted no more. Returns whether any were."""
        dropped = [flight.seqs.pop(id, None) for flight in self._flights]
        return any(dropped)

    def _run(self) -> None:
        while (wait := self._waits.get()) is not None:
            try:
                tokens = wait()
            except BaseException as error:
                tokens = error
            self._ended(Ended(tokens))
