"""Routers and workers over real gRPC: all is well, one dies, one hangs, one does not fit."""

import asyncio
import logging
import random
from dataclasses import replace

import cluster
import fakes
import grpc
import pytest
from relay import Relay

from kairos_jax.kv.transport import LocalTransport
from kairos_jax.net.credentials import Credentials
from kairos_jax.routing import links
from kairos_jax.worker.messages import Died
from kairos_jax.worker.server import RoleOptions, RoleServer
from models.sampling import SamplingParams
from schedulers.ledger.instance import Role


def run(main):
    asyncio.run(asyncio.wait_for(main(), 60))


def some_requests(count, seed=1):
    rng = random.Random(seed)
    return [
        (
            [rng.randrange(fakes.VOCAB) for _ in range(rng.choice([1, 9, 33, 60]))],
            rng.choice([1, 9]),
        )
        for _ in range(count)
    ]


async def ask_all(front, requests):
    answers = await asyncio.gather(*(front.ask(*request) for request in requests))
    for (prompt, count), answer in zip(requests, answers, strict=True):
        assert answer == fakes.expected_tokens(prompt, count)


def listening(front):
    """What a router is told of workers that died, from now on."""
    died, emit = [], front.router.emit

    def heard(event):
        if isinstance(event, Died):
            died.append(event)
        emit(event)

    front.router.emit = heard
    return died


@pytest.fixture
def logged():
    """Waits until links have logged so many lines with a text, and returns them."""
    lines, more = [], asyncio.Event()

    class Ear(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())
            more.set()

    async def until(count, text):
        async with asyncio.timeout(30):
            while len(found := [line for line in lines if text in line]) < count:
                more.clear()
                await more.wait()
        return found

    log, ear = logging.getLogger("kairos_jax.routing.links"), Ear()
    log.addHandler(ear)
    yield until
    log.removeHandler(ear)


def test_two_routers_share_two_workers_of_each_role():
    async def main():
        async with cluster.running(2, 2) as (nodes, one, transport):
            two = cluster.Front.start(nodes)
            await two.linked(4)
            assert {node.server.service.num_routers for node in nodes} == {2}
            await asyncio.gather(
                ask_all(one, some_requests(20)), ask_all(two, some_requests(20, seed=2))
            )
            for node in nodes:
                await cluster.idle(node)
            assert transport.num_offers == 0
            await two.links.close()

    run(main)


def test_logprobs_of_a_prompt_come_with_its_first_token_alone():
    async def main():
        async with cluster.running() as (_, front, _):
            prompt, how = list(range(3, 60)), SamplingParams(prompt_logprobs=2)
            expected = fakes.expected_prompt_logprobs(prompt, 2)
            for _ in range(2):  # the second time, of a prompt that may be cached
                stream = front.submit(prompt, 3, sampling=how)
                told = [output.token.prompt async for output in stream]
                assert told == [expected, None, None]

    run(main)


def test_the_cost_of_each_kind_of_step_comes_from_a_worker_of_its_role():
    async def main():
        async with cluster.running() as (_, front, _):
            assert front.router.fleet.cost.prefill.base_s == fakes.PROFILE["prefill"]["base_s"]
            assert front.router.fleet.cost.decode.base_s == fakes.PROFILE["decode"]["base_s"]

    run(main)


def test_a_router_that_goes_leaves_nothing_behind():
    async def main():
        async with cluster.running() as (nodes, front, transport):
            prefill, decode = nodes
            decode.engine.gate.clear()
            streams = [front.submit([1, 2, 3], 30) for _ in range(12)]
            for stream in streams:
                await anext(aiter(stream))
            waiting = front.submit([4] * 100, 1)
            assert prefill.server.service.num_requests > 0
            await front.links.close()
            decode.engine.gate.set()
            for node in nodes:
                await cluster.idle(node)
                assert node.server.service.num_routers == 0
            assert transport.num_offers == 0
            del waiting

    run(main)


def test_a_worker_that_dies_is_lost_at_once_and_joins_again_as_another():
    async def main():
        async with cluster.running(hang_s=30.0) as (nodes, front, transport):
            died = listening(front)
            decode = nodes[1]
            decode.engine.gate.clear()
            stream = front.submit([1, 2, 3], 9)
            await anext(aiter(stream))
            (before,) = (linked.id for linked in front.links.of(Role.DECODE))
            await decode.die()
            await front.linked(1)
            await front.until(lambda: bool(died))
            assert died[0].instance == before
            nodes[1] = await decode.again(transport)
            await front.linked(2)
            (after,) = (linked.id for linked in front.links.of(Role.DECODE))
            assert after != before
            assert after.partition("@")[0] == before.partition("@")[0]
            await front.ask([5, 6], 9)
            front.router.cancel(stream)

    run(main)


