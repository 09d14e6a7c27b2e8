"""API keys: which there are, and the check of those that gRPC clients show. For HTTP clients, the
check is in `http/guard.py`.
"""

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

import grpc
from absl import flags
from grpc_health.v1 import health

from kairos_jax.process.command import UsageError
from kairos_jax.process.files import check_regular

# For probes and tools, which learn nothing from them but what is served.
_OPEN = tuple(
    f"/{service}/"
    for service in (
        health.SERVICE_NAME,
        "grpc.reflection.v1alpha.ServerReflection",
        "grpc.reflection.v1.ServerReflection",
    )
)
MISSING = "the API key is missing or wrong: send authorization: Bearer KEY"


def digest(key: bytes) -> bytes:
    """By which keys are known: of one length, so that comparing them does not tell theirs."""
    return hashlib.sha256(key).digest()


def keys_from_flags() -> tuple[bytes, ...]:
    """The digests of the keys in --api_keys_file; none without it. Raises UsageError."""
    path = flags.FLAGS.api_keys_file
    if not path:
        return ()
    try:
        check_regular(path)
        keys = Path(path).read_bytes().split()
    except OSError as error:
        raise UsageError(f"--api_keys_file {path}: {error.strerror}") from error
    if not keys:
        raise UsageError(f"--api_keys_file {path} is empty")
    return tuple(digest(key) for key in keys)


def shows_key(authorization: str, keys: Sequence[bytes]) -> bool:
    """Whether "Bearer KEY" has one of the keys of these digests."""
    scheme, _, key = authorization.partition(" ")
    found = digest(key.strip().encode("latin-1", "replace"))
    # All are compared, in a time that does not tell how much of which was right.
    right = [hmac.compare_digest(found, each) for each in keys]
    return scheme.lower() == "bearer" and any(right)


class KeyCheck(grpc.aio.ServerInterceptor):
    """Refuses calls without a key, before a message of theirs is read. Health and reflection are
    open. keys: digests.
    """

    def __init__(self, keys: Sequence[bytes]):
        self._keys = keys

    async def intercept_service(self, continuation, handler_call_details):
        """See gRPC."""
        call = handler_call_details
        given = [value for name, value in call.invocation_metadata if name == "authorization"]
        shown = len(given) == 1 and isinstance(given[0], str) and shows_key(given[0], self._keys)
        if shown or call.method.startswith(_OPEN):
            return await continuation(call)
        return grpc.stream_stream_rpc_method_handler(_refuse)


# Of the stream kind, which refuses any kind of call.
async def _refuse(requests, context) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, MISSING)
