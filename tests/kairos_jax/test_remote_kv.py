"""KV between two transports over loopback gRPC, in one process and in two."""

import asyncio
import contextlib
import ctypes
import gc
import itertools
import socket
from dataclasses import replace

import grpc
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kairos_jax.manifest import Facts, ManifestMismatch
from kairos_jax.remote_kv import RemoteTransport, TransferOptions
from kairos_jax.rpc import kv_pb2 as pb
from kairos_jax.rpc import kv_pb2_grpc

TOKENS = 8
FACTS = Facts("tiny", "f00d", "float32", 2, (2, TOKENS, 4, 2, 8), TOKENS)
KINDS = pytest.mark.parametrize("kind", ["jax", "grpc"])


def sharding(num_devices=1, axis="columns", first=0):
    """On so many devices, split along the kv heads or the tokens."""
    devices = jax.devices()[first : first + num_devices]
    mesh = Mesh(np.array(devices), ("tensor",), axis_types=(AxisType.Auto,))
    spec = {"columns": (None, None, "tensor"), "rows": (None, "tensor"), "whole": ()}[axis]
    return NamedSharding(mesh, PartitionSpec(*spec))


def some_kv(num_blocks=3, where=None, dtype="float32", seed=0, shape=FACTS.block_shape):
    rng = np.random.default_rng(seed)
    blocks = [rng.integers(0, 100, shape).astype(jnp.dtype(dtype)) for _ in range(num_blocks)]
    return jax.device_put(blocks, where or sharding())


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


class Node:
    """One transport and its server, as a process has them."""

    def __init__(self, facts=FACTS, on_expired=None, clock=None, **options):
        self.server = grpc.aio.server()
        port = self.server.add_insecure_port("127.0.0.1:0")
        more = {"clock": clock} if clock else {}
        self.transport = RemoteTransport(
            facts,
            f"127.0.0.1:{port}",
            asyncio.get_running_loop(),
            grpc.aio.insecure_channel,
            options=TransferOptions(**options),
            on_expired=on_expired,
            **more,
        )
        self.transport.add_to(self.server)

    def offer(self, id, num_tokens, kv):
        """A copy: what is offered belongs to the transport, which deletes it."""
        return self.transport.offer(id, num_tokens, jax.tree.map(jnp.copy, kv))

    async def fetch(self, ticket, where=None):
        loop = asyncio.get_running_loop()
        kv = loop.create_future()
        self.transport.fetch(ticket, where, kv.set_result)
        result = await asyncio.wait_for(kv, 60)
        if isinstance(result, Exception):
            raise result
        return result

    async def empty(self):
        """Returns once nothing is held here."""
        await asyncio.sleep(0)  # what was asked of it before is begun
        async with asyncio.timeout(30):
            while self.transport.num_offers or self.transport.num_fetches:
                await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def nodes(count=2, facts=None, **options):
    made = [Node(facts[index] if facts else FACTS, **options) for index in range(count)]
    for node in made:
        await node.server.start()
    try:
        yield made
    finally:
        for node in made:
            node.transport.close()
            await node.server.stop(None)


@KINDS
def test_kv_comes_over_and_frees_what_was_offered(kind):
    async def run():
        async with nodes(kind=kind) as (prefill, decode):
            kv = some_kv()
            ticket = prefill.offer("a", 20, kv)
            where = sharding(first=1)
            got = await decode.fetch(ticket, where)
            same(got, kv)
            assert all(block.sharding == where for block in got)
            await prefill.empty()
            await decode.empty()

    asyncio.run(run())


@KINDS
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [*itertools.product(((1, 0), (2, 1), (4, 0)), ((1, 1), (2, 0), (4, 4)))],
)
def test_meshes_of_any_size_hand_over(kind, theirs, ours):
    async def run():
        async with nodes(kind=kind) as (prefill, decode):
            for here, there in itertools.product(("columns", "rows"), repeat=2):
                kv = some_kv(2, sharding(theirs[0], here, theirs[1]))
                where = sharding(ours[0], there, ours[1])
                got = await decode.fetch(prefill.offer("a", 16, kv), where)
                same(got, kv)
                assert all(block.sharding == where for block in got)

    asyncio.run(run())


