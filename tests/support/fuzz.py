"""Sends malformed and hostile requests to a real server, and looks at what becomes of it."""

import asyncio
import contextlib
import itertools
import math
import re
import shutil
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import vocabularies
from fuzz_cases import PREFACE, Call, Case, Sent, text_of
from fuzz_http import Answer, Answers, NotHttp, Owed, owed_for, strict
from processes import HOST, MODEL, ROOT, Process
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import BaseRoute, Route

from kairos_jax.api.gate import Gate
from kairos_jax.api.http import debug
from kairos_jax.api.http.app import make_app
from kairos_jax.api.http.live import Live
from kairos_jax.api.http.server import HttpOptions
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.text import hugging_face
from kairos_jax.text.parts import Parts

# What an answer is waited for at most: a template may take 5 s, and there may be others before it.
_ANSWER_S = 20.0
_SETTLE_S = 30.0
_FEW_FDS = 4
_SPECIAL = ("<unk>", "<s>", "</s>", "<end>")
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
# gRPC's status for what a client may ask for, and get.
_FINE = {
    grpc.StatusCode.OK,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}
_SERIOUS = re.compile(r"^(ERROR|CRITICAL):|Traceback|^[EF]\d{4} |never retrieved", re.MULTILINE)


def write_model(directory: Path) -> Path:
    """The tiny model with a tokenizer and a chat template, which it does not come with."""
    shutil.copytree(ROOT / MODEL, directory, dirs_exist_ok=True)
    words, pairs = ["hi", "Ġhi", "Ã©", "he"], [("h", "i"), ("Ġ", "hi"), ("Ã", "©"), ("h", "e")]
    backend = vocabularies.bpe([*_SPECIAL, *vocabularies.ALPHABET, *words], pairs)
    backend.pre_tokenizer = vocabularies.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = vocabularies.decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIAL))
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    parts = Parts(backend, frozenset({2, 3}), named, {"default": _TEMPLATE})
    hugging_face.write(directory, parts)
    return directory


_PARAMETERS = ("profile", "schedule")


def paths() -> list[str]:
    """Of all routes of a server; where one has a parameter, with what it may be."""
    gate = Gate(time.monotonic)
    others: list[BaseRoute] = [*Live(gate).routes(), *debug.routes(None, "")]
    app = make_app(gate, HttpOptions(0), others)
    found = [route.path for route in app.routes if isinstance(route, Route)]
    filled = [re.sub(r"\{.*?\}", value, path) for path in found for value in _PARAMETERS]
    return sorted(set(filled))  # the files of the page come in any order


@dataclass(frozen=True, slots=True)
class Mark:
    """What the server holds after so many requests, when nothing is in progress."""

    num_requests: int
    rss_mib: int
    fds: int
    threads: int


