"""How answers are written: in parts, and with signs of life."""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.types import Send

# Proxies close a stream on which nothing comes for a minute or less.
COMMENT_S = 15.0
_COMMENT = b": waiting\n\n"
# What is written at once: beyond it, a server's buffers would hold the whole of an answer.
_PART_BYTES = 64 << 10


async def write_whole(send: Send, parts: list[bytes]) -> None:
    """Writes a JSON answer that is there, part by part: the last one is taken when few bytes are
    left that the client has not read.
    """
    size = sum(map(len, parts))
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % size)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for part in parts:
        for first in range(0, len(part), _PART_BYTES):
            body = part[first : first + _PART_BYTES]
            await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


class Comments:
    """Writes a comment to a stream of events when nothing else was written for `COMMENT_S`."""

    def __init__(self, write: Callable[[bytes], Awaitable[None]]):
        self._write, self._loop = write, asyncio.get_running_loop()
        self._written_at = self._loop.time()

    def written(self) -> None:
        """Something was written."""
        self._written_at = self._loop.time()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            left_s = self._written_at + COMMENT_S - self._loop.time()
            if left_s > 0:
                await asyncio.sleep(left_s)
            else:
                await self._write(_COMMENT)
