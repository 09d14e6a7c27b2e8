"""The gRPC service kairos.internal.v1.KV: gives offered KV to its claimants."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import jax

from kairos_jax.kv import grpc_stream, manifest
from kairos_jax.kv.jax_transfer import TransferPort
from kairos_jax.kv.leases import Claimant, Lease, Leases, State
from kairos_jax.kv.manifest import Facts
from kairos_jax.rpc import kv_pb2 as pb
from kairos_jax.rpc import kv_pb2_grpc

SERVICE = "kairos.internal.v1.KV"

# Blocks go in parts of about so many bytes: a part costs a round trip or two, and each block some
# hundred microseconds.
PART_BYTES = 32 << 20
_MAX_BLOCKS = 128


class KVServicer(kv_pb2_grpc.KVServicer):
    """See kv.proto. port: None where KV goes as bytes only. incarnation: of this process."""

    def __init__(
        self,
        leases: Leases,
        facts: Facts,
        incarnation: int,
        port: TransferPort | None,
        in_thread: Callable[..., Awaitable[Any]],
        clock: Callable[[], float],
    ):
        self._leases, self._facts, self._incarnation = leases, facts, incarnation
        self._port, self._in_thread, self._clock = port, in_thread, clock

    async def Claim(self, request: pb.ClaimRequest, context) -> AsyncIterator[pb.ClaimResponse]:
        """See kv.proto."""
        claimant, first = Claimant(request.claimant.identity, request.claimant.nonce), request.first
        try:
            lease = self._leases.claim(request.uuid, request.request_id, claimant, self._clock())
        except LookupError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
            return
        except PermissionError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            return
        count = self._facts.num_blocks(lease.ticket.num_tokens)
        if not 0 <= first < count:
            what = f"first must be from 0 to {count - 1}, as there are {count} blocks, got {first}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, what)
            return
        port = None if request.as_bytes else self._port
        still_ours = _watch(lease)
        with self._leases.in_call(lease, self._clock):
            async for response in self._tell(lease, port, first, still_ours):
                yield response
            while port and still_ours():
                await _change(lease)

    async def Delivered(self, request: pb.DeliveredRequest, context) -> pb.DeliveredResponse:
        """See kv.proto."""
        claimant = Claimant(request.claimant.identity, request.claimant.nonce)
        self._leases.delivered(request.uuid, claimant)
        return pb.DeliveredResponse()

    async def _tell(
        self, lease: Lease, port: TransferPort | None, first: int, still_ours: Callable[[], bool]
    ) -> AsyncIterator[pb.ClaimResponse]:
        """The manifest, and the parts as they come from block `first` on, until there are no
        more.
        """
        told = None
        async for blocks in _parts(lease, first, self._facts.block_bytes, still_ours):
            if port:
                blocks = [_on_device(block) for block in blocks]
            if told is None:
                address = port.address if port else ""
                told = manifest.describe(
                    self._facts, lease.ticket, blocks[0], address, self._incarnation
                )
                yield pb.ClaimResponse(manifest=manifest.to_proto(told))
            if port:
                uuid, registered = port.register(blocks)
                lease.registered += registered
                yield pb.ClaimResponse(part=pb.Part(num_blocks=len(blocks), uuid=uuid))
                continue
            yield pb.ClaimResponse(part=pb.Part(num_blocks=len(blocks)))
            async for chunk in grpc_stream.chunks(blocks, self._in_thread):
                yield pb.ClaimResponse(chunk=chunk)


async def _parts(
    lease: Lease, first: int, block_bytes: int, still_ours: Callable[[], bool]
) -> AsyncIterator[Sequence[Any]]:
    """The blocks of an offer from `first` on, some at a time, as they come."""
    count = min(max(PART_BYTES // max(block_bytes, 1), 1), _MAX_BLOCKS)
    while still_ours():
        if first < len(lease.kv):
            blocks = lease.kv[first : first + count]
            first += len(blocks)
            yield blocks
        elif lease.complete:
            return
        else:
            await _change(lease)


def _watch(lease: Lease) -> Callable[[], bool]:
    """Tells whether the claim just made is still the last, and the offer still there."""
    claim = lease.num_claims
    return lambda: lease.state is State.CLAIMED and lease.num_claims == claim


async def _change(lease: Lease) -> None:
    lease.changed.clear()
    await lease.changed.wait()


def _on_device(block: Any) -> jax.Array:
    return block if isinstance(block, jax.Array) else jax.device_put(block)
