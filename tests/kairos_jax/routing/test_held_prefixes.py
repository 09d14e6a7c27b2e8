"""What decode instances already have of a prompt is not sent to them, however KV travels."""

import asyncio
import contextlib

import fakes
import pytest
from fleet import COST, asked
from kv_nodes import FACTS, KINDS, nodes, same, sharding, some_kv

from kairos_jax.engine.functions import BLOCK_PAGES
from kairos_jax.kv.manifest import Facts
from kairos_jax.kv.transport import LocalTransport
from kairos_jax.routing.router import Router
from kairos_jax.worker.build import build_worker
from schedulers.ledger.instance import Role

PAGE = fakes.CONFIG.page_size
# Of a fake engine: blocks of 32 tokens.
OF_FAKES = Facts("fake", "f00d", "int32", PAGE, (BLOCK_PAGES, PAGE), BLOCK_PAGES * PAGE)
PROMPT = list(range(100))


@KINDS
def test_blocks_that_are_here_do_not_come(kind):
    async def run():
        async with nodes(kind=kind) as (prefill, decode):
            for first, came in ((1, 2), (2, 3)):
                ticket = prefill.offer("a", 20, some_kv())
                same(await decode.fetch(ticket, sharding(), first), some_kv()[first:])
                assert decode.transport.received_bytes == came * FACTS.block_bytes
                await prefill.empty()
            ticket = prefill.offer("a", 20, some_kv())
            with pytest.raises(ConnectionError, match=r"first must be from 0 to 2.*got 3"):
                await decode.fetch(ticket, sharding(), 3)
            prefill.transport.release(ticket)
            await prefill.empty()

    asyncio.run(run())


@KINDS
@pytest.mark.parametrize(("ahead", "first", "came"), [(0, 2, 3), (1, 2, 2), (2, 1, 3), (1, 0, 5)])
def test_when_kv_is_asked_for_more_or_less_may_be_here_than_when_it_was_sent_ahead(
    kind, ahead, first, came
):
    async def run():
        async with nodes(kind=kind) as (prefill, decode):
            kv, ticket = some_kv(), prefill.transport.open("a", 20)
            decode.transport.prefetch(ticket, sharding(), ahead)
            prefill.transport.extend(ticket, kv[:2])
            prefill.transport.extend(ticket, kv[2:], last=True)
            await asyncio.sleep(0)
            assert decode.transport.staged_bytes == (3 - ahead) * FACTS.block_bytes
            (fetch,) = decode.transport._fetches.values()
            await asyncio.wait_for(asyncio.shield(fetch.task), 30)
            same(await decode.fetch(ticket, sharding(), first), some_kv()[first:])
            assert decode.transport.received_bytes == came * FACTS.block_bytes
            await prefill.empty()
            await decode.empty()

    asyncio.run(run())


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("kind", ["local", "jax", "grpc"])
def test_the_same_tokens_by_fewer_bytes(kind, cache):
    """Each prompt is computed anew, so what takes several steps is sent as its parts are there."""
    other = PROMPT[:50] + [7] * 50
    # Of four blocks; of the first 50 tokens, six pages are whole.
    prompts = [(PROMPT, 4), (PROMPT, 1), (other, 3), (PROMPT[:64], 1), (other, 1)]

    async def run():
        async with _transports(kind) as (source, target), _served((source, target), cache) as ask:
            for prompt, came in prompts:
                before = target.received_bytes
                assert await ask(prompt) == fakes.expected_tokens(prompt, 9)
                count = came if cache else OF_FAKES.num_blocks(len(prompt))
                assert target.received_bytes - before == count * OF_FAKES.block_bytes

    asyncio.run(run())


@contextlib.asynccontextmanager
async def _transports(kind):
    """Of who prefills and of who decodes."""
    if kind == "local":
        transport = LocalTransport()
        yield transport, transport
        assert transport.num_offers == 0
        transport.close()
        return
    async with nodes(kind=kind, facts=(OF_FAKES,) * 2) as made:
        yield [node.transport for node in made]
        for node in made:
            await node.empty()


@contextlib.asynccontextmanager
async def _served(transports, cache):
    """Two workers; gives what asks them for nine tokens after a prompt."""
    config = fakes.altered(prefill__prefix_cache=False, decode__prefix_cache=cache)
    router = Router(asyncio.get_running_loop(), 64, COST)
    workers = [
        build_worker(
            config, role, role.value, fakes.FakeEngine(limits), COST, transport, router.emit
        )
        for role, transport in zip((Role.PREFILL, Role.DECODE), transports, strict=True)
        for limits in [config.limits(role)]
    ]
    router.connect(workers)
    for worker in workers:
        worker.start()

    async def ask(prompt):
        stream = router.submit(asked(prompt))
        return await asyncio.wait_for(_ids(stream), 30)

    yield ask
    await asyncio.wait_for(router.drained(), 30)
    for worker in workers:
        await asyncio.to_thread(worker.stop)
        worker.instance.check()
        assert worker.instance.pages.num_free == worker.instance.limits.num_pages
        assert not worker.moves.holds_tickets


async def _ids(stream):
    return [output.token.id async for output in stream]
