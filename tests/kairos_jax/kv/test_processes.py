"""KV between two processes: any meshes, and what is seen of a process that is killed or hangs."""

import asyncio
import contextlib
import itertools
import json
import signal
import sys
import time
from asyncio.subprocess import PIPE
from pathlib import Path

import kv_member
import numpy as np
import pytest
from kv_member import facts_of, open_sockets, sharding, some_kv

from kairos_jax.kv.transport import Ticket

SMALL, LARGE = [2, 8, 4, 2, 8], [16, 128, 16, 2, 64]  # 4 KiB and 16 MiB
KINDS = pytest.mark.parametrize("kind", ["jax", "grpc"])


class Producer:
    """The other process."""

    def __init__(self, process):
        self.process = process
        self.ids = itertools.count()

    async def offer(self, shape=SMALL, num_blocks=2, num_devices=1, axis="columns", **how):
        ask = {"id": str(next(self.ids)), "shape": shape, "num_blocks": num_blocks, "seed": 0}
        ask |= {"num_devices": num_devices, "axis": axis, "dtype": "float32"} | how
        return Ticket(**json.loads(await self._ask(json.dumps(ask))))

    async def num_offers(self):
        return int(await self._ask(""))

    async def _ask(self, line):
        self.process.stdin.write(f"{line}\n".encode())
        return await asyncio.wait_for(self.process.stdout.readline(), 60)


@contextlib.asynccontextmanager
async def pair(kind, shape=SMALL, dtype="float32", **options):
    """A producer, a transport of this process, and a function that fetches with it."""
    path = Path(kv_member.__file__)
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(path), kind, stdin=PIPE, stdout=PIPE
    )
    transport, server = await kv_member.transport_for(facts_of(shape, dtype), kind, **options)

    async def fetch(ticket, where):
        kv = asyncio.get_running_loop().create_future()
        transport.fetch(ticket, where, kv.set_result)
        result = await asyncio.wait_for(kv, 60)
        if isinstance(result, Exception):
            raise result
        return result

    try:
        yield Producer(process), transport, fetch
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        transport.close()
        await server.stop(None)


async def under_way(transport, ticket):
    """Returns when the KV is on its way."""
    peers = transport._client._sources
    while not (peer := peers.get(ticket.address)) or not peer.in_flight.num_bytes:
        await asyncio.sleep(0)


@pytest.mark.slow
@KINDS
def test_meshes_of_1_2_and_4_devices_hand_over(kind):
    dtype = "bfloat16"

    async def run():
        async with pair(kind, SMALL, dtype) as (producer, _, fetch):
            axes = ("columns", "rows")
            for theirs, ours in itertools.product((1, 2, 4), repeat=2):
                for here, there in itertools.product(axes, repeat=2):
                    ticket = await producer.offer(num_devices=theirs, axis=here, dtype=dtype)
                    where = sharding(ours, there, first=ours % 4)
                    got = await fetch(ticket, where)
                    sent = some_kv(SMALL, dtype, 2, 0, where)
                    assert all(block.sharding == where for block in got)
                    for one, other in zip(got, sent, strict=True):
                        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
            while await producer.num_offers():  # what it has delivered, it is told of afterwards
                pass

    asyncio.run(run())


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("when", ["before the claim", "in the middle"])
def test_a_killed_producer_is_seen_at_once(kind, when):
    async def run():
        async with pair(kind, LARGE, in_flight_bytes=32 << 20) as (producer, transport, fetch):
            ticket = await producer.offer(LARGE, num_blocks=8)
            if when == "before the claim":
                producer.process.kill()
                await producer.process.wait()
            fetched = asyncio.create_task(fetch(ticket, sharding(1, "rows")))
            if when == "in the middle":
                await under_way(transport, ticket)
                producer.process.kill()
            begin = time.monotonic()
            with pytest.raises(ConnectionError):
                await fetched
            assert time.monotonic() - begin < 2.0
            assert transport.num_fetches == 0
        await still_works(kind)

    asyncio.run(run())


@pytest.mark.slow
@KINDS
def test_a_producer_that_is_killed_and_never_comes_back_leaves_no_socket(kind):
    async def run():
        async with pair(kind) as (producer, transport, fetch):
            before = open_sockets()  # also of other tests, whose end may come at any time
            assert len(await fetch(await producer.offer(), sharding(1, "rows"))) == 2
            opened = open_sockets() - before
            assert opened
            producer.process.kill()
            begin = time.monotonic()
            while transport._client._sources or open_sockets() & opened:
                assert time.monotonic() - begin < 10  # it looks each second
                await asyncio.sleep(0)

    asyncio.run(run())


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("when", ["before the claim", "in the middle"])
def test_a_producer_that_hangs_is_given_up_in_time(kind, when):
    async def run():
        options = {"in_flight_bytes": 32 << 20, "fetch_s": 1.0}
        async with pair(kind, LARGE, **options) as (producer, transport, fetch):
            ticket = await producer.offer(LARGE, num_blocks=8)
            if when == "before the claim":
                producer.process.send_signal(signal.SIGSTOP)
            fetched = asyncio.create_task(fetch(ticket, sharding(1, "rows")))
            if when == "in the middle":
                await under_way(transport, ticket)
                producer.process.send_signal(signal.SIGSTOP)
            begin = time.monotonic()
            with pytest.raises(TimeoutError, match="within 1 s"):
                await fetched
            assert time.monotonic() - begin < 3.0
            assert transport.num_fetches == 0
            producer.process.send_signal(signal.SIGCONT)
            again = await producer.offer(LARGE, num_blocks=1)
            assert len(await fetch(again, sharding(1, "rows"))) == 1
        await still_works(kind)

    asyncio.run(run())


async def still_works(kind):
    """Another producer is not touched by what became of the last."""
    async with pair(kind) as (producer, _, fetch):
        assert len(await fetch(await producer.offer(), sharding(2, "rows"))) == 2
