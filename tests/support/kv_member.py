"""A process that offers KV, as lines on its stdin ask for: python kv_member.py jax|grpc.

Each line is JSON: {"id", "num_blocks", "num_devices", "axis", "seed", "shape", "dtype"}; the answer
is the ticket. An empty line is answered by how many offers it holds. It ends with its stdin.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import grpc
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from kairos_jax.kv.manifest import Facts
from kairos_jax.kv.options import TransferOptions
from kairos_jax.kv.remote import RemoteTransport

HOST = "127.0.0.1"


def facts_of(shape: list[int], dtype: str = "float32") -> Facts:
    """A block is one page, of shape[1] tokens."""
    return Facts("tiny", "f00d", dtype, shape[1], tuple(shape), shape[1])


def sharding(num_devices: int, axis: str, first: int = 0) -> Sharding:
    """On so many devices, split along the kv heads ("columns") or the tokens ("rows")."""
    devices = jax.devices()[first : first + num_devices]
    mesh = Mesh(np.array(devices), ("tensor",), axis_types=(AxisType.Auto,))
    spec = {"columns": (None, None, "tensor"), "rows": (None, "tensor")}[axis]
    return NamedSharding(mesh, PartitionSpec(*spec))


def some_kv(
    shape: list[int], dtype: str, num_blocks: int, seed: int, where: Sharding
) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    blocks = [rng.integers(0, 100, shape).astype(jnp.dtype(dtype)) for _ in range(num_blocks)]
    return jax.device_put(blocks, where)


def open_sockets() -> frozenset[str]:
    """Those that this process has open, each by its inode."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # of the listing itself
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return frozenset(each for each in found if each.startswith("socket:"))


async def transport_for(
    facts: Facts, kind: str, **options
) -> tuple[RemoteTransport, grpc.aio.Server]:
    """A transport and its server, started."""
    server = grpc.aio.server()
    port = server.add_insecure_port(f"{HOST}:0")
    transport = RemoteTransport(
        facts,
        f"{HOST}:{port}",
        asyncio.get_running_loop(),
        grpc.aio.insecure_channel,
        options=TransferOptions(kind, **options),
    )
    transport.add_to(server)
    await server.start()
    return transport, server


async def main(kind: str) -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    transports = {}
    while line := await asyncio.to_thread(sys.stdin.readline):
        if not line.strip():
            print(sum(each.num_offers for each, _ in transports.values()), flush=True)
            continue
        ask = json.loads(line)
        facts = facts_of(ask["shape"], ask["dtype"])
        if facts not in transports:
            transports[facts] = await transport_for(facts, kind)
        where = sharding(ask["num_devices"], ask["axis"])
        kv = some_kv(ask["shape"], ask["dtype"], ask["num_blocks"], ask["seed"], where)
        num_tokens = ask["num_blocks"] * facts.block_tokens
        transport, _ = transports[facts]
        ticket = transport.open(ask["id"], num_tokens)
        transport.extend(ticket, kv, last=True)
        print(json.dumps(dataclasses.asdict(ticket)), flush=True)
    os._exit(0)  # a transfer server's threads are not waited for


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
