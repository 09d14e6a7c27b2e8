"""What stands before every HTTP request: where it comes from, API keys, a name for it, a limit for
its body.
"""

import asyncio
import contextlib
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kairos_jax.api.http.errors import ApiError, error_response
from kairos_jax.api.http.origin import Origins
from kairos_jax.api.keys import MISSING, shows_key
from kairos_jax.api.slots import Slot
from kairos_jax.api.validator import MAX_REQUEST_ID

# How long a body that was refused is still read, and forgotten: closing with bytes unread resets
# the connection, and the client might never see why.
_LINGER_S = 1.0
# What a client may take to send its body.
_BODY_TIMEOUT_S = 60.0


class OpenRoute(Route):
    """A route that needs no key, for probes, scrapers and browsers. All others need one."""


class Guard:
    """ASGI middleware: lets in requests with a key, and gives each answer its X-Request-ID.

    routes: of the app. A request for anything but an `OpenRoute` needs a key. origins: from where
    requests are taken.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[bytes],
        routes: Sequence[BaseRoute],
        origins: Origins,
    ):
        self._app, self._keys, self._routes, self._origins = app, keys, routes, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        name = headers.get("x-request-id", "")

        refused = False

        async def named(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start":
                refused = message["status"] == 413
                if name:
                    MutableHeaders(scope=message)["x-request-id"] = name
            elif refused:
                await send({**message, "more_body": True})
                await _linger(receive)
                message = {"type": "http.response.body"}
            await send(message)

        try:
            if len(name) > MAX_REQUEST_ID:
                limit, got, name = MAX_REQUEST_ID, len(name), ""
                raise ApiError(400, f"x-request-id must have at most {limit} characters, got {got}")
            self._origins.check(scope["method"], headers)
            if self._keys and self._is_closed(scope):
                self._check_key(headers.get("authorization", ""))
        except ApiError as error:
            await error_response(error)(scope, receive, named)
        else:
            await self._app(scope, receive, named)

    def _is_closed(self, scope: Scope) -> bool:
        """By the route that Starlette takes: the first that matches whole, else the first whose
        path matches.
        """
        matches = [(route.matches(scope)[0], route) for route in self._routes]
        for match in (Match.FULL, Match.PARTIAL):
            for found, route in matches:
                if found is match:
                    return not isinstance(route, OpenRoute)
        return True

    def _check_key(self, given: str) -> None:
        if not shows_key(given, self._keys):
            error = ApiError(401, MISSING)
            error.headers["www-authenticate"] = "Bearer"
            raise error


async def read_body(request: Request, limit: int, slot: Slot) -> bytes:
    """The body of a request, which its slot holds from now on. Raises ApiError for one that is too
    long, as soon as that is known, or too slow, Full, and ClientDisconnect.
    """
    length = request.headers.get("content-length", "0")
    if int(length) > limit:  # the parser has seen to it that it is a number
        raise _too_large(limit)
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise _too_large(limit)
                slot.hold_body(size)
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {_BODY_TIMEOUT_S:g} s") from None
    return b"".join(parts)


async def _linger(receive: Receive) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while (await receive()).get("more_body"):
                pass


def _too_large(limit: int) -> ApiError:
    error = ApiError(413, f"the body must have at most {limit} bytes")
    error.headers["connection"] = "close"  # the rest of it is not read
    return error
