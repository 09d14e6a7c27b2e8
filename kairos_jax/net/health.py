"""What a server says of itself to grpc.health.v1."""

import grpc
from absl import flags
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kairos_jax.net import limits
from kairos_jax.net.credentials import PLAIN
from kairos_jax.net.well_formed import WellFormed
from kairos_jax.process.command import UsageError

# The service that health tells of for as long as the event loop turns: a server that starts, or
# drains, is not to be restarted.
ALIVE = "alive"


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    flags.DEFINE_integer("health_port", 0, "Port for health alone, without TLS; 0: none.", 0, 65535)


class Health:
    """Whether a server serves: as a whole, and its one service.

    Also told, with ALIVE, at `host:port`, by a server for health alone and without TLS: the probes
    of Kubernetes have no certificate to show. Port 0: by none.
    """

    def __init__(self, server: grpc.aio.Server, service: str, host: str, port: int):
        """Raises UsageError if the port for health alone cannot be listened on."""
        self._servicer = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        self._services, self._own = ("", service), None
        if port:
            self._own = grpc.aio.server(options=limits.of_probes(), interceptors=[WellFormed()])
            health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._own)
            try:
                PLAIN.add_port(self._own, host, port)
            except OSError as error:
                raise UsageError(f"--health_port={port}: {error}") from error

    async def listen(self) -> None:
        """Opens the port for health alone."""
        if self._own:
            await self._servicer.set(ALIVE, health_pb2.HealthCheckResponse.SERVING)
            await self._own.start()

    async def say(self, serving: bool) -> None:
        """SERVING or NOT_SERVING."""
        status = health_pb2.HealthCheckResponse
        for service in self._services:
            await self._servicer.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def close(self) -> None:
        """Closes the port for health alone."""
        if self._own:
            await self._own.stop(grace=None)
