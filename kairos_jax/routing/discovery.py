"""Which peers there are: fixed addresses, and names that stand for all that they resolve to now."""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from kairos_jax.net.address import join_address, split_address

_DNS = "dns:"

# (host, port) -> addresses. Raises OSError.
Resolver = Callable[[str, int], Awaitable[frozenset[str]]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """One entry of --prefill or --decode. by_name: stands for every address `host` resolves to."""

    host: str
    port: int
    by_name: bool = False

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Of "host:port" or "dns:name:port". Raises ValueError, which quotes it."""
        by_name, address = text.startswith(_DNS), text.removeprefix(_DNS)
        host, port = split_address(address)
        if by_name and ":" in host:
            raise ValueError(f"{address!r} is an address, and {_DNS} goes before a name")
        return cls(host, port, by_name)

    @property
    def address(self) -> str:
        """As a gRPC channel takes it."""
        return join_address(self.host, self.port)


async def watch(
    targets: Sequence[str],
    period_s: float,
    on_change: Callable[[frozenset[str]], None],
    resolve: Resolver | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Tells of the addresses of all targets, at once and whenever they are others. Ends when it is
    cancelled.

    Names are resolved anew `period_s` after the last time; one that does not resolve keeps what it
    had, since a name server that is down is no news of the peers.

    Args:
        targets: each "host:port" or "dns:name:port".
        on_change: gets all addresses, as "host:port"; not called with what it was last called with.
        resolve: instead of the system's.
        sleep: awaited with `period_s` between rounds.

    Raises:
        ValueError: a target is neither.
    """
    parsed = [Target.parse(target) for target in targets]
    fixed = frozenset(target.address for target in parsed if not target.by_name)
    names = [_Name(target, resolve or resolve_now) for target in dict.fromkeys(parsed)]
    names = [name for name in names if name.target.by_name]
    told = None
    while True:
        found = await asyncio.gather(*(name.addresses() for name in names))
        addresses = fixed.union(*found)
        if addresses != told:
            told = addresses
            on_change(addresses)
        await sleep(period_s)


class _Name:
    """A name and what it last resolved to."""

    def __init__(self, target: Target, resolve: Resolver):
        self.target = target
        self._resolve = resolve
        self._known: frozenset[str] = frozenset()
        self._failing = False

    async def addresses(self) -> frozenset[str]:
        host, port = self.target.host, self.target.port
        try:
            self._known = await self._resolve(host, port)
        except OSError as error:
            if not self._failing:  # once, not every period
                _log.warning(
                    "cannot resolve %s: %s; keeping %s", host, error, _listing(self._known)
                )
            self._failing = True
        else:
            if self._failing:
                _log.warning("%s resolves again: %s", host, _listing(self._known))
            self._failing = False
        return self._known


async def resolve_now(host: str, port: int) -> frozenset[str]:
    """All addresses of a name, each with the port. Raises OSError."""
    loop = asyncio.get_running_loop()
    infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return frozenset(join_address(str(address[0]), port) for *_, address in infos)


def _listing(addresses: frozenset[str]) -> str:
    return ", ".join(sorted(addresses)) or "no address"
