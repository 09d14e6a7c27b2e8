"""KV between two transports over loopback gRPC: what becomes of an offer. One peer claims it, it is
brought over in advance, given up, or runs out.
"""

import asyncio
import ctypes
import gc
from dataclasses import replace

import grpc
import jax
import jax.numpy as jnp
import pytest
from kv_nodes import FACTS, KINDS, TOKENS, nodes, offered, same, sharding, some_kv

from kairos_jax.rpc import kv_pb2 as pb
from kairos_jax.rpc import kv_pb2_grpc


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
        assert "the KV of the request, that nobody claimed, is freed" in caplog.text

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
            tickets.append(offered(prefill.transport, str(at), 1024, blocks))
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
