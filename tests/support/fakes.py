"""A fake engine whose KV is the token ids, and a whole server around some of them."""

import asyncio
import contextlib
import math
import random
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import grpc
import numpy as np

from kairos_jax.api.backend import Backend
from kairos_jax.api.http.server import HttpOptions
from kairos_jax.api.server import Server
from kairos_jax.api.validator import Validator
from kairos_jax.config import DecodeConfig, PrefillConfig, ServerConfig, SloConfig
from kairos_jax.engine.calls import PromptLogprobs, Token, wants_prompt_logprobs
from kairos_jax.engine.engine import JaxEngine
from kairos_jax.engine.functions import BLOCK_PAGES, Shapes
from kairos_jax.kv.transport import LocalTransport
from kairos_jax.observe.metrics import Metrics
from kairos_jax.routing.router import Router
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.rpc import kairos_pb2_grpc
from kairos_jax.text.tokenizer import Tokenizer
from kairos_jax.worker.build import build_workers
from kairos_jax.worker.worker import Worker
from models.sampling import INVALID
from models.sharding import Rules
from schedulers.cost import CostModel
from schedulers.ledger.instance import Limits, Role
from schedulers.ledger.journal import Journal
from schedulers.ledger.request import Request

VOCAB = 97
NONE = -1  # where no token's KV is
PROFILE = {
    "prefill": {"base_s": 1e-4, "per_token_s": 1e-6, "per_token_sq_s": 0.0},
    "decode": {"base_s": 1e-4, "per_seq_s": 1e-6, "per_context_token_s": 0.0},
    "transfer": {"base_s": 1e-4, "per_token_s": 1e-6},
    "kv_capacity_tokens": 4096,
}
CONFIG = ServerConfig(
    model="fake",
    dtype="float32",
    kernels="cpu",
    rules=Rules(),
    max_context=128,
    max_tokens=64,
    max_requests=64,
    page_size=8,
    colocated=False,
    prefill=PrefillConfig(
        instances=1,
        devices=1,
        policy="kairos_plus",
        kv_tokens=512,
        # So many that no burst of the tests is turned away: see test_admission.py.
        parked_tokens=4096,
        max_chunk=32,
        pack=math.inf,
        prefix_cache=True,
    ),
    decode=DecodeConfig(
        instances=1,
        devices=1,
        policy="kairos_plus",
        kv_tokens=1024,
        max_batch=8,
        prefix_cache=True,
    ),
    slo=SloConfig(ttft=30.0, tpot=30.0),
)


def next_token(context: Sequence[int]) -> int:
    """What a fake engine samples after `context`: depends on every token and its place."""
    value = 7
    for id in context:
        value = (value * 31 + id + 1) % VOCAB
    return value


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


def expected_prompt_logprobs(prompt: Sequence[int], count: int) -> PromptLogprobs:
    """What a fake engine tells of a prompt: each token by its id, and the ids after what it would
    have sampled in its place.
    """
    top = [
        (next_token(prompt[:at]) + nth) % VOCAB
        for at in range(1, len(prompt))
        for nth in range(count)
    ]
    values = [-0.25 * (1 + nth) for _ in prompt[1:] for nth in range(count)]
    return PromptLogprobs(tuple(-id / 4 for id in prompt[1:]), tuple(top), tuple(values))


class Piece(NamedTuple):
    """What a step is to compute of a sequence, as it is when the step begins: the ledger goes on.
    known: the ids of prompt and output that are on the host by then.
    """

    request: Request
    start: int
    stop: int
    length: int
    known: list[int]
    pages: list[int]
    cached: int


class Queued:
    """Something that runs in its turn, once."""

    def __init__(self, run: Callable[[], Any]):
        self._run = run
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self):
        try:
            self._result = self._run()
        except BaseException as error:
            self._error = error

    def result(self):
        if self._error:
            raise self._error
        return self._result