def test_a_stream_goes_on_where_its_worker_died():
    async def main():
        async with cluster.running(1, 2, hang_s=30.0) as (nodes, front, _):
            stream = front.submit([1, 2, 3], 60)
            tokens = aiter(stream)
            got = [(await anext(tokens)).token.id for _ in range(5)]
            (having,) = (node for node in nodes[1:] if node.server.name in stream.peers[-1].id)
            having.engine.gate.clear()
            await having.die()
            got += [output.token.id async for output in tokens]
            assert got == fakes.expected_tokens([1, 2, 3], 60)

    run(main)


def test_a_step_that_hangs_makes_its_worker_lost_until_it_ends(logged):
    async def main():
        options = RoleOptions(cluster.HOST, 0, cluster.HOST, stuck_s=0.1)
        transport = LocalTransport()
        nodes = [
            await cluster.Node.start(role, transport, options=options)
            for role in (Role.PREFILL, Role.DECODE)
        ]
        front = cluster.Front.start(nodes, hang_s=0.4)
        await front.linked(2)
        died = listening(front)
        nodes[1].engine.gate.clear()
        stream = front.submit([1, 2, 3], 9)
        await anext(aiter(stream))
        await front.linked(1)
        assert [each.aboard for each in died] == [None]
        await asyncio.sleep(0)  # the router takes it
        assert front.router.fleet.last_loss == "a decode instance failed: it stopped answering"
        await logged(1, "hangs in a step")
        assert not front.links.of(Role.DECODE)
        nodes[1].engine.gate.set()
        await front.linked(2)
        await front.ask([1, 2], 9)
        front.router.cancel(stream)
        await front.links.close()
        for node in nodes:
            await node.die()
        transport.close()

    run(main)


def test_a_worker_whose_loop_ends_is_lost_with_its_reason():
    async def main():
        async with cluster.running() as (nodes, front, _):
            died = listening(front)
            nodes[1].engine.fail = RuntimeError("no more memory")
            stream = front.submit([1, 2, 3], 9)
            await front.linked(1)
            assert [str(each.error) for each in died] == ["RuntimeError: no more memory"]
            assert [each.aboard for each in died] == [(stream.request.id,)]
            await asyncio.sleep(0)  # the router takes it
            assert front.router.fleet.last_loss == "a decode instance failed: its step failed"

    run(main)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"facts": replace(cluster.FACTS, fingerprint="beef")},
            "its weights (beef) are those of 1 workers",
        ),
        ({"facts": replace(cluster.FACTS, model="other")}, "its model is 'other'"),
        ({"config": fakes.altered(dtype="bfloat16")}, "its dtype is 'bfloat16'"),
        ({"config": fakes.altered(page_size=16)}, "its page_size is 16"),
        ({"config": fakes.altered(max_context=96)}, "its max_context is 96"),
    ],
)
def test_a_worker_that_does_not_fit_is_named_and_does_not_join(changes, reason, logged):
    async def main():
        async with cluster.running(1, 1) as (nodes, front, transport):
            odd = await cluster.Node.start(Role.DECODE, transport, **changes)
            nodes.append(odd)
            addresses = {node.server.address for node in nodes[1:]}
            front.links.found(Role.DECODE, frozenset(addresses))
            (line,) = await logged(1, odd.server.address)
            assert reason in line
            assert len(front.links.workers) == 2
            if "weights" in reason:
                assert "f00d, of 2 workers, are served" in line

    run(main)


def test_the_weights_of_most_workers_are_served_whichever_linked_first(logged):
    async def main():
        transport, odd = LocalTransport(), replace(cluster.FACTS, fingerprint="beef")
        first = await cluster.Node.start(Role.DECODE, transport, facts=odd)
        front, nodes = cluster.Front.start([first]), [first]
        await front.linked(1)
        for role in (Role.PREFILL, Role.DECODE):
            nodes.append(await cluster.Node.start(role, transport))
        of_role = {role: [n for n in nodes if n.server.role is role] for role in Role}
        for role in (Role.PREFILL, Role.DECODE):
            addresses = frozenset(node.server.address for node in of_role[role])
            front.links.found(role, addresses)
        await logged(1, "(beef) are those of 1 workers, and f00d, of 2 workers, are served")
        served = {node.server.name for node in nodes[1:]}
        while {each.welcome.instance for each in front.links.workers.values()} != served:
            front.changed.clear()
            await asyncio.wait_for(front.changed.wait(), 30)
        await front.ask([1, 2, 3], 9)
        await front.links.close()
        for node in nodes:
            await node.die()
        transport.close()

    run(main)


