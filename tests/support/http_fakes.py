"""A fake server with an HTTP API, whose vocabulary is the printable characters of ASCII."""

import asyncio
import contextlib
import json
import queue
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fakes
import httpx2
import tokenizers
from tokenizers import decoders, models

from kairos_jax.api.http.server import HttpOptions
from kairos_jax.config import ServerConfig
from kairos_jax.text.tokenizer import Tokenizer

# Id 0 ends an output, id 1 begins a text, and the others are a character each.
_SPECIAL = ("</s>", "<s>")
_CHARACTERS = [chr(code) for code in range(32, 127)]
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}|{% endfor %}a:"
)


def tokenizer() -> Tokenizer:
    vocab = {token: id for id, token in enumerate([*_SPECIAL, *_CHARACTERS])}
    assert len(vocab) == fakes.VOCAB
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(_SPECIAL))
    return Tokenizer(backend, frozenset({0}), chat_template=_TEMPLATE)


def ids_of(text: str) -> list[int]:
    return [_CHARACTERS.index(character) + 2 for character in text]


def text_of(ids: Sequence[int]) -> str:
    return "".join(_CHARACTERS[id - 2] for id in ids if id >= 2)


def says(prompt: str, count: int) -> str:
    return text_of(fakes.expected_tokens(ids_of(prompt), count))


def text_in(events) -> str:
    shown = [choice for event in events for choice in event["choices"]]
    return "".join(
        each["delta"].get("content", "") if "delta" in each else each["text"] for each in shown
    )


def of(event):
    """The one choice of an event."""
    (choice,) = event["choices"]
    return choice


async def fetch(
    app, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what an ASGI app answers to a client that stays."""
    sent, left = [], asyncio.Event()
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if not parts:
            await left.wait()
        return parts.pop()

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    await app(scope, receive, send)
    head, *rest = sent
    told = {name.decode(): value.decode() for name, value in head["headers"]}
    return head["status"], told, b"".join(part["body"] for part in rest)


@dataclass
class Api:
    """A client of a fake server."""

    harness: fakes.Harness
    client: httpx2.AsyncClient

    async def post(self, path: str, body: Any = None, **more) -> httpx2.Response:
        return await self.client.post(path, **({"json": body} if body is not None else {}), **more)

    async def complete(self, **body) -> dict[str, Any]:
        answer = await self.post("/v1/completions", ASK | body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def chat(self, content: Any, **body) -> dict[str, Any]:
        body["messages"] = [{"role": "user", "content": content}]
        answer = await self.post("/v1/chat/completions", ASK | body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream, which must be well formed and end as one does."""
        async with self.client.stream("POST", path, json=ASK | body | {"stream": True}) as answer:
            assert answer.headers["content-type"] == "text/event-stream"
            text = (await answer.aread()).decode()
        *events, done, rest = text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


# Greedy, and to the end: what fakes.expected_tokens tells.
ASK = {"model": "fake", "temperature": 0, "ignore_eos": True}


@contextlib.asynccontextmanager
async def serving(
    config: ServerConfig = fakes.CONFIG,
    app: HttpOptions | None = None,
    words: Tokenizer | None = None,
    trusts_templates: bool = False,
    **headers: str,
) -> AsyncIterator[Api]:
    """A server that is up, and a client of it; both end with the block. words: its tokenizer."""
    http, words = app or HttpOptions(0), words or tokenizer()
    async with fakes.running(config, None, words, http, trusts_templates) as harness:
        assert harness.server.http
        url = f"http://{harness.server.http.address}"
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=30) as client:
            yield Api(harness, client)


@contextlib.contextmanager
def serving_in_thread(
    config: ServerConfig = fakes.CONFIG, app: HttpOptions | None = None
) -> Iterator[Callable[[Callable[[Api], Awaitable[None]]], None]]:
    """A function that runs an async test against a server that lives as long as the block, on a
    thread of its own. At its end nothing may be held.
    """
    up: queue.Queue[tuple[Api, asyncio.AbstractEventLoop] | BaseException]
    up, ending = queue.Queue(), threading.Event()

    async def serve() -> None:
        try:
            async with serving(config, app) as api:
                up.put((api, asyncio.get_running_loop()))
                await asyncio.to_thread(ending.wait)
                await api.harness.assert_nothing_held()
        except BaseException as error:
            up.put(error)
            raise

    ended: queue.Queue[BaseException | None] = queue.Queue()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    threading.Thread(target=run).start()
    found = up.get(timeout=30)
    if isinstance(found, BaseException):
        raise found
    api, loop = found
    try:
        yield lambda test: asyncio.run_coroutine_threadsafe(test(api), loop).result(60)
    finally:
        ending.set()
        error = ended.get(timeout=60)
    if error:
        raise error


def served(test: Callable[[Api], Awaitable[None]]) -> Callable[..., None]:
    """Runs an async test against the server of the fixture `shared`, whose client it is given."""

    def run(shared):
        shared(test)

    return run


async def until(condition: Callable[[], object]) -> None:
    """Returns when it holds, which another task or thread sees to."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


@contextlib.contextmanager
def client_of_thread(
    config: ServerConfig = fakes.CONFIG, app: HttpOptions | None = None
) -> Iterator[httpx2.Client]:
    """A client of such a server, for tests without an event loop."""
    urls: list[str] = []

    async def note(api: Api) -> None:
        urls.append(str(api.client.base_url))

    with serving_in_thread(config, app) as run:
        run(note)
        with httpx2.Client(base_url=urls[0], timeout=30) as client:
            yield client
