"""How a prompt's KV gets from a prefill instance to a decode instance."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import jax
from jax.sharding import Sharding

from kairos_jax.engine import KV


@dataclass(frozen=True, slots=True)
class Ticket:
    """Good for one fetch of one prompt's KV. num_tokens: how many tokens of it are real."""

    request_id: str
    num_tokens: int
    serial: int = field(default_factory=itertools.count().__next__)


Done = Callable[[KV | Exception], None]
"""Called once, on a thread of the transport's."""


class KVTransport(Protocol):
    """Carries KV from the instance that offers it to the one that fetches it."""

    def offer(self, request_id: str, num_tokens: int, kv: KV) -> Ticket:
        """Holds `kv`, a copy that no later step touches, until it is released."""
        ...

    def fetch(self, ticket: Ticket, sharding: Sharding | None, done: Done) -> None:
        """Returns at once; `done` is given the KV, arrived and placed as `sharding` says, or the
        error that kept it away.
        """
        ...

    def release(self, ticket: Ticket) -> None:
        """Drops the KV offered under `ticket`. Unknown tickets are passed over."""
        ...


class LocalTransport:
    """Between meshes of one process: `jax.device_put`, which reshards.

    One thread waits for the copies, so that no step loop does.
    """

    def __init__(self) -> None:
        self._offers: dict[Ticket, KV] = {}
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="kv-transfer")

    @property
    def num_offers(self) -> int:
        """Prompts whose KV is held here."""
        return len(self._offers)

    def offer(self, request_id: str, num_tokens: int, kv: KV) -> Ticket:
        """See `KVTransport.offer`."""
        ticket = Ticket(request_id, num_tokens)
        self._offers[ticket] = kv
        return ticket

    def fetch(self, ticket: Ticket, sharding: Sharding | None, done: Done) -> None:
        """See `KVTransport.fetch`."""
        self._mover.submit(self._move, ticket, sharding, done)

    def release(self, ticket: Ticket) -> None:
        """See `KVTransport.release`."""
        self._offers.pop(ticket, None)

    def close(self) -> None:
        """Ends the thread, after the move it is at."""
        self._mover.shutdown(cancel_futures=True)

    def _move(self, ticket: Ticket, sharding: Sharding | None, done: Done) -> None:
        try:
            kv = self._offers.get(ticket)
            if kv is None:
                raise LookupError(f"no KV is offered for request {ticket.request_id!r}")
            if sharding is not None:
                kv = jax.block_until_ready([jax.device_put(block, sharding) for block in kv])
        except Exception as error:
            done(error)
        else:
            done(kv)
