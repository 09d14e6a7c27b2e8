"""What KV is, told and compared before any of it is taken: on the wire there are but bytes."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from kairos_jax.engine.functions import BLOCK_PAGES
from kairos_jax.kv.transport import Ticket
from kairos_jax.rpc import kv_pb2 as pb
from models.config import ModelConfig

Box = tuple[tuple[int, int], ...]
"""A part of an array: where it starts and stops in each dimension."""

# Numbers of each weight that go into the fingerprint: no mesh cuts a row shorter.
_SAMPLE = 4


class ManifestMismatch(ValueError):
    """KV that is offered does not fit the instance that would take it."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the KV of one instance is. Two instances can hand KV over if all of these are equal.

    block_shape: of a whole block, all shards together; block_tokens: how many tokens are in it.
    """

    model: str
    fingerprint: str
    dtype: str
    page_size: int
    block_shape: tuple[int, ...]
    block_tokens: int

    @property
    def block_bytes(self) -> int:
        return math.prod(self.block_shape) * jnp.dtype(self.dtype).itemsize

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_tokens)


def facts(
    model: str, config: ModelConfig, params: Mapping[str, Any], dtype: DTypeLike, page_size: int
) -> Facts:
    """Those of a `JaxEngine`. model: its name, the same wherever it is served."""
    tokens = page_size * BLOCK_PAGES
    return Facts(
        model=model,
        fingerprint=fingerprint(config, params),
        dtype=jnp.dtype(dtype).name,
        page_size=page_size,
        block_shape=(config.num_layers, tokens, config.num_kv_heads, 2, config.head_dim),
        block_tokens=tokens,
    )


def fingerprint(config: ModelConfig, params: Mapping[str, Any]) -> str:
    """A hash of the description, and of each weight's name, shape, dtype and first few numbers.

    The same however the weights are sharded. Those numbers lie on the first device of any mesh, so
    where it spans processes the first one finds them without the others.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    corners = {path: _corner(path, weight) for path, weight in params.items()}
    samples = jax.device_get(jax.jit(_first_numbers)(corners))
    for path in sorted(params):
        digest.update(f"{path} {params[path].shape} {params[path].dtype}".encode())
        digest.update(np.ascontiguousarray(samples[path]).tobytes())
    return digest.hexdigest()[:32]


def _corner(path: str, weight: jax.Array) -> jax.Array:
    for shard in weight.addressable_shards:
        if not any(part.start for part in shard.index):
            return shard.data
    raise ValueError(f"weight {path!r}: its first numbers are on a device of another process")


def _first_numbers(corners: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: part[(0,) * (part.ndim - 1)][:_SAMPLE] for path, part in corners.items()}


# How a block lies on its devices.


def shards_of(block: Any) -> list[tuple[Box, Any]]:
    """The parts of a block, each once, by their place in it: where they are, and the data."""
    if not isinstance(block, jax.Array):
        return [(tuple((0, size) for size in block.shape), block)]
    parts = {box_of(each.index, block.shape): each.data for each in block.addressable_shards}
    return sorted(parts.items(), key=lambda part: part[0])


def box_of(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """Where an index of whole slices lies in an array of that shape."""
    bounds = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return tuple((start, stop) for start, stop, _ in bounds)


def shape_of(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def grid_of(boxes: Sequence[Box], shape: Sequence[int]) -> tuple[int, ...]:
    """Into how many equal parts each dimension of `shape` is cut.

    Raises:
        ManifestMismatch: the boxes are not all parts of such a grid, in row-major order.
    """
    if all(len(box) == len(shape) for box in boxes):
        counts = tuple(len({box[dim] for box in boxes}) for dim in range(len(shape)))
        if 0 < math.prod(counts) == len(boxes) and list(boxes) == _grid(counts, shape):
            return counts
    raise ManifestMismatch(f"shards: {list(boxes)} do not make up a block of shape {tuple(shape)}")


def _grid(counts: Sequence[int], shape: Sequence[int]) -> list[Box]:
    sizes = [size / count for size, count in zip(shape, counts, strict=True)]
    return [
        tuple((at * size, (at + 1) * size) for at, size in zip(place, sizes, strict=True))
        for place in np.ndindex(*counts)
    ]


# The manifest.


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one offer holds.

    shards: of each block, in the order in which they are sent. transfer_address: where to pull
    from, "" if the KV comes as bytes. incarnation: of the process that offers.
    """

    model: str
    fingerprint: str
    dtype: str
    page_size: int
    block_shape: tuple[int, ...]
    num_tokens: int
    num_blocks: int
    shards: tuple[Box, ...]
    transfer_address: str
    incarnation: int

    def check(self, ours: Facts, ticket: Ticket) -> None:
        """Raises ManifestMismatch, naming the first field that differs and both its values."""
        wanted = {
            "model": ours.model,
            "fingerprint": ours.fingerprint,
            "dtype": ours.dtype,
            "page_size": ours.page_size,
            "block_shape": ours.block_shape,
            "num_tokens": ticket.num_tokens,
            "num_blocks": ours.num_blocks(ticket.num_tokens),
        }
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise ManifestMismatch(
                    f"{name}: the KV of request {ticket.request_id!r} has "
                    f"{getattr(self, name)!r}, this instance {value!r}"
                )
        grid_of(self.shards, self.block_shape)


def describe(
    ours: Facts, ticket: Ticket, block: Any, transfer_address: str, incarnation: int
) -> Manifest:
    """The manifest of an offer of which `block` is the first."""
    return Manifest(
        model=ours.model,
        fingerprint=ours.fingerprint,
        dtype=np.dtype(block.dtype).name,
        page_size=ours.page_size,
        block_shape=tuple(block.shape),
        num_tokens=ticket.num_tokens,
        num_blocks=ours.num_blocks(ticket.num_tokens),
        shards=tuple(box for box, _ in shards_of(block)),
        transfer_address=transfer_address,
        incarnation=incarnation,
    )


def to_proto(manifest: Manifest) -> pb.Manifest:
    """The message that says it."""
    values = {each.name: getattr(manifest, each.name) for each in dataclasses.fields(manifest)}
    values["shards"] = [
        pb.Shard(start=[start for start, _ in box], stop=[stop for _, stop in box])
        for box in manifest.shards
    ]
    return pb.Manifest(**values)


def from_proto(message: pb.Manifest) -> Manifest:
    """What the message says."""
    values = {each.name: getattr(message, each.name) for each in dataclasses.fields(Manifest)}
    values["block_shape"] = tuple(message.block_shape)
    values["shards"] = tuple(tuple(zip(box.start, box.stop, strict=True)) for box in message.shards)
    return Manifest(**values)
