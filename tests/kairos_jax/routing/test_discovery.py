"""Peers by address and by name, with a name server and a clock that the test holds."""

import asyncio
import contextlib
import logging
import re
import socket

import pytest

from kairos_jax.net.address import join_address, split_address
from kairos_jax.routing import discovery
from kairos_jax.routing.discovery import Target


class Names:
    """What names resolve to; an OSError is raised."""

    def __init__(self, **found):
        self.found = found
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> frozenset[str]:
        self.asked.append(host)
        found = self.found[host]
        if isinstance(found, OSError):
            raise found
        return frozenset(join_address(address, port) for address in found)


class Rounds:
    """A watch that goes on to its next round when it is told to."""

    def __init__(self, targets, names: Names):
        self.told: list[set[str]] = []
        self._turns = asyncio.Semaphore(0)
        self._over = asyncio.Semaphore(0)
        watching = discovery.watch(
            targets, 5.0, lambda found: self.told.append(set(found)), names, self._sleep
        )
        self.task = asyncio.ensure_future(watching)

    async def _sleep(self, seconds: float) -> None:
        assert seconds == 5.0
        self._over.release()
        await self._turns.acquire()

    async def first(self) -> None:
        await self._over.acquire()

    async def next(self) -> None:
        self._turns.release()
        await self._over.acquire()


@contextlib.asynccontextmanager
async def watched(*targets: str, names: Names | None = None):
    rounds = Rounds(targets, names or Names())
    await rounds.first()
    try:
        yield rounds
    finally:
        rounds.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await rounds.task


def test_fixed_addresses_are_told_once_and_ask_nobody():
    async def go():
        async with watched("10.0.0.1:50061", "host-b:50061", "[::1]:7") as rounds:
            await rounds.next()
            assert rounds.told == [{"10.0.0.1:50061", "host-b:50061", "[::1]:7"}]

    asyncio.run(go())


def test_no_targets_are_no_addresses():
    async def go():
        async with watched() as rounds:
            assert rounds.told == [set()]

    asyncio.run(go())


def test_a_name_stands_for_all_it_resolves_to_now():
    async def go():
        names = Names(decode=["10.0.0.1", "fd00::2"])
        async with watched("dns:decode:50061", "a:1", names=names) as rounds:
            await rounds.next()
            names.found["decode"] = ["10.0.0.3"]
            await rounds.next()
            names.found["decode"] = []
            await rounds.next()
        first = {"a:1", "10.0.0.1:50061", "[fd00::2]:50061"}
        assert rounds.told == [first, {"a:1", "10.0.0.3:50061"}, {"a:1"}]
        assert names.asked == ["decode"] * 4

    asyncio.run(go())


def test_the_same_target_twice_is_one():
    async def go():
        names = Names(decode=["10.0.0.1"])
        targets = ("dns:decode:1", "dns:decode:1", "10.0.0.1:1")
        async with watched(*targets, names=names) as rounds:
            assert rounds.told == [{"10.0.0.1:1"}]
            assert names.asked == ["decode"]

    asyncio.run(go())


def test_a_name_that_fails_keeps_what_it_had(caplog):
    caplog.set_level(logging.WARNING)

    async def go():
        names = Names(a=["10.0.0.1"], b=OSError("no such name"))
        async with watched("dns:a:1", "dns:b:1", names=names) as rounds:
            assert rounds.told == [{"10.0.0.1:1"}]
            names.found["a"] = OSError("server down")
            await rounds.next()
            await rounds.next()
            assert rounds.told == [{"10.0.0.1:1"}]
            assert len(caplog.records) == 2  # one a name, not one a round
            names.found["b"] = ["10.0.0.2"]
            await rounds.next()
            names.found["b"] = OSError("no such name")
            await rounds.next()
            assert rounds.told[1:] == [{"10.0.0.1:1", "10.0.0.2:1"}]

    asyncio.run(go())
    assert [record.getMessage() for record in caplog.records] == [
        "cannot resolve b: no such name; keeping no address",
        "cannot resolve a: server down; keeping 10.0.0.1:1",
        "b resolves again: 10.0.0.2:1",
        "cannot resolve b: no such name; keeping 10.0.0.2:1",
    ]


def test_the_system_resolves_localhost():
    async def go():
        assert "127.0.0.1:50061" in await discovery.resolve_now("localhost", 50061)

    asyncio.run(go())


def test_what_the_system_says_becomes_addresses(monkeypatch):
    async def go():
        async def getaddrinfo(host, port, *, type):
            assert (host, port, type) == ("decode", 7, socket.SOCK_STREAM)
            rest = (type, 6, "")
            return [
                (socket.AF_INET, *rest, ("10.0.0.1", 7)),
                (socket.AF_INET6, *rest, ("fd00::2", 7, 0, 0)),
                (socket.AF_INET, *rest, ("10.0.0.1", 7)),
            ]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo, raising=False)
        assert await discovery.resolve_now("decode", 7) == {"10.0.0.1:7", "[fd00::2]:7"}

    asyncio.run(go())


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("host:1", Target("host", 1)),
        ("kairos-decode-0.kairos-decode:65535", Target("kairos-decode-0.kairos-decode", 65535)),
        ("[::1]:50061", Target("::1", 50061)),
        ("dns:kairos-prefill:50061", Target("kairos-prefill", 50061, by_name=True)),
        ("dns:a.b.:50061", Target("a.b.", 50061, by_name=True)),
    ],
)
def test_targets_are_read(text, target):
    assert Target.parse(text) == target


@pytest.mark.parametrize(
    "text",
    [
        *("", "host", "host:", ":1", "host:0", "host:65536", "host:-1", "host:x", "host:1 "),
        *("::1:1", "[::1]", "[::1:1", "dns:", "dns:host", "dns:50061", "dns:[::1]:1"),
        *("http://host:1", "a,b:1", " host:1", "host:\u0661", "[x y]:1"),
    ],
)
def test_what_is_no_target_is_quoted(text):
    with pytest.raises(ValueError, match=re.escape(repr(text.removeprefix("dns:")))):
        Target.parse(text)


def test_a_wrong_target_ends_the_watch():
    with pytest.raises(ValueError, match="'nowhere' is not of the form host:port"):
        asyncio.run(discovery.watch(["a:1", "nowhere"], 1.0, print))


def test_addresses_are_split_as_they_were_joined():
    for pair in (("host", 1), ("::1", 2), ("10.0.0.1", 3)):
        assert split_address(join_address(*pair)) == pair
    assert join_address("[::1]", 2) == "[::1]:2"
