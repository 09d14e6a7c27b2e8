"""How processes reach one another: TLS, and the token that every internal call must bear.

One `Credentials` holds both, for what a process listens on and for what it calls. Without flags it
is plain, which is right on loopback alone.

The token never goes in the clear to another host: `channel` and `add_port` refuse that. Anyone who
reads it on the network can use it, and a warning would come too late.
"""

import functools
import hmac
import logging
import ssl
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
from absl import flags
from grpc_health.v1 import health

from kairos_jax.net.address import is_loopback, join_address, listen, split_address
from kairos_jax.process.command import UsageError
from kairos_jax.process.files import check_regular

# Probes come without a token, and learn nothing from health but that a server is there.
_OPEN = f"/{health.SERVICE_NAME}/"
# Peers are called by name; a proxy of the environment is for calls to elsewhere.
# Where a peer cannot be reached, gRPC's own pause before the next try would grow to minutes.
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

_log = logging.getLogger(__name__)


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    define_caller_flags(flags.FLAGS)
    flags.DEFINE_boolean("mutual_tls", False, "Refuse callers without a certificate of --tls_ca.")
    flags.DEFINE_string(
        "token_file", None, "File with the secret that every internal call carries."
    )


def define_caller_flags(values: flags.FlagValues) -> None:
    """Of a process that calls others."""
    string = functools.partial(flags.DEFINE_string, flag_values=values)
    string("tls_cert", None, "PEM file: the certificate that peers see.")
    string("tls_key", None, "PEM file: the private key of --tls_cert.")
    string("tls_ca", None, "PEM file: the authorities of the peers' certificates; default: no TLS.")
    string("tls_name", None, "Name in the peers' certificates; else their host.")


def define_public_flags() -> None:
    """Of what clients call. They have other certificates than peers, and no token."""
    flags.DEFINE_string("public_tls_cert", None, "PEM file: the certificate that clients see.")
    flags.DEFINE_string("public_tls_key", None, "PEM file: the private key of --public_tls_cert.")


@dataclass(frozen=True, slots=True)
class Credentials:
    """What protects the calls between processes.

    cert, key: PEM, what this process shows to servers and callers. ca: PEM, the authorities that
    must have signed what a peer shows. name: what a peer's certificate must be made out to; "": the
    host in its address. mutual: callers must show a certificate too. token: "" asks for none.
    """

    cert: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    ca: bytes | None = None
    name: str = ""
    mutual: bool = False
    token: str = field(default="", repr=False)

    @classmethod
    def from_flags(cls) -> "Credentials":
        """Raises UsageError."""
        values = flags.FLAGS
        if values.mutual_tls and not values.tls_ca:
            raise UsageError("--tls_ca is missing, which --mutual_tls needs")
        caller = cls.caller_from_flags(values)
        return replace(caller, mutual=values.mutual_tls, token=read_token(values, "token_file"))

    @classmethod
    def caller_from_flags(cls, values: flags.FlagValues) -> "Credentials":
        """Of `define_caller_flags`. Raises UsageError."""
        if values.tls_cert and not values.tls_ca:
            raise UsageError("--tls_ca is missing: with --tls_cert, peers are called over TLS too")
        if values.tls_name and not values.tls_ca:
            raise UsageError("--tls_ca is missing, which --tls_name needs")
        cert, key = _certificate(values, "tls_cert", "tls_key")
        return cls(cert, key, _authority(values, "tls_ca"), values.tls_name or "")

    @classmethod
    def public_from_flags(cls) -> "Credentials":
        """Of `define_public_flags`. Raises UsageError."""
        return cls(*_certificate(flags.FLAGS, "public_tls_cert", "public_tls_key"))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every internal call must be made with."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def channel(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.aio.Channel:
        """A channel to "host:port"; it connects when it is first used.

        Raises:
            UsageError: the token would go there in the clear.
        """
        self.check_target(address)
        named = [("grpc.ssl_target_name_override", self.name)] if self.name else []
        options = [*_OPTIONS, *named, *options]
        if self.ca is None:
            return grpc.aio.insecure_channel(address, options)
        credentials = grpc.ssl_channel_credentials(self.ca, self.key, self.cert)
        return grpc.aio.secure_channel(address, credentials, options)

    def check_target(self, address: str) -> None:
        """Raises UsageError if the token would go to "host:port" in the clear."""
        if self.ca is None and self.token and not is_loopback(split_address(address)[0]):
            raise UsageError(f"--token_file needs --tls_ca to call {address}: {_IN_CLEAR}")

    def add_port(self, server: grpc.aio.Server, host: str, port: int) -> int:
        """Has a server listen on one more address. Returns the port: port 0 is any free one.

        Raises:
            OSError: the address cannot be listened on.
            UsageError: callers would send the token in the clear, or come over TLS and meet none.
        """
        address = join_address(host, port)
        credentials = self._server_credentials()
        if credentials is None and self.ca is not None:
            raise UsageError("--tls_cert is missing: with --tls_ca, peers call over TLS")
        if credentials is None and self.token and not is_loopback(host):
            raise UsageError(f"--token_file needs --tls_cert to listen on {address}: {_IN_CLEAR}")
        listen(host, port).close()  # says why not, which gRPC tells its log alone
        try:
            if credentials is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from error

    def interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        """For grpc.aio.server: refuses calls without the token, save health."""
        return [_TokenCheck(self.token)] if self.token else []

    def _server_credentials(self) -> grpc.ServerCredentials | None:
        if self.key is None or self.cert is None:
            return None
        return grpc.ssl_server_credentials(
            [(self.key, self.cert)],
            root_certificates=self.ca if self.mutual else None,
            require_client_auth=self.mutual,
        )


