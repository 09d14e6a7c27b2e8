"""Errors as OpenAI's API shapes them: {"error": {"message", "type", "param", "code"}}."""

import math
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from kairos_jax.api.gate import Closed
from kairos_jax.api.http.to_json import Json
from kairos_jax.api.refusal import BadField, TooLong, UnknownModel, message_of
from kairos_jax.routing.fleet import Full, WorkerLost
from kairos_jax.routing.router import IdInUse
from kairos_jax.routing.stream import RequestFailed

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    409: "conflict",
    413: "request_too_large",
    415: "unsupported_media_type",
    421: "misdirected_request",
    429: "rate_limit_exceeded",
    503: "service_unavailable",
}
# Where nobody can say when a retry may succeed.
_RETRY_S = 1.0


class ApiError(Exception):
    """A request that is refused. param: the field at fault, if it is one."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code or _CODES.get(status)
        self.headers: dict[str, str] = {}


def describe(error: Exception) -> ApiError:
    """What a client is told of an error. Of one that nobody foresaw, nothing but that it was."""
    match error:
        case ApiError():
            return error
        case TooLong():
            # The code that clients look for, to shorten the prompt and try again.
            return ApiError(400, str(error), error.field, "context_length_exceeded")
        case BadField():
            return ApiError(400, str(error), error.field)
        case UnknownModel():
            return ApiError(404, str(error), "model", "model_not_found")
        case IdInUse():
            return ApiError(409, str(error), "request_id")
        case Full():
            return _later(429, str(error), error.retry_after_s)
        case Closed() | WorkerLost():
            return _later(503, str(error), _RETRY_S)
        case RequestFailed():
            return ApiError(500, str(error), code="request_failed")
        case ClientDisconnect():  # nobody reads it
            return ApiError(400, "the client went away before the body was there")
        case HTTPException(status_code=404):
            return ApiError(404, "there is nothing at this path")
        case HTTPException(status_code=405):
            refusal = ApiError(405, "this path does not take this method")
            refusal.headers |= error.headers or {}
            return refusal
        case HTTPException():
            return ApiError(error.status_code, error.detail)
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def error_object(error: ApiError) -> Mapping[str, object]:
    """The JSON object of an error, as a body or as an event."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": message_of(error),
            "type": _TYPES.get(error.status, kind),
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: Exception) -> Response:
    """The answer to a request that failed before anything of it was answered."""
    refusal = describe(error)
    return Json(error_object(refusal), refusal.status, refusal.headers)


async def on_error(request: Request, error: Exception) -> Response:
    """For Starlette."""
    return error_response(error)


def _later(status: int, message: str, retry_after_s: float) -> ApiError:
    error = ApiError(status, message)
    # Whole seconds by the standard; OpenAI's clients look at the other first.
    error.headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    error.headers["retry-after-ms"] = str(max(1, math.ceil(1000 * retry_after_s)))
    return error
