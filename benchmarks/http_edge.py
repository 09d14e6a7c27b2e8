"""What the HTTP API costs beside gRPC, with nothing behind them: tokens a second, streams held.

  python benchmarks/http_edge.py [--rate=20000] [--streams=64,256,1024] [--output=json]

A stand-in for the router gives every stream a token a tick, so that all together get `rate` of them
a second; the server detokenizes with the default model's tokenizer and writes them, and a client
in a process of its own reads them over loopback. `core` is how many seconds of CPU the server took
for a second of wall time, and `most/s` the tokens a second that one core could carry by that, the
figure to look at where the machine has other work. Where tokens come faster than they are written,
those of one stream go out together: `events` is how many writes a token took.
"""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
from absl import app, flags

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import fakes

from kairos_jax.api.backend import Backend
from kairos_jax.api.http.server import HttpOptions
from kairos_jax.api.server import Server
from kairos_jax.api.validator import Validator
from kairos_jax.engine.calls import Token
from kairos_jax.observe.metrics import Metrics
from kairos_jax.process.hub import DEFAULT_MODEL, resolve_model
from kairos_jax.routing.stream import Stream
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.rpc import kairos_pb2_grpc
from kairos_jax.text.tokenizer import Tokenizer, load_tokenizer
from kairos_jax.worker.messages import Output
from schedulers.ledger.request import Request

_RATE = flags.DEFINE_integer("rate", 20_000, "Tokens a second, of all streams together.", 1)
_STREAMS = flags.DEFINE_list("streams", ["64", "256", "1024"], "Streams at once.")
_SECONDS = flags.DEFINE_float("seconds", 8.0, "How long each run is to take.", 0.1)
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "How to print the result.")
_CLIENT = flags.DEFINE_string("client", None, "Internal: api,port,streams,tokens.")

_TEXT = (
    "It was a bright cold day in the north, and the boats lay idle along the quay; nobody had told "
    "the crews when, or whether, they would sail again — “soon”, said the harbour master. "
)
_PROMPT = "x" * 100


@dataclass(frozen=True, slots=True)
class Row:
    """One run. seconds: from the first token to the last, at the client. cpu_s: of the server."""

    api: str
    streams: int
    tokens: int
    seconds: float
    cpu_s: float
    events: int

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def most(self) -> float:
        """Tokens a second that one core could carry."""
        return self.tokens / self.cpu_s


class Feed:
    """Stands in for the router: every stream gets the same tokens, one a tick."""

    def __init__(self, ids: Sequence[int], num_streams: int, rate: int):
        self._ids, self._wanted, self._tick_s = ids, num_streams, num_streams / rate
        self._streams: dict[int, Stream] = {}
        self.begun_at = 0.0  # in CPU seconds of this process
        self._num_tokens = 0

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def wait_s(self) -> float:
        """Not predicted here."""
        return 0.0

    def rejected(self, reason: str, slo: object = None) -> None:
        """Not counted here."""

    def submit(self, request: Request, trace: object = None) -> Stream:
        """Begins to tick when all are there."""
        stream = Stream(request.id, request)
        self._streams[id(stream)] = stream
        if len(self._streams) == self._wanted:
            self.begun_at, self._num_tokens = time.process_time(), request.max_tokens
            loop = asyncio.get_running_loop()
            threading.Thread(target=self._run, args=(loop,), daemon=True).start()
        return stream

    def cancel(self, stream: Stream, outcome: str = "") -> None:
        self._streams.pop(id(stream), None)

    async def drained(self) -> None:
        """Not waited for here."""

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """On a thread of its own, as workers are: where the loop is behind, ticks pile up."""
        due = time.monotonic()
        for at in range(self._num_tokens):
            loop.call_soon_threadsafe(self._tick, at)
            due += self._tick_s
            time.sleep(max(0.0, due - time.monotonic()))

    def _tick(self, at: int) -> None:
        token, now = Token(self._ids[at % len(self._ids)]), time.monotonic()
        reason = "length" if at == self._num_tokens - 1 else None
        for stream in self._streams.values():
            stream.put(Output(stream.name, token, now, now, reason))