class FakeEngine:
    """Keeps token ids where an engine keeps KV, and samples from what it finds there.

    As on a device, all that is asked of it runs in that order, each when a result is waited for.
    gate: steps wait for it. fail: the next step raises it. num_reads: copies made of KV. bad: a
    token of which nothing finite can be computed.
    """

    wire_sharding = None
    num_compiled = 0
    copy_s = 0.0

    def __init__(self, limits: Limits):
        self.limits, self.page_size = limits, limits.page_size
        self.pool: dict[int, list[int]] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.fail: BaseException | None = None
        self.bad: int | None = None
        self.num_steps = self.num_reads = 0
        self._sampled: dict[str, int] = {}  # by the last step: the host may not know it yet
        self._queue: deque[Queued] = deque()
        self._running = threading.Lock()

    def start(self, work):
        pieces = [self._piece(seq, count) for seq, count in work]
        return self._enqueue(lambda: self.step(pieces))

    def step(self, pieces: Sequence[Piece]):
        assert self.gate.wait(30)
        if self.fail:
            raise self.fail
        self.num_steps += 1
        tokens = {}
        for piece in pieces:
            ids = piece.known[piece.start : piece.stop]
            if len(ids) < piece.stop - piece.start:
                ids.append(self._sampled[piece.request.id])
            for position, id in enumerate(ids, piece.start):
                page = self.pool.setdefault(
                    piece.pages[position // self.page_size], [NONE] * self.page_size
                )
                page[position % self.page_size] = id
            if self.bad in ids:
                tokens[piece.request.id] = Token(INVALID)
            elif piece.stop == piece.length:
                tokens[piece.request.id] = self._token(piece)
        self._sampled = {id: max(token.id, 0) for id, token in tokens.items()}
        return tokens

    def read_pages(self, pages):
        self.num_reads += 1
        return self._enqueue(lambda: self._read(pages))()

    def write_pages(self, pages, kv):
        assert len(kv) == -(-len(pages) // BLOCK_PAGES)
        rows = (row for block in kv for row in block.tolist())
        written = zip(pages, rows, strict=False)  # the last block is padded
        kept = {page: row for page, row in written if page < self.limits.num_pages}
        self._enqueue(lambda: self.pool.update(kept))

    def wait(self):
        self._enqueue(lambda: None)()

    def _enqueue(self, run):
        """Returns what waits for its turn, and for its result."""
        queued = Queued(run)
        self._queue.append(queued)

        def wait():
            with self._running:
                while queued in self._queue:
                    self._queue[0].run()
                    self._queue.popleft()
            return queued.result()

        return wait

    def _piece(self, seq, count):
        stop = seq.computed + count
        ids = seq.token_ids(0, seq.length)
        return Piece(seq.request, seq.computed, stop, seq.length, ids, list(seq.pages), seq.cached)

    def _token(self, piece):
        slots = [id for page in piece.pages for id in self.pool.get(page, [])]
        context = slots[: piece.length]
        assert NONE not in context, "the KV of a token is missing"
        id, prompt = next_token(context), None
        if piece.length == len(piece.request.prompt) and wants_prompt_logprobs(piece.request):
            assert not piece.cached, "there are no logits of what was not computed"
            count = piece.request.sampling.prompt_logprobs
            prompt = expected_prompt_logprobs(piece.request.prompt, count)
        return Token(id, -0.5, ((id, -0.5),), prompt)

    def _read(self, pages):
        empty = [NONE] * self.page_size
        rows = [self.pool.get(page, empty) for page in pages] + [empty] * (
            -len(pages) % BLOCK_PAGES
        )
        return list(np.array(rows, np.int32).reshape(-1, BLOCK_PAGES, self.page_size))


def few_shapes(role: Role, limits: Limits, kernels: str = "cpu") -> Shapes:
    """Of an engine that is to compile little: two sizes of a step, or one."""
    shapes = Shapes.for_role(role, limits, kernels)
    few = {shapes.fitting(limits.max_batch, limits.max_batch), shapes.largest}
    return Shapes(role, tuple(sorted(few)))


async def serve(
    engines: Sequence[JaxEngine],
    requests: Sequence[Request],
    colocated: bool = False,
    transport: LocalTransport | None = None,
    again: Sequence[Request] = (),
) -> dict[str, list[Token]]:
    """Serves all requests at once through workers, transport and router; their tokens by id.

    engines: a prefill and a decode engine, or colocated ones. again: served after the others.
    """
    config = replace(CONFIG, colocated=colocated)
    if colocated:
        config = replace(config, prefill=replace(config.prefill, instances=len(engines)))
    cost = CostModel.from_profile(PROFILE)
    router = Router(asyncio.get_running_loop(), len(requests), cost)
    transport = transport or LocalTransport()
    workers = build_workers(config, engines, cost, transport, router.emit)
    router.connect(workers)
    for worker in workers:
        worker.start()

    async def read(stream):
        return [output.token async for output in stream]

    answers = []
    for some in (requests, again):
        streams = [router.submit(each) for each in some]
        answers += await asyncio.wait_for(asyncio.gather(*map(read, streams)), 200)
    await assert_nothing_held(workers, transport)
    transport.close()
    every = (*requests, *again)
    return {each.id: answer for each, answer in zip(every, answers, strict=True)}


async def assert_nothing_held(workers: Sequence[Worker], transport: LocalTransport) -> None:
    """Stops the workers and looks at the books."""
    for worker in workers:
        await asyncio.to_thread(worker.stop)
        ledger = worker.instance
        ledger.check()
        assert ledger.pages.num_free == ledger.limits.num_pages
        assert not any((ledger.waiting, ledger.running, ledger.parked))
        assert not worker.moves.holds_tickets
    assert transport.num_offers == 0


@dataclass
class Harness:
    """A server on loopback whose engines are fakes: those that prefill before those that decode."""

    config: ServerConfig
    server: Server
    router: Router
    metrics: Metrics
    transport: LocalTransport
    workers: list[Worker]
    engines: list[FakeEngine]
    stub: kairos_pb2_grpc.KairosStub
    channel: grpc.aio.Channel

    async def generate(
        self, prompt: Sequence[int], max_tokens: int, **fields
    ) -> list[pb.GenerateResponse]:
        request = ask(prompt, max_tokens, **fields)
        return [response async for response in self.stub.Generate(request, timeout=30)]

    async def stream(self, prompt: Sequence[int], max_tokens: int, **fields):
        """An open call, an iterator over its answers, and the first of them."""
        call = self.stub.Generate(ask(prompt, max_tokens, **fields), timeout=30)
        answers = aiter(call)
        return call, answers, await anext(answers)

    async def cancelled(self, prompt: Sequence[int]) -> None:
        """A request whose client goes away after its first token, before it has another."""
        decode = self.engines[-1]
        decode.gate.clear()
        call, _, _ = await self.stream(prompt, 60)
        call.cancel()
        await asyncio.wait_for(self.router.drained(), 30)
        decode.gate.set()

    async def assert_nothing_held(self) -> None:
        """Waits for the last request to end, stops the workers and looks at the books."""
        await asyncio.wait_for(self.router.drained(), 30)
        await assert_nothing_held(self.workers, self.transport)


def ask(prompt: Sequence[int], max_tokens: int, **fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        max_tokens=max_tokens,
        sampling=pb.Sampling(temperature=0, ignore_eos=True),
        **fields,
    )


@contextlib.asynccontextmanager
async def running(
    config: ServerConfig = CONFIG,
    journal: Journal | None = None,
    tokenizer: Tokenizer | None = None,
    http: HttpOptions | None = None,
    trusts_templates: bool = False,
) -> AsyncIterator[Harness]:
    """A server that is up; it ends with the block."""
    cost = CostModel.from_profile(PROFILE)
    metrics = Metrics()
    router = Router(asyncio.get_running_loop(), config.max_requests, cost, observers=[metrics])
    metrics.watch(router)
    transport = LocalTransport()
    engines = fake_engines(config)
    workers = build_workers(config, engines, cost, transport, router.emit, journal)
    router.connect(workers)
    metrics.watch_workers(workers)
    server = Server("127.0.0.1", 0, time.monotonic, http=http)
    await server.start()
    for worker in workers:
        worker.start()
    validator = Validator("fake", VOCAB, frozenset({0}), config, tokenizer, trusts_templates)
    await server.open(Backend(validator, router, metrics, pb.Model(name="fake", vocab_size=VOCAB)))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = kairos_pb2_grpc.KairosStub(channel)
        try:
            yield Harness(
                config, server, router, metrics, transport, workers, engines, stub, channel
            )
        finally:
            for engine in engines:
                engine.gate.set()
            await server.drain(0)
            for worker in workers:
                await asyncio.to_thread(worker.stop)
            transport.close()


def served_as(config: ServerConfig):
    """Runs an async test against a server of its own, which it is given."""

    def decorate(test):
        def run(*args, **kwargs):
            async def main():
                async with running(config) as harness:
                    await test(harness, *args, **kwargs)

            asyncio.run(main())

        return run

    return decorate


def ids(responses: Sequence[pb.GenerateResponse]) -> list[int]:
    return [id for response in responses for id in response.token_ids]


async def serve_right(config: ServerConfig, num_requests: int = 40) -> Harness:
    """Serves many requests at once and checks every token. Returns the server, which has ended."""
    rng = random.Random(1)
    requests = [
        (
            # 33: a whole chunk and one token more.
            [rng.randrange(VOCAB) for _ in range(rng.choice([1, 8, 9, 33, 50, 100]))],
            rng.choice([1, 2, 17, 28]),
        )
        for _ in range(num_requests)
    ]
    async with running(config) as harness:
        answers = await asyncio.gather(*(harness.generate(*request) for request in requests))
        for (prompt, count), answer in zip(requests, answers, strict=True):
            assert ids(answer) == expected_tokens(prompt, count)
            assert answer[-1].finish_reason == pb.FINISH_REASON_LENGTH
            assert answer[-1].usage.completion_tokens == count
        await harness.assert_nothing_held()
    return harness


def fake_engines(config: ServerConfig) -> list[FakeEngine]:
    """One for each role of a config."""
    return [FakeEngine(config.limits(role)) for role in config.roles]


def altered(config: ServerConfig = CONFIG, **values) -> ServerConfig:
    """A config with other values; those of a part are named as PART__KEY."""
    for name, value in values.items():
        part, _, key = name.rpartition("__")
        if part:
            value = replace(getattr(config, part), **{key: value})
        config = replace(config, **{part or key: value})
    return config