def test_a_tie_of_weights_is_told_and_ends_when_the_others_leave(logged):
    async def main():
        transport, odd = LocalTransport(), replace(cluster.FACTS, fingerprint="beef")
        roles = (Role.PREFILL, Role.DECODE)
        first = [await cluster.Node.start(role, transport, facts=odd) for role in roles]
        front = cluster.Front.start(first)
        await front.linked(2)

        def served():
            return [each.welcome.fingerprint for each in front.links.workers.values()]

        second = [await cluster.Node.start(role, transport) for role in roles]
        for old, new in zip(first, second, strict=True):
            both = frozenset({old.server.address, new.server.address})
            front.links.found(new.server.role, both)
        await logged(2, "of 2 workers, are served; as many have either")
        assert served() == ["beef"] * 2
        for _, new in zip(first, second, strict=True):
            # No more listed: nothing tries to link to it again.
            front.links.found(new.server.role, frozenset({new.server.address}))
        await first[0].die()
        await logged(1, "(beef) are those of 1 workers, and f00d, of 2 workers, are served from")
        await front.until(lambda: served() == ["f00d"] * 2)
        await front.ask([1, 2, 3], 9)
        await front.links.close()
        for node in (first[1], *second):
            await node.die()
        transport.close()

    run(main)


def test_a_worker_of_the_other_role_is_named(logged):
    async def main():
        async with cluster.running(1, 1) as (nodes, front, _):
            front.links.found(Role.DECODE, frozenset({nodes[0].server.address}))
            await logged(1, "its role is 'prefill', and this router is for 'decode'")

    run(main)


def test_a_token_is_asked_for_and_shown(logged):
    async def main():
        net, transport = Credentials(token="secret"), LocalTransport()
        roles = (Role.PREFILL, Role.DECODE)
        nodes = [await cluster.Node.start(role, transport, net=net) for role in roles]
        stranger = cluster.Front.start(nodes)
        front = cluster.Front.start(nodes, net=net)
        await front.linked(2)
        await front.ask([1, 2], 3)
        await logged(2, grpc.StatusCode.UNAUTHENTICATED.name)
        assert not stranger.links.workers
        for each in (front, stranger):
            await each.links.close()
        for node in nodes:
            await node.die()
        transport.close()

    run(main)


def test_a_worker_under_two_addresses_joins_once(logged):
    async def main():
        async with cluster.running() as (nodes, front, _):
            port = nodes[1].server.address.rpartition(":")[2]
            addresses = frozenset({nodes[1].server.address, f"localhost:{port}"})
            front.links.found(Role.DECODE, addresses)
            await logged(1, f"it is linked already, at {nodes[1].server.address}")
            assert len(front.links.workers) == 2
            await front.ask([1, 2], 9)

    run(main)


def test_a_worker_that_is_listed_no_more_is_kept_until_it_leaves():
    async def main():
        async with cluster.running() as (nodes, front, _):
            front.links.found(Role.DECODE, frozenset())
            await front.ask([1, 2], 9)
            await nodes[1].die()
            await front.linked(1)

    run(main)


def test_a_worker_that_drains_ends_what_runs_and_returns_what_waits():
    async def main():
        async with cluster.running(1, 2) as (nodes, front, _):
            leaving, staying = nodes[1:]
            for node in (leaving, staying):
                node.engine.gate.clear()
            requests = some_requests(30)
            answers = asyncio.ensure_future(ask_all(front, requests))
            for node in (leaving, staying):
                await node.begun()
            draining = asyncio.ensure_future(leaving.server.drain(leaving.worker))
            await front.linked(2)
            for node in (leaving, staying):
                node.engine.gate.set()
            await answers
            assert await draining
            await leaving.server.close()
            await cluster.idle(leaving)

    run(main)