@KINDS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8", "float8_e4m3fn", "bool"])
def test_bytes_of_any_dtype(kind, dtype):
    facts = replace(FACTS, dtype=dtype)

    async def run():
        async with nodes(kind=kind, facts=(facts, facts)) as (prefill, decode):
            kv = some_kv(2, sharding(2), dtype)
            same(await decode.fetch(prefill.offer("a", 16, kv), sharding(4)), kv)

    asyncio.run(run())


@KINDS
def test_without_a_sharding_whole_blocks_come(kind):
    async def run():
        async with nodes(kind=kind) as (prefill, decode):
            kv = [np.asarray(block) for block in some_kv(2)]
            same(await decode.fetch(prefill.offer("a", 16, kv)), kv)
            split = some_kv(2, sharding(2))
            same(await decode.fetch(prefill.offer("b", 16, split)), split)

    asyncio.run(run())


@KINDS
def test_a_step_that_still_computes_can_be_offered(kind):
    @jax.jit
    def slow(x):
        x = jax.lax.fori_loop(0, 200, lambda _, m: m @ m / jnp.abs(m).max(), jnp.eye(300))[0, 0] + x
        return jnp.broadcast_to(x, FACTS.block_shape)

    async def run():
        async with nodes(kind=kind) as (prefill, decode):
            kv = [slow(float(index)) for index in range(3)]
            same(await decode.fetch(prefill.offer("a", 24, kv), sharding()), kv)

    asyncio.run(run())


@KINDS
def test_no_prompt_too_long_for_what_may_be_on_its_way(kind):
    async def run():
        limit = 3 * FACTS.block_bytes
        async with nodes(kind=kind, in_flight_bytes=limit, urgent_bytes=0) as (prefill, decode):
            offers = [some_kv(seed=seed, num_blocks=7) for seed in range(5)]
            tickets = [prefill.offer(str(at), 7 * TOKENS, kv) for at, kv in enumerate(offers)]
            got = await asyncio.gather(*(decode.fetch(ticket, sharding()) for ticket in tickets))
            for kv, offered in zip(got, offers, strict=True):
                same(kv, offered)
            await prefill.empty()

    asyncio.run(run())


def test_one_process_takes_jax_and_gives_bytes():
    """Whoever has no transfer server is sent bytes, and sends them."""

    async def run():
        async with nodes(1, kind="jax") as (one,), nodes(1, kind="grpc") as (other,):
            kv = some_kv()
            same(await one.fetch(other.offer("a", 20, kv), sharding()), kv)
            same(await other.fetch(one.offer("a", 20, kv), sharding()), kv)

    asyncio.run(run())


def test_kv_comes_as_bytes_where_the_transfer_server_cannot_be_reached(caplog):
    async def run():
        async with nodes() as (prefill, decode):
            with socket.create_server(("127.0.0.1", 0)) as closed:
                prefill.transport._port.address = f"127.0.0.1:{closed.getsockname()[1]}"
            for seed in range(2):
                kv = some_kv(seed=seed)
                same(await decode.fetch(prefill.offer("a", 20, kv), sharding()), kv)
            await prefill.empty()
        assert caplog.text.count("comes as bytes from now on: no transfer server") == 1

    asyncio.run(run())


@KINDS
@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "beef"},
        {"dtype": "bfloat16"},
        {"block_shape": (2, TOKENS, 4, 2, 4)},
        {"page_size": 4},
    ],
)
def test_a_mismatch_is_found_before_any_of_it_is_taken(kind, change):
    async def run():
        facts = FACTS, replace(FACTS, **change)
        async with nodes(kind=kind, facts=facts) as (prefill, decode):
            ticket = prefill.offer("a", 20, some_kv())
            with pytest.raises(ManifestMismatch, match=next(iter(change))):
                await decode.fetch(ticket, sharding())
            prefill.transport.release(ticket)
            await prefill.empty()

    asyncio.run(run())


@KINDS
def test_a_ticket_is_good_for_one_peer(kind):
    async def run():
        async with nodes(3, kind=kind) as (prefill, decode, thief):
            ticket = prefill.transport.open("a", 20)
            prefill.transport.extend(ticket, some_kv(1))
            decode.transport.prefetch(ticket, sharding())
            while not [lease for lease in prefill.transport._leases if lease.claimant]:
                await asyncio.sleep(0)
            with pytest.raises(PermissionError, match=r"FAILED_PRECONDITION.*claimed already"):
                await thief.fetch(ticket, sharding())
            wrong = replace(ticket, uuid=ticket.uuid ^ 1)
            with pytest.raises(LookupError, match=r"NOT_FOUND.*request 'a'"):
                await thief.fetch(wrong, sharding())
            prefill.transport.extend(ticket, some_kv(2), last=True)
            assert len(await decode.fetch(ticket, sharding())) == 3
            await prefill.empty()  # it is told of the delivery after that
            with pytest.raises(LookupError, match="NOT_FOUND"):
                await decode.fetch(ticket, sharding())

    asyncio.run(run())


