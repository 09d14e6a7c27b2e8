"""Runs one HTTP request's streams, and writes what comes of them, for as long as its client is
there.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from kairos_jax.api.backend import Backend
from kairos_jax.api.gate import Closed
from kairos_jax.api.http.answers.answer import DONE, Answer, event_of
from kairos_jax.api.http.answers.choice import Choice, Piece, StopTexts
from kairos_jax.api.http.answers.writing import Comments, write_whole
from kairos_jax.api.http.body.request import Ask
from kairos_jax.api.http.errors import describe, error_object
from kairos_jax.observe.tracing import trace_of
from kairos_jax.routing.fleet import WorkerLost
from kairos_jax.routing.router import IdInUse, Router
from kairos_jax.routing.stream import RequestFailed, Stream
from kairos_jax.text.detokenizer import Detokenizer
from schedulers.ledger.request import Request

_EVENTS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]


class Answering:
    """The answer to what was asked, as an ASGI app: it submits, writes, and leaves nothing behind.

    Raises what is to be told instead of an answer: Full, WorkerLost, RequestFailed.
    """

    def __init__(self, ask: Ask, backend: Backend):
        self._ask, self._backend = ask, backend

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        streams: list[Stream] = []
        write: _Events | None = None
        trace = trace_of(Headers(scope=scope).items())
        try:
            for request in _each(self._ask):
                streams.append(_submit(self._backend.router, request, trace, self._ask.named))
            answer = self._answer(streams)
            if self._ask.stream:
                write = _Events(answer, send, self._backend.router)
            work = write.all() if write else _whole(answer, send, self._backend.router)
            await _while_there(work, receive)
        except asyncio.CancelledError:
            # The server ends. What was begun, it cuts off, and says so in a line; passed on, this
            # would be a traceback there.
            if write is None or not write.begun:
                raise Closed("the server has ended") from None
        finally:
            for stream in streams:
                self._backend.router.cancel(stream)

    def _answer(self, streams: Sequence[Stream]) -> Answer:
        ask, plain = self._ask, self._backend.validator.tokenizer
        tokenizer = plain.showing_special if plain and ask.show_special else plain
        # A special token that ends the output belongs to what it stops at.
        hides_end = plain and ask.show_special and not ask.show_stop
        choices = [
            Choice(
                index,
                stream,
                Detokenizer(tokenizer, stream.request.prompt) if tokenizer else None,
                StopTexts(ask.stops, ask.show_stop) if ask.stops else None,
                ask.min_tokens,
                ask.late_stops,
                ask.silent,
                plain.has_text if plain and hides_end else None,
            )
            for index, stream in enumerate(streams)
        ]
        return Answer(ask, self._backend.validator.model, choices, tokenizer)


def _each(ask: Ask) -> list[Request]:
    """The requests of all choices: those of one prompt differ in what they draw."""
    several = len(ask.requests) * ask.n > 1
    requests = []
    for request in ask.requests:
        for number in range(ask.n):
            how = request.sampling
            how = replace(how, seed=(how.seed + number) % 2**64)
            id = f"{request.id}-{len(requests)}" if several and request.id else request.id
            requests.append(replace(request, id=id, sampling=how))
    return requests


def _submit(router: Router, request: Request, trace: Mapping[str, str], named: bool) -> Stream:
    """named: by the body. What proxies send as X-Request-ID need not be one of a kind: they give
    one to each request of theirs, and repeat it where they try again.
    """
    try:
        return router.submit(request, trace)
    except IdInUse:
        if named:
            router.rejected("id_in_use")
            raise
        return router.submit(replace(request, id=f"{request.id}~{secrets.token_hex(4)}"), trace)


async def _while_there(work: Awaitable[None], receive: Receive) -> None:
    """Waits for some work, and gives it up when the client goes away."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
    if working.done():
        working.result()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _each_done(jobs: Sequence[Awaitable[None]]) -> None:
    """Waits for all; the first that fails ends the others. Raises WorkerLost."""
    if len(jobs) == 1:
        return await jobs[0]
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _whole(answer: Answer, send: Send, router: Router) -> None:
    pieces: list[list[Piece]] = [[] for _ in answer.choices]

    async def read(choice: Choice) -> None:
        while choice.finish_reason is None:
            pieces[choice.index].append(await choice.next())
        _ended(choice, router)

    await _each_done([read(choice) for choice in answer.choices])
    parts = [answer.opening()]
    for choice, its in zip(answer.choices, pieces, strict=True):
        comma = b"," if choice.index else b""
        parts.append(comma + await _made(answer, answer.whole, choice, its))
    await write_whole(send, [*parts, answer.closing()])


async def _made(answer: Answer, make: Callable[..., bytes], *args: Any) -> bytes:
    """In a thread where it is much: others' tokens must not wait for the texts of a whole prompt's
    tokens, or of many alternatives.
    """
    return await asyncio.to_thread(make, *args) if answer.is_large else make(*args)


class _Events:
    """Writes an answer as server-sent events. Its head goes out with the first of them, so that
    what fails before has a status of its own. begun: it has.
    """

    def __init__(self, answer: Answer, send: Send, router: Router):
        self._answer, self._send, self._router = answer, send, router
        self._comments = Comments(self._write)
        self.begun = False

    async def all(self) -> None:
        """All there is to write."""
        answer = self._answer
        commenting = asyncio.ensure_future(self._comments.run())
        try:
            await _each_done([self._run(choice) for choice in answer.choices])
        except (WorkerLost, RequestFailed) as error:
            if not self.begun:
                raise
            await self._write(event_of(error_object(describe(error))))
        else:
            usage = answer.usage_event() if answer.ask.include_usage else b""
            await self._write(usage + DONE)
        finally:
            commenting.cancel()
        await self._send({"type": "http.response.body", "body": b""})

    async def _run(self, choice: Choice) -> None:
        before = self._answer.first
        while choice.finish_reason is None:
            piece, head = await choice.next(), b""
            if before:  # what it shows of the prompt comes first, for the offsets too
                head, before = await _made(self._answer, before, choice), None
            event = head + self._answer.event(choice, piece)
            if piece.finish_reason:
                _ended(choice, self._router)
            await self._write(event)
            # Where more is there already, nothing else gives others their turn.
            await asyncio.sleep(0)

    async def _write(self, data: bytes) -> None:
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
        self._comments.written()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})


def _ended(choice: Choice, router: Router) -> None:
    """Where the answer ends before its stream does, that is over too, by what it says."""
    router.cancel(choice.stream, outcome=choice.finish_reason or "stop")
