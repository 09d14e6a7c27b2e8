"""What a server says of itself to grpc.health.v1."""

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kairos_jax.channels import open_health_port


class Health:
    """Whether a server serves: as a whole, and its one service. Also told on a port for health
    alone, `host:port`; port 0: on none.
    """

    def __init__(self, server: grpc.aio.Server, service: str, host: str, port: int):
        self._servicer = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        self._services, self._host, self._port = ("", service), host, port
        self._own: grpc.aio.Server | None = None

    async def listen(self) -> None:
        """Opens the port for health alone. Raises OSError."""
        if self._port:
            self._own = await open_health_port(self._servicer, self._host, self._port)

    async def say(self, serving: bool) -> None:
        """SERVING or NOT_SERVING."""
        status = health_pb2.HealthCheckResponse
        for service in self._services:
            await self._servicer.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def close(self) -> None:
        """Closes the port for health alone."""
        if self._own:
            await self._own.stop(grace=None)