def test_a_claim_is_repeated_by_who_made_it():
    async def run():
        async with nodes(1, kind="jax") as (prefill,):
            ticket = prefill.offer("a", 20, some_kv())
            async with grpc.aio.insecure_channel(prefill.transport.address) as channel:
                stub = kv_pb2_grpc.KVStub(channel)

                async def claim(identity, nonce):
                    me = pb.Claimant(identity=identity, nonce=nonce)
                    call = stub.Claim(
                        pb.ClaimRequest(uuid=ticket.uuid, request_id="a", claimant=me)
                    )
                    assert (await call.read()).WhichOneof("what") == "manifest"
                    return call, (await call.read()).part

                first, part = await claim(1, 1)
                again, other_part = await claim(1, 1)
                assert part.uuid != other_part.uuid
                assert await first.code() is grpc.StatusCode.OK  # it has been taken over
                for other in ((1, 2), (2, 1)):
                    with pytest.raises(grpc.aio.AioRpcError, match="claimed already"):
                        await claim(*other)
                prefill.transport.release(ticket)
                assert await again.code() is grpc.StatusCode.OK
            await prefill.empty()

    asyncio.run(run())


@KINDS
def test_parts_come_over_while_the_rest_is_computed(kind):
    async def run():
        async with nodes(kind=kind) as (prefill, decode):
            kv = some_kv(5)
            ticket = prefill.transport.open("a", 5 * TOKENS)
            decode.transport.prefetch(ticket, sharding())
            prefill.transport.extend(ticket, kv[:2])
            prefill.transport.extend(ticket, kv[2:4])
            await asyncio.sleep(0)
            assert decode.transport.staged_bytes == 5 * FACTS.block_bytes
            fetched = asyncio.create_task(decode.fetch(ticket, sharding()))
            for _ in range(3):
                await asyncio.sleep(0)
            assert decode.transport.staged_bytes == 0
            prefill.transport.extend(ticket, kv[4:], last=True)
            same(await fetched, some_kv(5))
            await prefill.empty()
            await decode.empty()

    asyncio.run(run())


@KINDS
def test_what_was_brought_over_in_advance_is_there_at_once(kind):
    async def run():
        async with nodes(kind=kind) as (prefill, decode):
            kv = some_kv()
            ticket = prefill.offer("a", 20, kv)
            decode.transport.prefetch(ticket, sharding())
            decode.transport.prefetch(ticket, sharding())
            await prefill.empty()  # it was told that all has come
            assert decode.transport.staged_bytes == 3 * FACTS.block_bytes
            await prefill.server.stop(None)
            same(await decode.fetch(ticket, sharding()), kv)
            assert decode.transport.staged_bytes == 0

    asyncio.run(run())


@KINDS
def test_what_is_staged_is_dropped_when_it_is_given_up(kind):
    async def run():
        async with nodes(kind=kind) as (prefill, decode):
            ticket = prefill.transport.open("a", 20)
            prefill.transport.extend(ticket, some_kv(2))
            decode.transport.prefetch(ticket, sharding())
            while not [lease for lease in prefill.transport._leases if lease.claimant]:
                await asyncio.sleep(0)
            decode.transport.release(ticket)
            await decode.empty()
            prefill.transport.release(ticket)
            await prefill.empty()
            prefill.transport.extend(ticket, some_kv(1), last=True)  # it had not heard of it yet
            await prefill.empty()

    asyncio.run(run())


def test_no_more_is_staged_than_there_is_room_for():
    async def run():
        async with nodes(staged_bytes=4 * FACTS.block_bytes) as (prefill, decode):
            tickets = [prefill.offer(str(at), 20, some_kv(seed=at)) for at in range(3)]
            for ticket in tickets:
                decode.transport.prefetch(ticket, sharding())
            while decode.transport.num_fetches == 0:
                await asyncio.sleep(0)
            assert decode.transport.num_fetches == 1
            for at, ticket in enumerate(tickets):
                same(await decode.fetch(ticket, sharding()), some_kv(seed=at))

    asyncio.run(run())


