"""OpenAI's HTTP API over the router of this process: what is at which path, and what answers it."""

import asyncio
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kairos_jax.api.backend import Backend
from kairos_jax.api.gate import Closed, Gate
from kairos_jax.api.http.answers.run import Answering
from kairos_jax.api.http.answers.warned import HEADER, Warned, warn
from kairos_jax.api.http.answers.writing import write_whole
from kairos_jax.api.http.body.fields import Fields, read_object, shown
from kairos_jax.api.http.body.known import (
    MOST_LOOKED_AT,
    near_misses,
    refuse_not_served,
    refuse_of_others,
)
from kairos_jax.api.http.body.prompts import chat_of
from kairos_jax.api.http.body.request import Ask, check_model, check_size, read, renamed
from kairos_jax.api.http.body.slo import near_headers, slo_of_headers
from kairos_jax.api.http.errors import ApiError, on_error
from kairos_jax.api.http.guard import Guard, OpenRoute, read_body
from kairos_jax.api.http.origin import Origins
from kairos_jax.api.http.server import HttpOptions
from kairos_jax.api.http.to_json import Json, to_bytes, to_json
from kairos_jax.api.refusal import BadField, TooLong, UnknownModel
from kairos_jax.api.slots import Slot
from kairos_jax.api.validator import Validator
from kairos_jax.routing.fleet import Full, WorkerLost
from kairos_jax.routing.router import IdInUse
from kairos_jax.routing.stream import RequestFailed
from kairos_jax.rpc import kairos_pb2 as pb

T = TypeVar("T")

# Token ids that are written at once: one millisecond.
_IDS_PART = 10_000

_FORESEEN: Sequence[type[Exception]] = (
    HTTPException,
    ApiError,
    BadField,
    UnknownModel,
    Closed,
    Full,
    WorkerLost,
    RequestFailed,
    IdInUse,
    ClientDisconnect,
)


def make_app(
    gate: Gate, options: HttpOptions, routes: Sequence[BaseRoute] = (), host: str = ""
) -> Starlette:
    """The ASGI app. routes: others beside those of the API; those that are no `OpenRoute` need a
    key. host: on which the server listens.
    """
    routes = [*Api(gate, options.max_body_bytes).routes(), *routes]
    allowed, cors_origins, keys = options.allowed_hosts, options.cors_origins, options.keys
    origins = Origins.of(host, allowed, cors_origins, keyed=bool(keys))
    guard = Middleware(Guard, keys=keys, routes=routes, origins=origins)
    middleware = [guard, Middleware(Warned)]
    if options.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", HEADER],
        )
        middleware.insert(0, cors)  # before keys are asked for: a browser's first call has none
    handlers: dict[Any, Any] = dict.fromkeys((Exception, *_FORESEEN), on_error)
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


