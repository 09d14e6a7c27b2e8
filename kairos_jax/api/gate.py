"""Whether requests are taken, and by what they are answered: shared by all APIs of one server."""

from collections.abc import Callable
from dataclasses import dataclass

from kairos_jax.api.backend import Backend


class Closed(Exception):
    """No new requests are taken; the message says why."""


@dataclass(slots=True)
class Gate:
    """clock: of arrivals, in seconds. closed: why no new requests are taken, where none are."""

    clock: Callable[[], float]
    backend: Backend | None = None
    closed: str | None = "the server is starting"

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