@KINDS
def test_a_fetch_that_is_given_up_ends_by_an_error(kind):
    async def run():
        async with nodes(kind=kind) as (prefill, decode):
            ticket = prefill.transport.open("a", 20)
            fetched = asyncio.create_task(decode.fetch(ticket, sharding()))
            while not [lease for lease in prefill.transport._leases if lease.claimant]:
                await asyncio.sleep(0)
            decode.transport.release(ticket)
            with pytest.raises(LookupError, match="given up"):
                await fetched
            await decode.empty()

    asyncio.run(run())


@KINDS
def test_a_silent_peer_fails_the_fetch_in_time(kind):
    async def run():
        async with nodes(kind=kind, fetch_s=0.2) as (prefill, decode):
            ticket = prefill.transport.open("a", 20)
            with pytest.raises(TimeoutError, match=r"within 0.2 s"):
                await decode.fetch(ticket, sharding())
            await decode.empty()

    asyncio.run(run())


def test_nobody_there():
    async def run():
        async with nodes() as (prefill, decode):
            ticket = prefill.offer("a", 20, some_kv())
            await prefill.server.stop(None)
            with pytest.raises(ConnectionError, match="UNAVAILABLE"):
                await decode.fetch(ticket, sharding())

    asyncio.run(run())


def test_offers_run_out_and_are_told(caplog):
    async def run():
        now, told = [0.0], asyncio.Queue()
        async with nodes(1, lease_s=1.0, on_expired=told.put_nowait, clock=lambda: now[0]) as (
            prefill,
        ):
            prefill.offer("late", 20, some_kv())
            while prefill.transport.num_offers == 0:
                await asyncio.sleep(0)
            now[0] = 2.0
            assert await asyncio.wait_for(told.get(), 30) == "late"
            assert prefill.transport.num_offers == 0
        assert "the KV of request 'late', that nobody claimed, is freed" in caplog.text

    asyncio.run(run())


def test_one_s_own_kv_takes_no_detour():
    async def run():
        async with nodes(1) as (node,):
            kv = some_kv()
            ticket = node.transport.offer("a", 20, kv)
            await node.server.stop(None)
            same(await node.fetch(ticket, sharding(2)), kv)
            node.transport.release(ticket)
            await node.empty()
            with pytest.raises(LookupError, match="no KV is offered for request 'a'"):
                await node.fetch(ticket, sharding(2))

    asyncio.run(run())


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


@pytest.mark.slow
@KINDS
def test_memory_goes_back_whatever_becomes_of_an_offer(kind):
    """Never claimed, claimed and never pulled, given up, or fetched."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("this C library does not say how much it keeps for itself")
    shape = (8, 512, 16, 2, 64)
    facts = replace(FACTS, block_shape=shape, block_tokens=512)

    async def once(prefill, decode, stub):
        tickets = []
        for at in range(4):
            blocks = [
                jax.device_put(jnp.zeros(shape, jnp.float32) + at, sharding(2)) for _ in range(2)
            ]  # 64 MiB
            tickets.append(prefill.transport.offer(str(at), 1024, blocks))
        await decode.fetch(tickets[0], sharding(first=1))
        me = pb.Claimant(identity=1, nonce=1)
        call = stub.Claim(pb.ClaimRequest(uuid=tickets[1].uuid, request_id="1", claimant=me))
        await call.read()
        await call.read()
        call.cancel()
        given_up = asyncio.create_task(decode.fetch(tickets[2], sharding(first=1)))
        await asyncio.sleep(0)
        decode.transport.release(tickets[2])
        with pytest.raises(LookupError):
            await given_up
        for ticket in tickets:
            prefill.transport.release(ticket)
        await prefill.empty()
        await decode.empty()
        gc.collect()
        libc.malloc_trim(0)  # what it has freed is not to count

    async def run():
        async with (
            nodes(kind=kind, facts=(facts,) * 2) as (prefill, decode),
            grpc.aio.insecure_channel(prefill.transport.address) as channel,
        ):
            stub = kv_pb2_grpc.KVStub(channel)
            await once(prefill, decode, stub)
            before = resident_bytes()
            for _ in range(6):
                await once(prefill, decode, stub)
            # Of each round's 256 MiB: less than what any one kind of offer would leave behind.
            assert resident_bytes() - before < 200 << 20

    asyncio.run(run())
