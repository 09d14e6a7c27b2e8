"""KV between processes by `jax.experimental.transfer`, device to device.

On that wire are bytes alone, buffer i to buffer i: no shape, no dtype, no sharding, and no deadline
that works. So each shard of a block is a buffer of its own, pulled to one device and joined there,
and a reader polls `is_ready` against a deadline of its own.
"""

import asyncio
import functools
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import transfer
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from kairos_jax.kv.manifest import Box, Manifest, box_of, grid_of, shape_of, shards_of
from kairos_jax.net.address import join_address, split_address

# For the probe of a peer's port. The transfer server itself reports no failed connection.
_PROBE_S = 5.0
# For each connection's data: on loopback 4 carried 1.76 GiB/s, 2 carried 1.39, and 1 carried 1.28.
_SOCKETS = 4
# In what time a pull that was cancelled must end for its connection to be kept, and how often it is
# looked at.
_WATCH_S, _LOOK_S = 10.0, 0.02


class Unreachable(ConnectionError):
    """Nobody listens at the address of a peer's transfer server, or nothing gets there."""


@dataclass(frozen=True, slots=True)
class _Connection:
    """A connection is first in, first out, so the urgent have one of their own.

    address: of its KV service, at which it is another incarnation when it has started again.
    """

    address: str
    incarnation: int
    urgent: bool


class TransferPort:
    """A transfer server, and the connections to those of the peers. Used on one event loop.

    in_thread: runs what may block on a thread.
    """

    def __init__(
        self,
        host: str,
        transfer_size: int,
        max_num_parallel_copies: int,
        in_thread: Callable[..., Awaitable[Any]],
    ):
        """Listens on free ports of `host`, and nowhere else. Raises OSError."""
        address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][4]
        where = join_address(str(address[0]), 0)
        self._in_thread = in_thread
        self._connections: dict[_Connection, Any] = {}
        self._watching: set[asyncio.Task[None]] = set()
        try:
            self._server = transfer.start_transfer_server(
                jax.local_devices()[0].client,
                where,
                [where] * _SOCKETS,
                max_num_parallel_copies=max_num_parallel_copies,
                transfer_size=transfer_size,
                # With them, what is never pulled is kept even after `delete()`.
                use_raw_buffers=False,
            )
        except RuntimeError as error:
            raise OSError(f"the transfer server cannot listen on {where}: {error}") from error
        self.address: str = self._server.address()

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    def register(self, blocks: Sequence[jax.Array]) -> tuple[int, list[jax.Array]]:
        """Lets a peer that knows the uuid pull the shards of these blocks, once.

        They may be still computing. The server keeps what is not pulled until `delete()` of the
        arrays that are returned; they must not be donated.
        """
        uuid = secrets.randbits(64)
        shards = [data for block in blocks for _, data in shards_of(block)]
        self._server.await_pull(uuid, shards)
        return uuid, shards

    def drop(self, address: str, but: int | None = None) -> None:
        """Closes the connections to a peer, except to one incarnation of it, when their pulls have
        ended. Until then a dead peer's four sockets stay open: nothing else ever closes them.

        address: of its KV service.
        """
        for peer in list(self._connections):
            if peer.address == address and peer.incarnation != but:
                del self._connections[peer]

    async def pull(
        self,
        address: str,
        manifest: Manifest,
        uuid: int,
        num_blocks: int,
        sharding: Sharding | None,
        urgent: bool,
        arrived: Callable[[Sequence[Any]], Awaitable[None]],
    ) -> list[jax.Array]:
        """The blocks registered under `uuid`, placed as `sharding` says; None: on one device.

        address: of the KV service that told the manifest.
        arrived: waits until arrays are ready, and raises what went wrong; never blocks.

        Raises:
            Unreachable: the transfer server cannot be reached.
            Exception: what `arrived` raised.
        """
        plan = _plan(manifest.shards, manifest.block_shape, sharding)
        peer = _Connection(address, manifest.incarnation, urgent)
        connection = await self._connect(peer, manifest.transfer_address)
        dtype = jnp.dtype(manifest.dtype)
        specs = [
            jax.ShapeDtypeStruct(shape_of(box), dtype, sharding=SingleDeviceSharding(device))
            for _ in range(num_blocks)
            for box, device in zip(manifest.shards, plan.devices, strict=True)
        ]
        shards: Sequence[Any] = ()
        blocks: list[jax.Array] = []
        try:
            shards = connection.pull(uuid, specs)
            blocks = await self._in_thread(_join, plan, shards)
            await arrived(blocks)
        except asyncio.CancelledError:
            # Others may be using the connection, and it may hang: that shows in what was pulled.
            self._watch(peer, connection, blocks or shards)
            raise
        except BaseException:
            # It may be dead for good, or hang with all that comes after it.
            self._give_up(peer, connection)
            raise
        return blocks

    def _give_up(self, peer: _Connection, connection: Any) -> None:
        if self._connections.get(peer) is connection:
            del self._connections[peer]

    def _watch(self, peer: _Connection, connection: Any, pulled: Sequence[Any]) -> None:
        """Gives a connection up unless what was pulled by it comes in time."""

        async def watch() -> None:
            try:
                async with asyncio.timeout(_WATCH_S):
                    while not all(array.is_ready() for array in pulled):
                        await asyncio.sleep(_LOOK_S)
                await self._in_thread(jax.block_until_ready, list(pulled))
            except Exception:  # it came too late, or the pull failed
                self._give_up(peer, connection)

        task = asyncio.ensure_future(watch())
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    async def _connect(self, peer: _Connection, where: str) -> Any:
        connection = self._connections.get(peer)
        if connection is not None:
            return connection
        await _probe(where)
        self.drop(peer.address, but=peer.incarnation)
        connection = await self._in_thread(self._server.connect, where)
        return self._connections.setdefault(peer, connection)


