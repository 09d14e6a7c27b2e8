"""Addresses: "host:port" taken apart and put together, and sockets that listen on one."""

import errno
import ipaddress
import os
import re
import socket
import time
from typing import Any

# Of a name or an IPv4 address, or of an IPv6 address; what they stand for, others find out.
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")

# asyncio tries again after a second, and is to be let through then.
_RETRY_S = 0.9

_IPV6 = re.compile(r"[0-9A-Fa-f:.]+(%\w+)?")


def join_address(host: str, port: int) -> str:
    """The two with a colon between, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Host, without brackets, and port, of "host:port". Raises ValueError, which quotes it."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if ":" in host and not bracketed:
        raise ValueError(f"{address!r}: an IPv6 address goes in brackets, as in [::1]:50061")
    if not (colon and (_IPV6 if bracketed else _HOST).fullmatch(host)):
        raise ValueError(f"{address!r} is not of the form host:port")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"{address!r}: the port must be from 1 to 65535")
    return host, int(port)


def is_wildcard(host: str) -> bool:
    """Whether it stands for all addresses of a machine, at which nobody can be reached."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A TCP socket that listens on an address; port 0: on any free one of that host.

    Raises:
        OSError: it cannot; the message says where, and why.
    """
    reason = "no name of a host"
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        found, reason = [], getattr(error, "strerror", reason)
    for family, *_, address in found:  # a name may stand for addresses of which one is switched off
        try:
            return socket.create_server(address[:2], family=family, backlog=2048)
        except OSError as error:
            reason = os.strerror(error.errno or 0)  # its own text names the address again
    raise OSError(f"cannot listen on {join_address(host, port) if port else host}: {reason}")


class Listener(socket.socket):
    """A socket that listens, for asyncio: where the process has no descriptor left, asyncio tries
    again after a second, but before that 2,048 times at once (CPython 3.11). Here, once.
    """

    _until = 0.0

    def accept(self) -> tuple[socket.socket, Any]:
        """See `socket`."""
        if time.monotonic() < self._until:
            raise BlockingIOError
        try:
            return super().accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._until = time.monotonic() + _RETRY_S
            raise


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
