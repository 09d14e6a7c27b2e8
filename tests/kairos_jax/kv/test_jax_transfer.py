"""Connections of a transfer server to those of its peers: opened once, closed with the peer."""

import asyncio

import kv_member
from kv_member import open_sockets, sharding, some_kv

from kairos_jax.kv import jax_transfer
from kairos_jax.kv.client import arrived
from kairos_jax.kv.jax_transfer import TransferPort
from kairos_jax.kv.manifest import describe
from kairos_jax.kv.transport import Ticket

SHAPE = [2, 8, 4, 2, 8]
FACTS = kv_member.facts_of(SHAPE)
PEER = "10.0.0.1:50052"


def new_port():
    return TransferPort("127.0.0.1", 4 << 20, 8, asyncio.to_thread)


async def pull(ours, theirs, incarnation, urgent=False, address=PEER):
    """One block, from a peer at `address` whose transfer server is `theirs`."""
    where = sharding(1, "rows")
    blocks = some_kv(SHAPE, "float32", 1, 0, where)
    uuid, _ = theirs.register(blocks)
    told = describe(FACTS, Ticket("a", SHAPE[1]), blocks[0], theirs.address, incarnation)
    return await ours.pull(address, told, uuid, 1, where, urgent, arrived)


async def left_of(sockets, count):
    """Returns when so many of them are still open: the servers' threads close them."""
    async with asyncio.timeout(30):
        while len(open_sockets() & sockets) != count:
            await asyncio.sleep(0)


def test_a_peer_has_two_connections_until_it_is_another():
    async def run():
        ours, first, second = new_port(), new_port(), new_port()
        before = open_sockets()
        for urgent in (True, False, True, False):
            await pull(ours, first, 1, urgent)
        assert ours.num_connections == 2
        opened = open_sockets() - before
        assert opened
        await pull(ours, second, 2, urgent=True)
        assert ours.num_connections == 1
        await left_of(opened, 0)
        opened = open_sockets() - before
        assert opened
        ours.drop(PEER)
        assert ours.num_connections == 0
        await left_of(opened, 0)

    asyncio.run(run())


def test_no_peer_costs_another_its_connection():
    async def run():
        ours, first, second = new_port(), new_port(), new_port()
        await pull(ours, first, 1)
        await pull(ours, second, 2, address="10.0.0.2:50052")
        assert ours.num_connections == 2
        ours.drop("10.0.0.2:50052")
        assert ours.num_connections == 1
        ours.drop("10.0.0.3:50052")
        assert ours.num_connections == 1

    asyncio.run(run())


def test_a_pull_that_is_cancelled_leaves_its_connection_to_others(monkeypatch):
    async def run():
        ours, theirs, reached = new_port(), new_port(), asyncio.Event()
        await pull(ours, theirs, 1)

        async def held(arrays):
            reached.set()
            await asyncio.Event().wait()

        where = sharding(1, "rows")
        blocks = some_kv(SHAPE, "float32", 1, 0, where)
        uuid, _ = theirs.register(blocks)
        told = describe(FACTS, Ticket("a", SHAPE[1]), blocks[0], theirs.address, 1)
        cancelled = asyncio.ensure_future(ours.pull(PEER, told, uuid, 1, where, False, held))
        await asyncio.wait_for(reached.wait(), 30)
        opened = open_sockets()
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        await asyncio.gather(*ours._watching)
        assert ours.num_connections == 1
        await pull(ours, theirs, 1)
        assert open_sockets() <= opened, "by the connection that was there"

    asyncio.run(run())


def test_a_connection_whose_cancelled_pull_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(jax_transfer, "_WATCH_S", 0.05)

    async def run():
        ours, theirs = new_port(), new_port()
        await pull(ours, theirs, 1)
        (peer,) = ours._connections

        class Stuck:
            def is_ready(self):
                return False

        ours._watch(peer, ours._connections[peer], [Stuck()])
        await asyncio.gather(*ours._watching)
        assert ours.num_connections == 0

    asyncio.run(run())
