"""KV between processes as bytes in a gRPC stream: for where no transfer server can be reached."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from kairos_jax.kv.manifest import Manifest, shape_of, shards_of

CHUNK_BYTES = 1 << 20


async def chunks(
    blocks: Sequence[Any], in_thread: Callable[..., Awaitable[Any]]
) -> AsyncIterator[bytes]:
    """The bytes of all shards of all blocks, in order, each shard row-major.

    While one block is sent, the next one is copied from its devices.
    """
    for block in blocks[:2]:
        _begin_copy(block)
    for index, block in enumerate(blocks):
        if index + 2 < len(blocks):
            _begin_copy(blocks[index + 2])
        for shard in await in_thread(_host_bytes, block):
            for chunk in _cut(shard):
                yield chunk


def _begin_copy(block: Any) -> None:
    if isinstance(block, jax.Array):
        for _, shard in shards_of(block):
            shard.copy_to_host_async()


def _host_bytes(block: Any) -> list[memoryview]:
    """Waits for the block's computation and copy."""
    arrays = [np.ascontiguousarray(data) for _, data in shards_of(block)]
    return [array.reshape(-1).view(np.uint8).data for array in arrays]


def _cut(shard: memoryview) -> Iterator[bytes]:
    for first in range(0, len(shard), CHUNK_BYTES):
        yield bytes(shard[first : first + CHUNK_BYTES])


class Reassembly:
    """The bytes of some blocks, as they come in."""

    def __init__(self, manifest: Manifest, num_blocks: int):
        self._manifest, self._num_blocks = manifest, num_blocks
        self._dtype = jnp.dtype(manifest.dtype)
        elements = num_blocks * int(np.prod(manifest.block_shape))
        self._buffer = np.empty(elements * self._dtype.itemsize, np.uint8)
        self._filled = 0

    @property
    def complete(self) -> bool:
        return self._filled == len(self._buffer)

    def add(self, chunk: bytes) -> None:
        """Raises ConnectionError if that is more than was announced."""
        end = self._filled + len(chunk)
        if end > len(self._buffer):
            raise ConnectionError(f"a part of {len(self._buffer)} bytes was sent {end} bytes")
        self._buffer[self._filled : end] = np.frombuffer(chunk, np.uint8)
        self._filled = end

    def place(self, sharding: Sharding | None) -> list[Any]:
        """The blocks, placed as `sharding` says; None: as numpy arrays."""
        blocks = [self._block(index) for index in range(self._num_blocks)]
        return blocks if sharding is None else jax.device_put(blocks, sharding)

    def _block(self, index: int) -> np.ndarray:
        size = len(self._buffer) // self._num_blocks
        at = index * size
        flat = self._buffer[at : at + size].view(self._dtype)
        manifest = self._manifest
        if len(manifest.shards) == 1:
            return flat.reshape(manifest.block_shape)
        block, at = np.empty(manifest.block_shape, self._dtype), 0
        for box in manifest.shards:
            shape = shape_of(box)
            count = int(np.prod(shape))
            place = tuple(slice(start, stop) for start, stop in box)
            block[place] = flat[at : at + count].reshape(shape)
            at += count
        return block
