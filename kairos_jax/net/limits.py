"""What strangers may take of a gRPC server before they have asked anything: connections, time."""

from kairos_jax.process import descriptors

# To begin to speak HTTP/2, over TLS where there is TLS, and to agree on how.
HANDSHAKE_S = 10.0
# Of probes, each of which opens its own. One that says nothing for so long is closed.
_PROBES, _PROBE_IDLE_S = 32, 60.0
_PROBE_BYTES = 64 << 10

Options = list[tuple[str, int]]


def of_server(connections: int | None = None) -> Options:
    """Of any gRPC server. connections: at most so many; None: the share that clients have."""
    most = descriptors.for_clients() if connections is None else connections
    return [
        ("grpc.so_reuseport", 0),  # a port in use is an error, not a shared port
        ("grpc.max_allowed_incoming_connections", most),
        ("grpc.server_handshake_timeout_ms", int(1000 * HANDSHAKE_S)),
        ("grpc.http2.settings_timeout", int(1000 * HANDSHAKE_S)),
    ]


def of_silence(period_ms: int, timeout_ms: int) -> Options:
    """Callers are asked for a sign of life once in a period, and have the timeout for it."""
    return [
        ("grpc.keepalive_time_ms", period_ms),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        # What ends the connection in gRPC 1.85, after a minute by default.
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def of_probes() -> Options:
    """Of a server for health alone."""
    return [
        *of_server(_PROBES),
        ("grpc.max_connection_idle_ms", int(1000 * _PROBE_IDLE_S)),
        ("grpc.max_receive_message_length", _PROBE_BYTES),
    ]
