"""Streams any of which may have ended the workers that had them: they go on one after another, so
that the next loss tells which it is.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from kairos_jax.routing.stream import Stream

# A stream has got through with so many tokens: one of a prefill step, one of a decode step.
_TOKENS = 2
# One whose turn does not come for so long goes on beside the others. If they lose a worker again,
# they come here again.
PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class _Waiting:
    go_on: Callable[[], None]
    timer: asyncio.TimerHandle


class Trials:
    """Used on one event loop. A stream that was given in must `leave` when it is over."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._tried: dict[Stream, int] = {}  # with how many tokens each has got through
        self._waiting: dict[Stream, _Waiting] = {}  # in the order of their turns

    def enter(self, stream: Stream, go_on: Callable[[], None]) -> None:
        """Calls `go_on` when it is the stream's turn."""
        self._stop_waiting(stream)
        if not self._tried or stream in self._tried:
            self._try(stream, go_on)
        else:
            timer = self._loop.call_later(PATIENCE_S, self._try, stream, go_on)
            self._waiting[stream] = _Waiting(go_on, timer)

    def progressed(self, stream: Stream) -> None:
        """The stream has a further token."""
        if stream in self._tried and len(stream.tokens) >= self._tried[stream]:
            stream.aboard.clear()
            self.leave(stream)

    def leave(self, stream: Stream) -> None:
        """The stream is over, or has got through. Nothing happens if it was not here."""
        self._stop_waiting(stream)
        if self._tried.pop(stream, None) is not None:
            self._loop.call_soon(self._next)  # not at once: it may fail, and so leave, itself

    def _next(self) -> None:
        if self._waiting and not self._tried:
            stream, waiting = next(iter(self._waiting.items()))
            self._try(stream, waiting.go_on)

    def _try(self, stream: Stream, go_on: Callable[[], None]) -> None:
        self._stop_waiting(stream)
        self._tried[stream] = len(stream.tokens) + _TOKENS
        go_on()

    def _stop_waiting(self, stream: Stream) -> None:
        if waiting := self._waiting.pop(stream, None):
            waiting.timer.cancel()
