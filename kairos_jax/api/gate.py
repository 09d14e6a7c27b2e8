"""Whether requests are taken, and by what they are answered: shared by all APIs of one server."""

from collections.abc import Callable
from dataclasses import dataclass, field

from kairos_jax.api.backend import Backend
from kairos_jax.api.slots import Slots


class Closed(Exception):
    """No new requests are taken; the message says why."""


@dataclass(slots=True)
class Gate:
    """clock: of arrivals, in seconds. closed: why no new requests are taken, where none are. slots:
    of the requests that are held.
    """

    clock: Callable[[], float]
    backend: Backend | None = None
    closed: str | None = "the server is starting"
    slots: Slots = field(default_factory=Slots)

    def open(self, backend: Backend) -> None:
        """Takes requests for a backend from now on."""
        self.backend, self.closed = backend, None
        self.slots.limit = backend.validator.config.max_requests
        self.slots.wait_s = backend.router.wait_s
        self.slots.on_full = lambda: backend.router.rejected("max_requests")

    def enter(self) -> Backend:
        """What answers a request that has come. Raises Closed."""
        if self.closed is not None or self.backend is None:
            raise Closed(self.closed)
        return self.backend

    def admit(self) -> Backend:
        """As `enter`, for a request to generate: one that is turned away is counted."""
        if self.closed is not None and self.backend is not None:
            self.backend.router.rejected("closed")
        return self.enter()