class Api:
    """The endpoints. Each raises what `errors.describe` knows."""

    def __init__(self, gate: Gate, max_body_bytes: int):
        self._gate, self._max_body_bytes = gate, max_body_bytes
        self._created = int(time.time())

    def routes(self) -> list[BaseRoute]:
        """What is at which path."""
        return [
            OpenRoute("/health", self.health),
            OpenRoute("/version", self.version),
            OpenRoute("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{id:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]

    async def health(self, request: Request) -> Response:
        """Whether requests are served now."""
        self._gate.enter()
        return Response()

    async def version(self, request: Request) -> Response:
        """Of this package."""
        return Json({"version": version("kairos_jax")})

    async def metrics(self, request: Request) -> Response:
        """For Prometheus; also while no requests are taken any more."""
        backend = self._gate.backend or self._gate.enter()
        accept = request.headers.get("accept", "")
        # In a thread: it takes longer than a token should wait.
        text, kind = await asyncio.to_thread(backend.metrics.render, accept)
        return Response(text, headers={"content-type": kind})

    async def models(self, request: Request) -> Response:
        """The one model that is served."""
        return Json({"object": "list", "data": [self._model(self._gate.enter())]})

    async def model(self, request: Request) -> Response:
        """The model of this id."""
        backend, id = self._gate.enter(), request.path_params["id"]
        if id != backend.validator.model:
            raise UnknownModel(
                f"model {shown(id)} is not served; {shown(backend.validator.model)} is"
            )
        return Json(self._model(backend))

    def _model(self, backend: Backend) -> dict[str, Any]:
        return {
            "id": backend.validator.model,
            "object": "model",
            "created": self._created,
            "owned_by": "kairos_jax",
            "root": backend.validator.model,
            "parent": None,
            "max_model_len": backend.validator.config.max_context,
        }

    async def completions(self, request: Request) -> ASGIApp:
        """Goes on with prompts."""
        return await self._generate(request, chat=False)

    async def chat_completions(self, request: Request) -> ASGIApp:
        """Answers a conversation."""
        return await self._generate(request, chat=True)

    async def _generate(self, request: Request, chat: bool) -> ASGIApp:
        arrival, backend = self._gate.clock(), self._gate.admit()

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            with self._gate.slots.take() as slot:
                asked = await self._read(request, slot, backend, arrival, chat)
                slot.grow(len(asked.requests) * asked.n)
                await Answering(asked, backend)(scope, receive, send)

        return answer

    async def _read(
        self, request: Request, slot: Slot, backend: Backend, arrival: float, chat: bool
    ) -> Ask:
        headers = request.headers

        def ask(body: dict[str, Any]) -> Ask:
            warn(request, near_misses(body))
            warn(request, near_headers(headers)[:MOST_LOOKED_AT])
            slo, name = slo_of_headers(headers), headers.get("x-request-id", "")
            return read(body, backend.validator, arrival, slo, name, chat)

        try:
            asked = await self._of_body(request, slot, backend, ask)
        except UnknownModel:
            backend.router.rejected("unknown_model")
            raise
        except BadField:
            backend.router.rejected("bad_request")
            raise
        self._gate.admit()  # it may have closed since
        check_size(asked)
        return asked

    async def _of_body(
        self, request: Request, slot: Slot, backend: Backend, make: Callable[[dict[str, Any]], T]
    ) -> T:
        """What is made of the body of a request, which is held until then."""
        raw = await read_body(request, self._max_body_bytes, slot)
        slots, lane = self._gate.slots, backend.validator.lane
        body = await slots.tokenize(lambda: read_object(raw), lane(len(raw), None))
        made = await slots.tokenize(lambda: make(body), lane(len(raw), body.get("chat_template")))
        slot.hold_body(0)
        return made

    async def tokenize(self, request: Request) -> ASGIApp:
        """The token ids of a text, or of a conversation."""

        def make(validator: Validator, fields: Fields) -> list[bytes]:
            warn(request, near_misses(fields.values))
            return tokenized(validator, fields)

        return self._whole(request, make)

    async def detokenize(self, request: Request) -> ASGIApp:
        """The text of token ids."""
        return self._whole(request, detokenized)

    def _whole(self, request: Request, make: Callable[[Validator, Fields], list[bytes]]) -> ASGIApp:
        """An answer that is made of a body at once, in parts."""
        backend = self._gate.enter()

        def made(body: dict[str, Any]) -> list[bytes]:
            return make(backend.validator, Fields(body))

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            with self._gate.slots.take() as slot:
                parts = await self._of_body(request, slot, backend, made)
                await write_whole(send, parts)

        return answer


def tokenized(validator: Validator, fields: Fields) -> list[bytes]:
    """The answer to a body with a text or a conversation. Raises BadField or UnknownModel."""
    ids = _ids(validator, fields)
    head = {"count": len(ids), "max_model_len": validator.config.max_context}
    # In parts, between which other threads have their turn.
    some = [to_json(ids[at : at + _IDS_PART])[1:-1] for at in range(0, len(ids), _IDS_PART)]
    texts = [to_json(head)[:-1] + ', "tokens": [', *(text + ", " for text in some[:-1])]
    return [text.encode() for text in [*texts, *some[-1:], "]}"]]


def _ids(validator: Validator, fields: Fields) -> list[int]:
    check_model(fields, validator)
    chat, special = fields.values.get("messages") is not None, fields.flag("add_special_tokens")
    refuse_not_served(fields)
    fields.refuse_all_but("return_token_strs", False)
    message = pb.GenerateRequest(add_special_tokens=special)
    if chat:
        message.chat.CopyFrom(chat_of(fields))
    elif (text := fields.text("prompt")) is not None:
        refuse_of_others(fields, chat=False)
        message.text = text
    else:
        raise BadField("prompt", "is missing: give text, or messages")
    try:
        return validator.encode(message, "chat" if chat else "text")
    except BadField as error:
        place = "messages" if chat else "prompt"
        raise BadField(renamed(error.field, place), error.problem) from error


def detokenized(validator: Validator, fields: Fields) -> list[bytes]:
    """The answer to a body with ids. Raises BadField or UnknownModel."""
    check_model(fields, validator)
    if fields.values.get("tokens") is None:
        raise BadField("tokens", "is missing")
    ids = fields.ids("tokens")
    if len(ids) > (most := validator.config.max_context):
        raise TooLong("tokens", f"must be at most {most}, which the context has, got {len(ids)}")
    validator.check_ids(ids, "tokens")
    if validator.tokenizer is None:
        raise BadField("tokens", "need a tokenizer, and this model has none")
    return [to_bytes({"prompt": validator.tokenizer.decode(ids)})]
