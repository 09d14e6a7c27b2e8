"""KV between two transports over loopback gRPC: what comes over, and from whom nothing does."""

import asyncio
import itertools
import socket
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kv_nodes import FACTS, KINDS, TOKENS, nodes, offered, same, sharding, some_kv

from kairos_jax.kv.manifest import ManifestMismatch


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


def test_one_s_own_kv_takes_no_detour():
    async def run():
        async with nodes(1) as (node,):
            kv = some_kv()
            ticket = offered(node.transport, "a", 20, kv)
            await node.server.stop(None)
            same(await node.fetch(ticket, sharding(2)), kv)
            node.transport.release(ticket)
            await node.empty()
            with pytest.raises(LookupError, match="no KV is offered for request 'a'"):
                await node.fetch(ticket, sharding(2))

    asyncio.run(run())
