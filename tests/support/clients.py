"""Clients of a router: what they ask, and what they get when."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import grpc
from processes import Process

from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.rpc import kairos_pb2_grpc

_VOCAB = 264


@dataclass(frozen=True, slots=True)
class Ask:
    """A request; greedy without a seed."""

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int | None = None

    def message(self) -> pb.GenerateRequest:
        sampling = pb.Sampling(temperature=0 if self.seed is None else 1, ignore_eos=True)
        if self.seed is not None:
            sampling.seed = self.seed
        ids = pb.TokenIds(ids=self.prompt)
        return pb.GenerateRequest(token_ids=ids, max_tokens=self.max_tokens, sampling=sampling)


@dataclass(slots=True)
class Answer:
    """What a client has got: tokens, when each came, and how the call ended, and when."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    code: grpc.StatusCode | None = None
    details: str = ""
    ended_at: float = 0.0

    def num_wrong(self, expected: Sequence[int]) -> int:
        """Tokens that are missing, too many or others than expected."""
        differing = sum(a != b for a, b in zip(self.tokens, expected, strict=False))
        return differing + abs(len(self.tokens) - len(expected))

    def next_after(self, at: float) -> float:
        """When the first token after a time came; that time itself if none did."""
        return next((each for each in self.times if each > at), at)


class Load:
    """Requests in progress at one router."""

    def __init__(self, stub: kairos_pb2_grpc.KairosStub, asks: Sequence[Ask], timeout_s: float):
        self.answers = [Answer() for _ in asks]
        self._changed = asyncio.Event()
        self._calls = [stub.Generate(ask.message(), timeout=timeout_s) for ask in asks]
        pairs = zip(self._calls, self.answers, strict=True)
        self._tasks = [asyncio.ensure_future(self._read(*pair)) for pair in pairs]

    async def until(self, condition: Callable[[list[Answer]], bool]) -> None:
        """Returns when the answers are so."""
        async with asyncio.timeout(60):
            while not condition(self.answers):
                self._changed.clear()
                await self._changed.wait()

    async def done(self) -> list[Answer]:
        await asyncio.gather(*self._tasks)
        return self.answers

    def cancel(self) -> None:
        for call in self._calls:
            call.cancel()

    async def _read(self, call: grpc.aio.UnaryStreamCall, answer: Answer) -> None:
        try:
            async for said in call:
                now = time.monotonic()
                answer.tokens += said.token_ids
                answer.times += [now] * len(said.token_ids)
                self._changed.set()
            answer.code = grpc.StatusCode.OK
        except grpc.aio.AioRpcError as error:
            answer.code, answer.details = error.code(), error.details() or ""
        except asyncio.CancelledError:
            answer.code = grpc.StatusCode.CANCELLED
        answer.ended_at = time.monotonic()
        self._changed.set()


def some_asks(
    count: int, lengths: tuple[int, int], outputs: tuple[int, int], most: int = 1024, seed: int = 7
) -> list[Ask]:
    """As many requests, every other one sampled; lengths and outputs: from, to. most: of both."""
    rng = random.Random(f"{seed} {lengths} {outputs}")
    asks = []
    for at in range(count):
        prompt = tuple(rng.randrange(4, _VOCAB) for _ in range(rng.randint(*lengths)))
        max_tokens = min(rng.randint(*outputs), most - len(prompt))
        asks.append(Ask(prompt, max_tokens, at if at % 2 else None))
    return asks


@contextlib.asynccontextmanager
async def stub_of(router: Process) -> AsyncIterator[kairos_pb2_grpc.KairosStub]:
    """A client of a router, with a connection of its own."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(router.address, options) as channel:
        yield kairos_pb2_grpc.KairosStub(channel)


def check_ok(answer: Answer) -> None:
    """Raises RuntimeError for a call that failed."""
    if answer.code is not grpc.StatusCode.OK:
        raise RuntimeError(
            f"a call ended by {answer.code} after {len(answer.tokens)} tokens: {answer.details}"
        )