@dataclass(slots=True)
class Fuzz:
    """What came of a run. outcomes: how many ended how, by kind. wrong: what must not be."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    took_s: float = 0.0

    def __str__(self) -> str:
        counts = sorted(self.outcomes.items())
        lines = [f"  {kind:7} {how:24} {count:7}" for (kind, how), count in counts]
        lines = [f"{self.outcomes.total()} requests in {self.took_s:.0f} s", *lines]
        return "\n".join([*lines, *map(str, self.marks), *self.wrong[:20]])


@dataclass(frozen=True, slots=True)
class Served:
    """A server process and where it is."""

    process: Process
    grpc_address: str
    grpc_port: int
    http_port: int

    @classmethod
    def of(cls, process: Process) -> "Served":
        """Waits until it is ready."""
        line = process.line("ready", 120)  # "...; HTTP on 127.0.0.1:1234, gRPC on 127.0.0.1:5678"
        address, http = line.split()[-1], line.partition("HTTP on ")[2].partition(",")[0]
        ports = (int(each.rpartition(":")[2]) for each in (address, http))
        return cls(process, address, *ports)


async def fuzz(
    served: Served, cases: Iterator[Case], count: int, in_flight: int = 8, warm: float = 0.2
) -> Fuzz:
    """Sends all of them, so many at a time, and stops thrice: what the server holds is looked at
    after the first fifth, when all that is made once has been made, after three, and at the end.
    """
    result, begun = Fuzz(), time.monotonic()
    ends = [int(count * part) for part in (warm, 0.6, 1.0)]
    for first, last in itertools.pairwise([0, *ends]):
        some = itertools.islice(cases, last - first)
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(_client(served)) for _ in range(in_flight)]
            await asyncio.gather(*(client.send_all(some, result) for client in clients))
        result.marks.append(await settled(served, last, result))
    result.took_s = time.monotonic() - begun
    result.wrong += serious(served.process.errors())
    return result


def serious(log: str) -> list[str]:
    """Where a log tells of an error that nobody foresaw, with what stands around it."""
    lines = log.splitlines()
    found = [at for at, line in enumerate(lines) if _SERIOUS.search(line)]
    return ["log: " + "\n".join(lines[max(at - 2, 0) : at + 60])[:6000] for at in found]


async def settled(served: Served, num_requests: int, result: Fuzz) -> Mark:
    """What the server holds once it has noticed that all clients are gone; if it holds something of
    a request then, that is wrong. Descriptors may take a moment more.
    """
    by = time.monotonic() + _SETTLE_S
    while (held := await _held(served)) and time.monotonic() < by:
        pass
    if held:
        result.wrong.append(f"after {num_requests} requests, held for ever: {held}")
    most = result.marks[0].fds + _FEW_FDS if result.marks else math.inf
    while (found := served.process.resources())["fds"] > most and time.monotonic() < by:
        await _held(served)
    return Mark(num_requests, found["rss_mib"], found["fds"], found["threads"])


async def _held(served: Served) -> dict[str, float]:
    """What is not 0 of what is 0 in an idle server."""
    raw = b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n"
    (answer,) = await ask(served.http_port, Sent("", raw))
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            is_used = sample.name == "kairos_worker_kv_pages" and sample.labels["state"] == "used"
            if is_used or sample.name in _ZERO_WHEN_IDLE:
                found[f"{sample.name} {sample.labels}"] = sample.value
    assert len(found) >= 10, found
    return {name: value for name, value in found.items() if value}


_ZERO_WHEN_IDLE = {
    "kairos_requests_in_progress",
    "kairos_worker_requests",
    "kairos_worker_kv_parked_tokens",
}


class _Reset(Exception):
    """The server has reset the connection, which may lose what it had answered."""


async def ask(port: int, sent: Sent) -> list[Answer]:
    """The answers to some bytes. Raises NotHttp, TimeoutError and _Reset."""
    owed = owed_for(sent.raw)
    async with asyncio.timeout(_ANSWER_S), _connected(port, sent.abrupt) as (reader, writer):
        answers = Answers(owed.methods)
        await _write(reader, writer, sent, answers)
        await _read(reader, answers, owed, sent.leave_at)
    return answers.done


@contextlib.asynccontextmanager
async def _connected(
    port: int, abrupt: bool
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        yield reader, writer
    finally:
        if abrupt and not writer.is_closing():
            its: socket.socket = writer.get_extra_info("socket")
            its.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _write(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sent: Sent, answers: Answers
) -> None:
    cuts = [0, *sent.cuts, len(sent.raw)]
    for first, last in itertools.pairwise(cuts):
        if sent.between and first == cuts[-2]:
            while answers.num_bytes < sent.between and not answers.done:
                if not (data := await _received(reader)):
                    return
                answers.feed(data)
        writer.write(sent.raw[first:last])
        try:
            await writer.drain()
        except OSError:  # It has answered, and closed: what it said is read.
            return


async def _read(
    reader: asyncio.StreamReader, answers: Answers, owed: Owed, leave_at: int | None
) -> None:
    """Until all has come that is owed, or the server closes the connection."""
    while owed.ends or len(answers.done) < len(owed.methods):
        if answers.has_no_end or (leave_at is not None and answers.num_bytes >= leave_at):
            return answers.left()
        if not (data := await _received(reader)):
            return answers.end()
        answers.feed(data)


async def _received(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(1 << 16)
    except OSError as error:  # also of a write that it did not take any more
        raise _Reset from error


async def _send_http2(port: int, sent: Sent) -> str:
    """How the server took it: it speaks first if this begins as HTTP/2 does."""
    begins = sent.raw.startswith(PREFACE)
    async with asyncio.timeout(_ANSWER_S), _connected(port, sent.abrupt) as (reader, writer):
        await _write(reader, writer, sent, Answers(()))
        return "left" if not begins else "answered" if await _received(reader) else "closed"


@contextlib.asynccontextmanager
async def _client(served: Served) -> AsyncIterator["_Client"]:
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
    async with grpc.aio.insecure_channel(served.grpc_address, options) as channel:
        yield _Client(served, channel)


class _Client:
    """Sends one request after the other."""

    def __init__(self, served: Served, channel: grpc.aio.Channel):
        self._served, self._channel = served, channel

    async def send_all(self, cases: Iterator[Case], result: Fuzz) -> None:
        """As long as there are any; other clients take of the same."""
        for case in cases:
            if isinstance(case, Call):
                kind, how, wrong = "grpc", *await self._call(case)
            else:
                sent = case.sent()
                kind, how, wrong = sent.kind, *await self._send(sent)
            result.outcomes[kind, how] += 1
            if wrong:
                result.wrong.append(f"{wrong}: {str(case)[:1500]}")

    async def _send(self, sent: Sent) -> tuple[str, str]:
        """How it ended, and what is wrong with that, if anything is."""
        try:
            if sent.kind == "http2":
                return await _send_http2(self._served.grpc_port, sent), ""
            answers = await ask(self._served.http_port, sent)
        except _Reset:
            return "reset", ""
        except TimeoutError:
            return "no answer", f"no answer within {_ANSWER_S:g} s"
        except NotHttp as error:
            return "no HTTP", str(error)
        bad = [each for each in answers if each.status == 422 or each.status >= 500]
        wrong = [f"{each.status} {each.body[:300]!r}" for each in bad if each.status != 503]
        nothing = "closed" if owed_for(sent.raw).ends else "left"
        return str(answers[-1].status) if answers else nothing, "; ".join(wrong)

    async def _call(self, case: Call) -> tuple[str, str]:
        """The same of a call."""
        one = len(case.messages) == 1
        make = self._channel.unary_stream if one else self._channel.stream_stream
        asked: Any = case.messages[0] if one else iter(case.messages)
        deadline = _ANSWER_S if case.deadline_s is None else case.deadline_s
        got, ended = 0, None
        try:
            call = make(case.method)(asked, timeout=deadline, metadata=case.metadata)
            try:
                if case.cancel_at == 0:
                    call.cancel()
                async for said in call:
                    got += 1
                    if case.method.endswith("/Generate"):
                        pb.GenerateResponse.FromString(said)
                    if got == case.cancel_at:
                        call.cancel()
            finally:
                call.cancel()
        except grpc.aio.AioRpcError as error:
            code, details, ended = error.code(), error.details() or "", error
        except asyncio.CancelledError:
            code, details = grpc.StatusCode.CANCELLED, ""
        except (grpc.aio.UsageError, TypeError, ValueError) as error:
            return f"not sent: {type(error).__name__}", ""
        else:
            code, details = grpc.StatusCode.OK, ""
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and case.deadline_s is None:
            return code.name, f"no answer within {_ANSWER_S:g} s"
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not _is_full(ended, case):
            return code.name, f"{code.name}, though it was not refused for want of room: {details}"
        # The client's own word where a call ends while it still writes: see docs/known-limits.md.
        cut = len(case.messages) > 1 and details == "Internal error from Core"
        return code.name, "" if code in _FINE or cut else f"{code.name} {details[:300]}"


def _is_full(ended: grpc.aio.AioRpcError | None, case: Call) -> bool:
    """Whether the server, or gRPC for what the client sent beside the message, has no room."""
    told = dict(ended.trailing_metadata() or ()) if ended else {}
    return "retry-after-s" in told or any(len(value) > 5000 for _, value in case.metadata)


async def greedy(served: Served) -> list[Sequence[int]]:
    """What the server says to a valid request, by each API."""
    prompt = [5, 6, 7, 8]
    fields = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    body = text_of(fields | {"return_token_ids": True}).encode()
    raw = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
    raw += b"content-length: %d\r\n\r\n%s" % (len(body), body)
    (answer,) = await ask(served.http_port, Sent("", raw))
    said: Any = strict(answer.body)
    asked = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        max_tokens=24,
        sampling=pb.Sampling(temperature=0, ignore_eos=True),
    )
    async with _client(served) as client:
        call = client._channel.unary_stream("/kairos.v1.Kairos/Generate")
        parts = [
            pb.GenerateResponse.FromString(part) async for part in call(asked.SerializeToString())
        ]
    return [said["choices"][0]["token_ids"], [id for part in parts for id in part.token_ids]]
