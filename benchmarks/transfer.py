"""How fast KV goes from one process to another on loopback, beside a plain TCP copy.

  python benchmarks/transfer.py [--mib=256] [--rounds=7] [--output=json]

Two processes with one CPU device each; blocks of 8 MiB (an 8B model's: 32 layers, 64 tokens, 8 kv
heads of 128, bfloat16). In each round the same bytes go over by TCP (sendall, recv_into), by the
`jax` transport and by the `grpc` transport, one after the other; a fetch is timed from its call to
the blocks' being on the device, claim and manifest included. Medians; one round before is not
counted.

TCP is measured twice: into new memory for each block (`tcp`), and into one buffer that numpy has
the kernel make of huge pages, which spares most page faults (`tcp_huge`). With
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment the transports have huge pages too.
"""

import asyncio
import dataclasses
import json
import mmap
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import grpc
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import SingleDeviceSharding

from kairos_jax.kv.manifest import Facts
from kairos_jax.kv.options import TransferOptions
from kairos_jax.kv.remote import RemoteTransport
from kairos_jax.kv.transport import Ticket

HOST = "127.0.0.1"
FACTS = Facts("8b", "f00d", "bfloat16", 16, (32, 64, 8, 2, 128), 64)
TCP, KINDS = ("tcp", "tcp_huge"), ("jax", "grpc")
WAYS = TCP + KINDS

_MIB = flags.DEFINE_integer("mib", 256, "Bytes of one prompt's KV, in MiB.", 8)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds that count.", 1)
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "How to print the result.")
_PRODUCE = flags.DEFINE_boolean("produce", False, "Be the other process.")


async def transport_for(kind: str) -> RemoteTransport:
    """A transport whose service is up."""
    server = grpc.aio.server()
    port = server.add_insecure_port(f"{HOST}:0")
    loop, channel, options = (
        asyncio.get_running_loop(),
        grpc.aio.insecure_channel,
        TransferOptions(kind),
    )
    transport = RemoteTransport(FACTS, f"{HOST}:{port}", loop, channel, options=options)
    transport.add_to(server)
    await server.start()
    transport.server = server  # type: ignore[attr-defined]  # which would end with its last reference
    return transport


async def produce(num_blocks: int) -> None:
    """Offers the same KV in the way that each line of stdin says; answers where it is."""
    kinds = {kind: await transport_for(kind) for kind in KINDS}
    blocks = [jnp.full(FACTS.block_shape, at, jnp.bfloat16) for at in range(num_blocks)]
    flat = np.concatenate([np.asarray(block).reshape(-1).view(np.uint8) for block in blocks])
    with socket.create_server((HOST, 0)) as listener:
        while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
            if line in TCP:
                print(json.dumps(listener.getsockname()[1]), flush=True)
                await asyncio.to_thread(_send, listener, flat)
                continue
            kv = jax.block_until_ready([jnp.copy(block) for block in blocks])
            ticket = kinds[line].open("a", num_blocks * FACTS.block_tokens)
            kinds[line].extend(ticket, kv, last=True)
            print(json.dumps(dataclasses.asdict(ticket)), flush=True)


def _send(listener: socket.socket, data: np.ndarray) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(data.data)


def receive(port: int, num_blocks: int, huge: bool) -> float:
    """Seconds that the bytes took by TCP."""
    size = FACTS.block_bytes
    begin = time.perf_counter()
    if huge:
        buffers = [memoryview(np.zeros(num_blocks * size, np.uint8).data)]
    else:
        buffers = [memoryview(mmap.mmap(-1, size)) for _ in range(num_blocks)]
    with socket.create_connection((HOST, port)) as connection:
        for buffer in buffers:
            got = 0
            while got < len(buffer):
                got += connection.recv_into(buffer[got:])
    return time.perf_counter() - begin


async def fetch(transport: RemoteTransport, ticket: Ticket) -> float:
    """Seconds that a fetch took."""
    sharding = SingleDeviceSharding(jax.devices()[0])
    kv = asyncio.get_running_loop().create_future()
    begin = time.perf_counter()
    transport.fetch(ticket, sharding, kv.set_result)
    result = await kv
    seconds = time.perf_counter() - begin
    if isinstance(result, Exception):
        raise result
    assert all(float(block[0, 0, 0, 0, 0]) == at for at, block in enumerate(result))
    return seconds


async def measure(num_blocks: int, rounds: int) -> dict[str, Any]:
    """Medians of all ways, in GiB/s, and their shares of TCP's."""
    command = [sys.executable, __file__, "--produce", f"--mib={_MIB.value}"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin
        assert other.stdout
        kinds = {kind: await transport_for(kind) for kind in KINDS}
        num_bytes = num_blocks * FACTS.block_bytes
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds + 1):
            for way in WAYS:
                print(way, file=other.stdin, flush=True)
                answer = json.loads(await asyncio.to_thread(other.stdout.readline))
                if way in TCP:
                    took = await asyncio.to_thread(receive, answer, num_blocks, way == "tcp_huge")
                else:
                    took = await fetch(kinds[way], Ticket(**answer))
                seconds[way].append(took)
        other.stdin.close()
    rates = {way: [num_bytes / 2**30 / each for each in took[1:]] for way, took in seconds.items()}
    medians = {way: statistics.median(each) for way, each in rates.items()}
    return {
        "mib": num_bytes >> 20,
        "rounds": rounds,
        "gib_per_s": {way: round(each, 2) for way, each in medians.items()},
        "lowest_highest": {way: [round(min(r), 2), round(max(r), 2)] for way, r in rates.items()},
        "share": {
            f"{way} of {tcp}": round(medians[way] / medians[tcp], 2) for way in KINDS for tcp in TCP
        },
        "load_average": round(os.getloadavg()[0], 1),
    }


def main(argv: list[str]) -> None:
    """Prints the result."""
    num_blocks = max((_MIB.value << 20) // FACTS.block_bytes, 1)
    if _PRODUCE.value:
        asyncio.run(produce(num_blocks))
        os._exit(0)
    result = asyncio.run(measure(num_blocks, _ROUNDS.value))
    if _OUTPUT.value == "json":
        print(json.dumps(result, indent=1), flush=True)
    else:
        print(f"{result['mib']} MiB, {result['rounds']} rounds, load {result['load_average']}")
        for way, rate in result["gib_per_s"].items():
            low, high = result["lowest_highest"][way]
            print(f"{way:8} {rate:6.2f} GiB/s ({low} to {high})")
        print(", ".join(f"{name}: {share}" for name, share in result["share"].items()), flush=True)
    os._exit(0)


if __name__ == "__main__":
    app.run(main)
