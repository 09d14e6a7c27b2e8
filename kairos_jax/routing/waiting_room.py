"""Streams that no worker has in hand: they wait until a worker joins, or for a pause."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from kairos_jax.routing.stream import Stream


@dataclass(frozen=True, slots=True)
class _Waiting:
    """on_join: called when a worker joins; None: that changes nothing."""

    on_join: Callable[[], None] | None
    timer: asyncio.TimerHandle


class WaitingRoom:
    """Used on one event loop. A stream waits for one thing: a new wait replaces the last."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._waiting: dict[Stream, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def until_joined(
        self,
        stream: Stream,
        timeout_s: float,
        go_on: Callable[[], None],
        give_up: Callable[[], None],
    ) -> None:
        """Calls `go_on` when a worker joins, or `give_up` when none has in time."""
        self._wait(stream, timeout_s, give_up, go_on)

    def pause(self, stream: Stream, seconds: float, go_on: Callable[[], None]) -> None:
        """Calls `go_on` after a pause."""
        self._wait(stream, seconds, go_on, None)

    def leave(self, stream: Stream) -> None:
        """The stream waits no longer. Nothing happens if it does not wait."""
        if waiting := self._waiting.pop(stream, None):
            waiting.timer.cancel()

    def joined(self) -> None:
        """A worker has joined: streams that wait for one go on, in the order of their waits."""
        for stream, waiting in list(self._waiting.items()):
            if waiting.on_join:
                self.leave(stream)
                waiting.on_join()

    def _wait(
        self,
        stream: Stream,
        seconds: float,
        over: Callable[[], None],
        on_join: Callable[[], None] | None,
    ) -> None:
        def end() -> None:
            self.leave(stream)
            over()

        self.leave(stream)
        self._waiting[stream] = _Waiting(on_join, self._loop.call_later(seconds, end))
