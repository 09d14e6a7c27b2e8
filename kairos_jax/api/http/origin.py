"""Keeps out what a page of elsewhere has a user's browser send, where no API key does.

A page may send a form or plain text to any address that the browser reaches, loopback too, and a
name of its own may be made to point there (DNS rebinding). The first comes without the content type
of JSON, and with the page's `Origin`; the second has the page's name as `Host`.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kairos_jax.api.http.body.fields import shown
from kairos_jax.api.http.errors import ApiError

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Origins:
    """hosts: names by which the server may be called, beside localhost and IP addresses; None: any.
    cors: origins whose pages may use the API, "*" for all.
    """

    hosts: frozenset[str] | None = None
    cors: Sequence[str] = ()

    @classmethod
    def of(cls, host: str, allowed: Sequence[str], cors: Sequence[str], keyed: bool) -> "Origins":
        """host: on which the server listens. allowed: further names, "*" for any. keyed: a key is
        asked for, which pages of elsewhere do not have.
        """
        if keyed or "*" in allowed:
            return cls(None, cors)
        return cls(frozenset(_name(each) for each in (host, *allowed)), cors)

    def check(self, method: str, headers: Mapping[str, str]) -> None:
        """Raises ApiError for a request that a page of elsewhere may have sent."""
        self._check_host(headers.get("host"))
        if method not in _READS:
            self._check_type(headers)

    def _check_host(self, host: str | None) -> None:
        if self.hosts is None or host is None:  # a browser always sends it
            return
        name = _name(host)
        if name in self.hosts or name == "localhost" or name.endswith(".localhost"):
            return
        try:
            ipaddress.ip_address(name)  # nobody can point an address elsewhere
        except ValueError:
            known = ", ".join(sorted({"localhost", *self.hosts} - {""}))
            raise ApiError(
                421,
                f"host must be an IP address or one of {known}, as no API key is asked for, got "
                f"{shown(name)}; --allowed_hosts adds names",
            ) from None

    def _check_type(self, headers: Mapping[str, str]) -> None:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind and kind != _JSON:
            raise ApiError(415, f"content-type must be {_JSON}, got {shown(kind)}")
        # With that type, the browser has asked first whether the page may (CORS).
        origin = headers.get("origin")
        if not kind and origin is not None and not self._own(origin, headers.get("host")):
            raise ApiError(
                415,
                f"content-type must be {_JSON} where the request is of a page, of origin "
                f"{shown(origin)}; it is missing",
            )

    def _own(self, origin: str, host: str | None) -> bool:
        if origin in self.cors or "*" in self.cors:
            return True
        return host is not None and origin.partition("://")[2].lower() == host.lower()


def _name(host: str) -> str:
    """The name of "name:port", or the address of "[address]:port"."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, _, port = host.rpartition(":")
    name = name if port.isdecimal() and ":" not in name and name else host
    return name.removesuffix(".")