async def _probe(address: str) -> None:
    host, port = split_address(address)
    try:
        async with asyncio.timeout(_PROBE_S):
            _, writer = await asyncio.open_connection(host, port)
    except OSError as error:  # TimeoutError is one
        raise Unreachable(f"no transfer server can be reached at {address}: {error}") from error
    writer.close()


# From shards on devices of the peer's choice of sharding to blocks in our own.


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where each shard of a block is pulled to, and what makes a block of them.

    joined: the sharding in which they are a block as they lie; None: they are all on one device,
    and must be concatenated.
    """

    grid: tuple[int, ...]
    shape: tuple[int, ...]
    devices: tuple[Any, ...]
    joined: Sharding | None
    wanted: Sharding


@functools.lru_cache(maxsize=64)
def _plan(boxes: tuple[Box, ...], shape: tuple[int, ...], sharding: Sharding | None) -> _Plan:
    wanted = sharding or SingleDeviceSharding(jax.local_devices()[0])
    grid = grid_of(boxes, shape)
    placed = _devices(wanted, shape)
    if tuple(sorted(placed)) == boxes and len(placed) == len(wanted.device_set):
        devices = tuple(placed[box] for box in boxes)
        return _Plan(grid, shape, devices, wanted, wanted)
    ours = list(dict.fromkeys(placed.values()))
    ours += sorted(wanted.addressable_devices - set(ours), key=lambda device: device.id)
    if len(boxes) > len(ours):
        return _Plan(grid, shape, (ours[0],) * len(boxes), None, wanted)
    devices = tuple(ours[: len(boxes)])
    names = tuple(f"axis{index}" for index in range(len(grid)))
    mesh = Mesh(np.array(devices).reshape(grid), names, axis_types=(AxisType.Auto,) * len(grid))
    parts = [name if count > 1 else None for name, count in zip(names, grid, strict=True)]
    return _Plan(grid, shape, devices, NamedSharding(mesh, PartitionSpec(*parts)), wanted)


def _devices(sharding: Sharding, shape: tuple[int, ...]) -> dict[Box, Any]:
    """A device for each part of an array of that sharding, by the part's place."""
    placed = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        placed.setdefault(box_of(index or (slice(None),) * len(shape), shape), device)
    return dict(sorted(placed.items()))


def _join(plan: _Plan, shards: Sequence[jax.Array]) -> list[jax.Array]:
    """One array for each block. Returns before the shards have come."""
    count = len(plan.devices)
    blocks = []
    for first in range(0, len(shards), count):
        of_block = list(shards[first : first + count])
        if plan.joined is not None:
            blocks.append(
                jax.make_array_from_single_device_arrays(plan.shape, plan.joined, of_block)
            )
        else:
            blocks.append(_concatenate(plan.grid, of_block))
    if plan.joined == plan.wanted:
        return blocks
    return jax.device_put(blocks, plan.wanted)


@functools.partial(jax.jit, static_argnums=0)
def _concatenate(grid: tuple[int, ...], shards: list[jax.Array]) -> jax.Array:
    """Shards in row-major order of the grid, whole."""
    for axis in reversed(range(len(grid))):
        count = grid[axis]
        shards = [
            jnp.concatenate(shards[first : first + count], axis)
            for first in range(0, len(shards), count)
        ]
    return shards[0]
