"""Serves a workload on live engines in this process: open loop, in real time, without a network."""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from kairos_jax.config import ServerConfig
from kairos_jax.engine.calls import Token
from kairos_jax.engine.engine import KV, Engine
from kairos_jax.kv.transport import LocalTransport
from kairos_jax.process.progress import Progress
from kairos_jax.routing.fleet import Full, WorkerLost
from kairos_jax.routing.router import Router
from kairos_jax.routing.stream import RequestFailed
from kairos_jax.worker.build import build_workers
from models.sampling import INVALID, SamplingParams
from schedulers.cost import CostModel
from schedulers.ledger.instance import Instance
from schedulers.ledger.request import Request, Seq, Slo
from schedulers.simulation.attainment import Outcome
from schedulers.simulation.workload import Arrival

# What a step under way is given to end in, once no request is left.
_STOP_TIMEOUT_S = 5.0


class InstanceDied(Exception):
    """An instance failed while it served; the message says which and how."""


class Served(NamedTuple):
    """outcomes: of the requests, in their order; times are seconds since `start`, which is on the
    clock of the ledgers, time.monotonic.
    """

    outcomes: list[Outcome]
    start: float


@dataclass(frozen=True, slots=True)
class Live:
    """What serves. prepare: given the ledgers before anything happens to them."""

    config: ServerConfig
    engines: Sequence[Engine]
    cost: CostModel
    vocab_size: int
    prepare: Callable[[Sequence[Instance]], object] = lambda instances: None


def serve(
    live: Live, arrivals: Sequence[Arrival], slos: Sequence[Slo], seed: int, progress: Progress
) -> Served:
    """Serves a workload on fresh ledgers, and returns when all of its requests have ended.

    Prompts are random token ids. As in a simulation, all requests ask for as many tokens as the
    longest output, so that no policy can tell from it how long an output will be.

    Raises InstanceDied.
    """
    return asyncio.run(_serve(live, _requests(live, arrivals, slos, seed), progress))


class EndingEngine:
    """An engine that ends outputs where the workload says: the n-th token of a request that stops
    at `_end_after(n)` is that one. No vocabulary has it.
    """

    def __init__(self, engine: Engine):
        self.engine, self.limits = engine, engine.limits
        self.wire_sharding, self.copy_s = engine.wire_sharding, engine.copy_s

    def start(self, work: Sequence[tuple[Seq, int]]) -> Callable[[], dict[str, Token]]:
        """See `Engine.start`."""
        wait = self.engine.start(work)
        # Now: by the time that the result is there, the ledger may be a step ahead.
        ends = [(seq, _end_after(seq.num_tokens + 1)) for seq, _ in work]

        def ended() -> dict[str, Token]:
            tokens = wait()
            for seq, end in ends:
                if end in seq.request.stop and seq.request.id in tokens:
                    tokens[seq.request.id] = Token(end)
            return tokens

        return ended

    def read_pages(self, pages: Sequence[int]) -> KV:
        """See `Engine.read_pages`."""
        return self.engine.read_pages(pages)

    def write_pages(self, pages: Sequence[int], kv: KV) -> None:
        """See `Engine.write_pages`."""
        self.engine.write_pages(pages, kv)

    def wait(self) -> None:
        """See `Engine.wait`."""
        self.engine.wait()


def _end_after(num_tokens: int) -> int:
    """The stop token of an output of so many; its own inverse."""
    return INVALID - num_tokens


def _requests(
    live: Live, arrivals: Sequence[Arrival], slos: Sequence[Slo], seed: int
) -> list[Request]:
    """Their times are relative to the start. Greedy."""
    rng = np.random.default_rng(seed)
    longest = max((arrival.num_output for arrival in arrivals), default=1)
    return [
        Request(
            "",
            arrival.at,
            rng.integers(live.vocab_size, size=arrival.num_prompt).tolist(),
            min(longest, live.config.max_context - arrival.num_prompt),
            slo,
            stop=frozenset({_end_after(arrival.num_output)}),
            sampling=SamplingParams(),
        )
        for arrival, slo in zip(arrivals, slos, strict=True)
    ]


async def _serve(live: Live, requests: Sequence[Request], progress: Progress) -> Served:
    router = Router(asyncio.get_running_loop(), live.config.max_requests, live.cost)
    transport = LocalTransport()
    engines = [EndingEngine(engine) for engine in live.engines]
    workers = build_workers(live.config, engines, live.cost, transport, router.emit)
    live.prepare([worker.instance for worker in workers])
    router.connect(workers)
    for worker in workers:
        worker.start()
    try:
        start = time.monotonic()
        outcomes = await _send(router, requests, start, progress)
    finally:
        for worker in workers:
            await asyncio.to_thread(worker.stop, _STOP_TIMEOUT_S)
        transport.close()
    if router.died.done():
        died = router.died.result()
        raise InstanceDied(f"instance {died.instance} failed: {died.error}")
    return Served(outcomes, start)


async def _send(
    router: Router, requests: Sequence[Request], start: float, progress: Progress
) -> list[Outcome]:
    """Submits each request at its time, however many are in progress."""
    ended = itertools.count(1)
    progress("requests", 0, len(requests))

    async def run(request: Request) -> Outcome:
        await asyncio.sleep(start + request.arrival - time.monotonic())
        times: list[float] = []
        ok = False
        try:
            stream = router.submit(replace(request, arrival=start + request.arrival))
            async for output in stream:
                times.append(output.at - start)
            ok = True
        except (Full, WorkerLost, RequestFailed):
            pass  # counts as a failed request; the worker's log or the router says why
        progress("requests", next(ended), len(requests))
        return _outcome(request, times, ok)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(request)) for request in requests]
    return [task.result() for task in tasks]


def _outcome(request: Request, times: Sequence[float], ok: bool) -> Outcome:
    slo, (num_asked,) = request.slo, map(_end_after, request.stop)
    if not times:
        return Outcome(slo, request.arrival, ok=False, num_asked=num_asked)
    return Outcome(
        slo,
        request.arrival,
        first_token_at=times[0],
        last_token_at=times[-1],
        num_output=len(times),
        ok=ok,
        late_s=max(at - times[0] - k * slo.tpot for k, at in enumerate(times)),
        num_asked=num_asked,
    )
