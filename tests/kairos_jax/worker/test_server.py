"""When a worker says that it is ready: once a router has linked, or none has for a while."""

import asyncio
import logging

import cluster
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kairos_jax.kv.transport import LocalTransport
from kairos_jax.worker.server import RoleOptions
from schedulers.ledger.instance import Role

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def start(link_s):
    options = RoleOptions(cluster.HOST, 0, cluster.HOST, link_s=link_s)
    return await cluster.Node.start(Role.PREFILL, LocalTransport(), options=options)


async def watched(node, last=None):
    """What its health says until it says `last`; None: at first."""
    said = []
    async with cluster.PLAIN.channel(node.server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        while not said or last not in (None, said[-1]):
            said.append((await watch.read()).status)
    return said


def run(main):
    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_worker_is_ready_when_a_router_has_linked():
    async def main():
        node = await start(link_s=600.0)
        assert await watched(node) == [NOT_SERVING]
        said = asyncio.ensure_future(watched(node, SERVING))
        front = cluster.Front.start([node])
        await front.linked(1)
        assert await said in ([NOT_SERVING, SERVING], [SERVING])
        await front.links.close()
        await node.die()

    run(main)


@pytest.mark.parametrize("drains", [False, True])
def test_without_a_router_it_is_ready_after_a_while_and_says_so(drains, caplog):
    async def main():
        node = await start(link_s=0.5)
        if drains:
            await node.server.drain(node.worker)
        else:
            await watched(node, SERVING)
        await node.server._readying
        assert await watched(node) == [NOT_SERVING if drains else SERVING]
        await node.die()

    with caplog.at_level(logging.WARNING):
        run(main)
    assert "no router has linked within 0.5 s: ready without" in caplog.text
