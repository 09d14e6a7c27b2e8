"""A connection between two processes of one mesh: messages of bytes, and signs of life.

Plain TCP: a message is there in 30 to 50 us, where a gRPC stream took 220 to 240.
"""

import enum
import math
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

HEADER = struct.Struct("!BIIQ")  # kind, tokens, sequences, bytes that follow


class Kind(enum.IntEnum):
    """What a message asks for. BEAT: nothing, it is a sign of life; END: that the follower end."""

    BEAT = 0
    STEP = 1
    READ = 2
    WRITE = 3
    END = 4
    SCORE = 5
    FILL = 6


class Frame(NamedTuple):
    """tokens, sequences: of a STEP or SCORE; of a READ or WRITE, tokens are its blocks. payload:
    arrays, one after the other.
    """

    kind: Kind
    tokens: int = 0
    sequences: int = 0
    payload: bytes = b""


class Connection:
    """A connection between the leader and a follower.

    process: which one is at the other end. deadline_s: silence after which it counts as lost.
    compiling_s: the same at first, and from a message of a new shape, for which both ends compile,
    until one of a shape that they know.
    """

    def __init__(self, sock: socket.socket, process: int, deadline_s: float, compiling_s: float):
        sock.settimeout(compiling_s)  # for sends; see `_read` for the rest
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.process, self.beat_s = process, deadline_s / 4
        self._deadline_s, self._compiling_s = deadline_s, compiling_s
        self._socket, self._ready = sock, select.poll()
        self._ready.register(sock, select.POLLIN)
        self._allowed_s = compiling_s
        self._shapes: set[tuple[int, ...]] = set()
        self._lock = threading.Lock()

    def send(self, message: Frame) -> None:
        """From any thread. Raises OSError if the other end is gone or does not read."""
        kind, tokens, sequences, payload = message
        self._passes(kind, tokens, sequences)
        header = HEADER.pack(kind, tokens, sequences, len(payload))
        with self._lock:
            self._socket.sendall(header + payload)

    def __iter__(self) -> Iterator[Frame]:
        """All messages but beats. Ends with an OSError when the other end is gone or silent."""
        while True:
            kind, tokens, sequences, size = HEADER.unpack(self._read(HEADER.size))
            payload = self._read(size)
            self._passes(kind, tokens, sequences)
            if kind != Kind.BEAT:
                yield Frame(Kind(kind), tokens, sequences, payload)

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def _passes(self, *shape: int) -> None:
        """Sets how long the other end may be silent, from now on."""
        if shape[0] != Kind.BEAT:
            known = shape in self._shapes
            self._shapes.add(shape)
            self._allowed_s = self._deadline_s if known else self._compiling_s
            self._socket.settimeout(self._allowed_s)

    def _read(self, size: int) -> bytes:
        data, heard_at = bytearray(), time.monotonic()
        while len(data) < size:
            # Looked at anew with each beat: a compilation may have ended while this waits.
            allowed_s = self._allowed_s
            left_s = heard_at + allowed_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"no sign of life for {allowed_s:g} s")
            if self._ready.poll(math.ceil(1000 * min(left_s, self.beat_s))):
                part = self._socket.recv(size - len(data))
                if not part:
                    raise ConnectionResetError("its connection was closed")
                data += part
                heard_at = time.monotonic()
        return bytes(data)