async def measure(api: str, streams: int, tokenizer: Tokenizer) -> Row:
    """One run of one API."""
    tokens = max(1, round(_RATE.value * _SECONDS.value / streams))
    limits = {"max_context": tokens + 1024, "max_tokens": tokens, "max_requests": streams}
    config = fakes.altered(**limits)
    feed = Feed(tokenizer.encode(_TEXT), streams, _RATE.value)
    validator = Validator("edge", tokenizer.vocab_size, frozenset(), config, tokenizer)
    server = Server("127.0.0.1", 0, time.monotonic, http=HttpOptions(0))
    await server.start()
    await server.open(Backend(validator, feed, Metrics(), pb.Model(name="edge")))  # type: ignore
    assert server.http
    port = server.http.port if api == "http" else server.port
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, f"--client={api},{port},{streams},{tokens}"),
        stdout=subprocess.PIPE,
    )
    said, _ = await client.communicate()
    cpu_s = time.process_time() - feed.begun_at
    await server.drain(0)
    found = json.loads(said)
    return Row(api, streams, streams * tokens, found["seconds"], cpu_s, found["events"])


# The clients.


async def read_http(port: int, tokens: int, started: list[float]) -> int:
    """Reads one stream to its end. Returns its events."""
    body = {"prompt": _PROMPT, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    sent = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(sent)}\r\n\r\n"
    )
    writer.write(head.encode() + sent)
    await reader.readuntil(b"\r\n\r\n")
    started.append(time.monotonic())
    events, tail = 0, b""
    while not tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        data = await reader.read(1 << 16)
        if not data:
            raise ConnectionError(f"the stream ended by {tail!r}")
        events += data.count(b"data: ")
        tail = (tail + data)[-64:]
    writer.close()
    return events - 1


async def read_grpc(stub: kairos_pb2_grpc.KairosStub, tokens: int, started: list[float]) -> int:
    """As `read_http`."""
    sampling = pb.Sampling(ignore_eos=True)
    request = pb.GenerateRequest(text=_PROMPT, max_tokens=tokens, sampling=sampling)
    call, events = stub.Generate(request), 0
    while await call.read() is not grpc.aio.EOF:
        if not events:
            started.append(time.monotonic())
        events += 1
    return events


async def client(api: str, port: int, streams: int, tokens: int) -> None:
    """Reads all streams, and prints how long it took."""
    started: list[float] = []
    if api == "http":
        reads = [read_http(port, tokens, started) for _ in range(streams)]
        events = await asyncio.gather(*reads)
    else:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = kairos_pb2_grpc.KairosStub(channel)
            reads = [read_grpc(stub, tokens, started) for _ in range(streams)]
            events = await asyncio.gather(*reads)
    print(json.dumps({"seconds": time.monotonic() - min(started), "events": sum(events)}))


def main(argv: list[str]) -> None:
    """Measures every number of streams through both."""
    if _CLIENT.value:
        api, *numbers = _CLIENT.value.split(",")
        return asyncio.run(client(api, *map(int, numbers)))
    tokenizer = load_tokenizer(resolve_model(DEFAULT_MODEL))
    rows = [
        asyncio.run(measure(api, int(streams), tokenizer))
        for streams in _STREAMS.value
        for api in ("http", "grpc")
    ]
    if _OUTPUT.value == "json":
        print(json.dumps([asdict(row) | {"rate": row.rate, "most": row.most} for row in rows]))
        return
    print(f"{'api':6}{'streams':>8}{'tokens/s':>10}{'core':>7}{'most/s':>9}{'events':>8}")
    for row in rows:
        core, events = row.cpu_s / row.seconds, row.events / row.tokens
        print(f"{row.api:6}{row.streams:8}{row.rate:10.0f}{core:7.2f}{row.most:9.0f}{events:8.2f}")


if __name__ == "__main__":
    app.run(main)
