"""A fake engine whose KV is the token ids, and a whole server around two of them."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import grpc

from kairos_jax.config import DecodeConfig, PrefillConfig, ServerConfig, SloConfig
from kairos_jax.edge import Edge
from kairos_jax.engine import Engine, JaxEngine, Token
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.rpc import kairos_pb2_grpc
from kairos_jax.service import Backend, Server
from kairos_jax.streams import Router
from kairos_jax.transfer import LocalTransport
from kairos_jax.worker import Worker
from schedulers import decode, prefill
from schedulers.core import Instance, Limits, Request, Role
from schedulers.cost import CostModel

VOCAB = 97
PROFILE = {
    "prefill": {"base_s": 1e-4, "per_token_s": 1e-6, "per_token_sq_s": 0.0},
    "decode": {"base_s": 1e-4, "per_seq_s": 1e-6, "per_context_token_s": 0.0},
    "transfer": {"base_s": 1e-4, "per_token_s": 1e-6},
    "kv_capacity_tokens": 4096,
}
CONFIG = ServerConfig(
    model="fake",
    dtype="float32",
    attention="cpu",
    max_context=128,
    max_tokens=64,
    max_requests=64,
    page_size=8,
    prefill=PrefillConfig(
        devices=1, policy="kairos_plus", kv_tokens=512, max_chunk=32, row_tokens=8
    ),
    decode=DecodeConfig(devices=1, policy="kairos_plus", kv_tokens=1024, max_batch=8),
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


class FakeEngine:
    """Keeps token ids where an engine keeps KV, and samples from what it finds there.

    gate: steps wait for it. fail: the next step raises it.
    """

    wire_sharding = None
    num_compiled = 0

    def __init__(self, limits: Limits):
        self.limits, self.page_size = limits, limits.page_size
        self.pool: dict[int, list[int | None]] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.fail: BaseException | None = None
        self.num_steps = 0

    def step(self, work):
        assert self.gate.wait(30)
        if self.fail:
            raise self.fail
        self.num_steps += 1
        tokens = {}
        for seq, count in work:
            for position in range(seq.computed, seq.computed + count):
                page = self.pool.setdefault(
                    seq.pages[position // self.page_size], [None] * self.page_size
                )
                (page[position % self.page_size],) = seq.token_ids(position, position + 1)
            if seq.computed + count == seq.length:
                slots = [id for page in seq.pages for id in self.pool.get(page, [])]
                context = slots[: seq.length]
                assert None not in context, "the KV of a token is missing"
                id = next_token(context)  # type: ignore[arg-type]
                tokens[seq.request.id] = Token(id, -0.5, ((id, -0.5),))
        return tokens

    def read_pages(self, pages):
        return [list(self.pool[page]) for page in pages]

    def write_pages(self, pages, kv):
        self.pool |= {page: list(slots) for page, slots in zip(pages, kv, strict=True)}


def workers(
    engines: Sequence[Engine],
    limits: Sequence[Limits],
    transport: LocalTransport,
    router: Router,
    prefill_policy="kairos_plus",
    decode_policy="kairos_plus",
) -> list[Worker]:
    """A prefill and a decode worker, connected to the router and not yet started."""
    cost = CostModel.from_profile(PROFILE)
    policies = prefill.POLICIES[prefill_policy](cost), decode.POLICIES[decode_policy](cost)
    made = [
        Worker(Instance(role.value, role, limit), policy, engine, transport, router.emit)
        for role, limit, policy, engine in zip(
            (Role.PREFILL, Role.DECODE), limits, policies, engines, strict=True
        )
    ]
    router.connect(*made)
    return made


async def serve(
    prefill_engine: JaxEngine, decode_engine: JaxEngine, requests: Sequence[Request]
) -> dict[str, list[Token]]:
    """Serves all requests at once through workers, transport and router; their tokens by id."""
    router, transport = Router(asyncio.get_running_loop(), len(requests)), LocalTransport()
    engines = prefill_engine, decode_engine
    both = workers(engines, [engine.limits for engine in engines], transport, router)
    for worker in both:
        worker.start()

    async def read(stream):
        return [output.token async for output in stream]

    streams = [router.submit(each) for each in requests]
    answers = await asyncio.wait_for(asyncio.gather(*map(read, streams)), 200)
    for worker in both:
        await asyncio.to_thread(worker.stop)
        ledger = worker.instance
        ledger.check()
        assert ledger.pages.num_free == ledger.limits.num_pages
    transport.close()
    assert transport.num_offers == 0
    return {each.id: answer for each, answer in zip(requests, answers, strict=True)}


@dataclass
class Harness:
    """A server on loopback whose engines are fakes."""

    config: ServerConfig
    server: Server
    router: Router
    transport: LocalTransport
    prefill: Worker
    decode: Worker
    engines: tuple[FakeEngine, FakeEngine]
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

    async def assert_nothing_held(self) -> None:
        """Stops the workers and looks at the books."""
        await asyncio.wait_for(self.router.drained(), 30)
        for worker in (self.prefill, self.decode):
            await asyncio.to_thread(worker.stop)
            ledger = worker.instance
            ledger.check()
            assert ledger.pages.num_free == ledger.limits.num_pages
            assert not any((ledger.waiting, ledger.running, ledger.parked))
        assert self.transport.num_offers == 0


def ask(prompt: Sequence[int], max_tokens: int, **fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        max_tokens=max_tokens,
        sampling=pb.Sampling(temperature=0, ignore_eos=True),
        **fields,
    )


@contextlib.asynccontextmanager
async def running(
    prefill_policy="kairos_plus", decode_policy="kairos_plus", **overrides
) -> AsyncIterator[Harness]:
    config = replace(CONFIG, **overrides)
    router = Router(asyncio.get_running_loop(), config.max_requests)
    transport = LocalTransport()
    limits = config.limits(config.prefill), config.limits(config.decode)
    engines = FakeEngine(limits[0]), FakeEngine(limits[1])
    both = workers(engines, limits, transport, router, prefill_policy, decode_policy)
    server = Server("127.0.0.1", 0, time.monotonic)
    await server.start()
    for worker in both:
        worker.start()
    edge = Edge("fake", VOCAB, frozenset({0}), config, None)
    await server.open(Backend(edge, router, pb.Model(name="fake", vocab_size=VOCAB)))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = kairos_pb2_grpc.KairosStub(channel)
        try:
            yield Harness(config, server, router, transport, *both, engines, stub, channel)
        finally:
            for engine in engines:
                engine.gate.set()
            await server.drain(0)
            for worker in both:
                await asyncio.to_thread(worker.stop)
            transport.close()