_IN_CLEAR = "anyone on the way could read the token and use it"

PLAIN = Credentials()


class _TokenCheck(grpc.aio.ServerInterceptor):
    def __init__(self, token: str):
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(self, continuation, handler_call_details):
        if _allowed(handler_call_details, self._expected):
            return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_refuse)


def _allowed(call: grpc.HandlerCallDetails, expected: bytes) -> bool:
    if call.method.startswith(_OPEN):
        return True
    given = [value for key, value in call.invocation_metadata if key == "authorization"]
    # In a time that does not tell how much of it was right.
    return len(given) == 1 and hmac.compare_digest(_bytes(given[0]), expected)


# Of the stream kind, which refuses any kind of call before it has read a message.
async def _refuse(requests, context) -> None:
    text = "the call must bear the token of --token_file"
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, text)


def _certificate(
    values: flags.FlagValues, cert_flag: str, key_flag: str
) -> tuple[bytes | None, bytes | None]:
    cert, key = values[cert_flag].value, values[key_flag].value
    for given, flag, missing in ((key, key_flag, cert_flag), (cert, cert_flag, key_flag)):
        if given and not (cert and key):
            raise UsageError(f"--{missing} is missing: it goes with --{flag}")
    if not (cert and key):
        return None, None
    pem = _read(cert_flag, cert), _read(key_flag, key, secret=True)
    try:
        # gRPC only says that the handshake failed, and to the caller. The empty passphrase keeps
        # OpenSSL from asking for one.
        ssl.create_default_context().load_cert_chain(cert, key, password=lambda: b"")
    except ssl.SSLError as error:
        reason = error.reason or "not PEM"
        raise UsageError(f"--{cert_flag} {cert} with --{key_flag} {key}: {reason}") from error
    return pem


def _authority(values: flags.FlagValues, flag: str) -> bytes | None:
    path = values[flag].value
    if not path:
        return None
    pem = _read(flag, path)
    try:
        ssl.create_default_context().load_verify_locations(path)
    except ssl.SSLError as error:
        raise UsageError(f"--{flag} {path}: {error.reason or 'not PEM'}") from error
    return pem


def read_token(values: flags.FlagValues, flag: str) -> str:
    """The one word in the file that a flag names; "" if it names none. Raises UsageError."""
    path = values[flag].value
    if not path:
        return ""
    token = _read(flag, path, secret=True).strip()
    if not token:
        raise UsageError(f"--{flag} {path} is empty")
    if not all(0x21 <= byte <= 0x7E for byte in token):
        raise UsageError(f"--{flag} {path} must hold one word of printable ASCII")
    return token.decode()


def _read(flag: str, path: str, secret: bool = False) -> bytes:
    try:
        check_regular(path)
        content = Path(path).read_bytes()
        if secret and Path(path).stat().st_mode & stat.S_IRWXO:
            _log.warning("--%s %s can be read by every user of this host", flag, path)
    except OSError as error:
        raise UsageError(f"--{flag} {path}: {error.strerror}") from error
    return content


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
