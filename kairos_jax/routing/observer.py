"""The interface of what is told about a router's requests: metrics, traces, the log."""

from typing import Protocol

from kairos_jax.routing.stream import Stream
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Slo


class Observer(Protocol):
    """Told on the router's event loop, so each method must be quick. A method that is left out does
    nothing. Metrics, traces and the log are observers (`kairos_jax.observe`).
    """

    def rejected(self, reason: str, slo: Slo | None = None) -> None:
        """A request was not taken. reason: a word, of which there are few. slo: None where it had
        not been read yet.
        """

    def begun(self, stream: Stream) -> None:
        """A request was taken, and goes to its first worker now."""

    def first_token(self, stream: Stream) -> None:
        """The first token of a request has come."""

    def placed(self, stream: Stream, stays: bool) -> None:
        """A request that has its first token goes on where its prompt was computed, or elsewhere.
        Only where roles flow.
        """

    def next_token(self, gap_s: float) -> None:
        """Another token of a request has come, so many seconds after the one before it."""

    def ended(self, stream: Stream, outcome: str) -> None:
        """A request is over. outcome: "stop", "length", "cancelled" or "failed"."""

    def transfer_failed(self, source: str, target: str) -> None:
        """KV did not move from one worker to another. source, target: their ids."""

    def recovered(self, stream: Stream, cause: str) -> None:
        """A request is prefilled again. cause: in a word."""

    def recalled(self, stream: Stream) -> None:
        """A late request has left the queue that it was in for a worker which has time for it."""

    def failed(self, stream: Stream, cause: str) -> None:
        """A request that was taken cannot be brought to its end, and ends now. cause: in a word."""

    def lost(self, role: Role) -> None:
        """A worker that did not drain is gone."""
