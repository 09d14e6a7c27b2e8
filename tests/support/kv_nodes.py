"""Transports of KV between processes, each with a server, on loopback."""

import asyncio
import contextlib

import grpc
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kairos_jax.kv.manifest import Facts
from kairos_jax.kv.options import TransferOptions
from kairos_jax.kv.remote import RemoteTransport

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


def offered(transport, id, num_tokens, kv):
    """The ticket of an offer that is whole at once."""
    ticket = transport.open(id, num_tokens)
    transport.extend(ticket, kv, last=True)
    return ticket


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
        return offered(self.transport, id, num_tokens, jax.tree.map(jnp.copy, kv))

    async def fetch(self, ticket, where=None, first=0):
        loop = asyncio.get_running_loop()
        kv = loop.create_future()
        self.transport.fetch(ticket, where, kv.set_result, first)
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