def test_what_outlasts_the_grace_of_a_drain_goes_on_elsewhere():
    async def main():
        options = RoleOptions(cluster.HOST, 0, cluster.HOST, grace_s=0.0)
        async with cluster.running(1, 1) as (nodes, front, transport):
            leaving = await cluster.Node.start(Role.DECODE, transport, options=options)
            nodes.append(leaving)
            addresses = frozenset(node.server.address for node in nodes[1:])
            front.links.found(Role.DECODE, addresses)
            await front.linked(3)
            await nodes[1].die()
            await front.linked(2)
            leaving.engine.gate.clear()
            stream = front.submit([1, 2, 3], 60)
            await leaving.begun()
            nodes[1] = await nodes[1].again(transport)
            await front.linked(3)
            draining = asyncio.ensure_future(leaving.server.drain(leaving.worker))
            await front.linked(2)
            leaving.engine.gate.set()
            assert not await draining
            assert await cluster.read(stream) == fakes.expected_tokens([1, 2, 3], 60)

    run(main)


def test_a_worker_that_starts_is_asked_again_soon(monkeypatch):
    """Twenty tries that doubled their pause would take hours."""
    monkeypatch.setattr(links, "_LEAST_BACKOFF_S", 0.01)
    monkeypatch.setattr(links, "_MOST_BACKOFF_S", 3600.0)

    async def main():
        server = RoleServer(Role.PREFILL, RoleOptions(cluster.HOST, 0, cluster.HOST), cluster.PLAIN)
        tries, enough, admit = [], asyncio.Event(), server.service._admit

        def counted(first):
            tries.append(first)
            if len(tries) == 20:
                enough.set()
            return admit(first)

        server.service._admit = counted
        await server.start()
        front = cluster.Front.start([])
        front.links.found(Role.PREFILL, frozenset({server.address}))
        await asyncio.wait_for(enough.wait(), 50)
        await front.links.close()
        await server.grpc.stop(None)

    run(main)


@pytest.mark.parametrize("who_notices", ["router", "workers", "both"])
def test_streams_go_on_after_nothing_went_over_their_links_for_a_while(who_notices):
    """As when links are cut for some seconds, or a router is stopped for longer than workers wait
    for it.
    """
    router_s, workers_s = (0.3 if who_notices in (who, "both") else 30.0 for who in _SIDES)

    async def main():
        options = RoleOptions(cluster.HOST, 0, cluster.HOST, router_hang_s=workers_s)
        transport = LocalTransport()
        nodes = [
            await cluster.Node.start(role, transport, options=options)
            for role in (Role.PREFILL, Role.DECODE, Role.DECODE)
        ]
        relays = [await Relay.start(node.server.address) for node in nodes]
        front = cluster.Front.start([], hang_s=router_s, rejoin_s=30.0)
        front.links.found(Role.PREFILL, frozenset({relays[0].address}))
        front.links.found(Role.DECODE, frozenset(each.address for each in relays[1:]))
        await front.linked(3)
        for node in nodes[1:]:
            node.engine.gate.clear()
        streams = [front.submit([number, 2, 3], 60) for number in range(8)]
        while not all(stream.tokens for stream in streams):
            await asyncio.sleep(0.01)
        for relay in relays:
            relay.carries.clear()
        for node in nodes[1:]:
            node.engine.gate.set()
        if router_s < 1:
            await front.until(lambda: not front.links.workers)
            late = front.submit([9, 2, 3], 60)  # waits as the others do
        else:
            while any(node.server.service.num_routers for node in nodes):
                await asyncio.sleep(0.01)
            late = front.submit([9, 2, 3], 60)
        for relay in relays:
            relay.carries.set()
        for number, stream in (*enumerate(streams), (9, late)):
            assert await cluster.read(stream) == fakes.expected_tokens([number, 2, 3], 60)
        await front.linked(3)
        assert not any(stream.aboard for stream in streams), "no worker had failed"
        await front.links.close()
        for relay in relays:
            relay.close()
        for node in nodes:
            await cluster.idle(node)
            await node.die()
        transport.close()

    run(main)


_SIDES = ("router", "workers")


def test_a_link_that_ends_by_an_error_is_told(logged):
    """None ends unheard: a fault of ours would leave its worker unused for ever."""

    async def main():
        async def fail():
            raise RuntimeError("a fault of ours")

        task = asyncio.ensure_future(fail())
        task.add_done_callback(links._on_end)
        ended = asyncio.ensure_future(asyncio.sleep(0))
        ended.add_done_callback(links._on_end)
        await asyncio.wait([task, ended])
        assert len(await logged(1, "a link to a worker has ended by an error")) == 1

    run(main)
