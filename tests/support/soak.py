"""Thousands of short requests with random cancels, while workers are killed and replaced; and what
the processes that lived through it hold before and after.
"""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc
from clients import Answer, Ask, some_asks, stub_of
from processes import Cluster, Process
from scenarios import Faults

_OK, _CANCELLED = grpc.StatusCode.OK, grpc.StatusCode.CANCELLED


@dataclass(slots=True)
class Soak:
    """wrong: tokens lost, doubled or changed. ended: how calls that were not cancelled ended, where
    not well. figures: of each process that lived through it, before, between and after.
    """

    num_requests: int
    num_cancelled: int = 0
    num_killed: int = 0
    tokens_wrong: int = 0
    took_s: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)
    figures: dict[str, list[dict[str, int]]] = field(default_factory=dict)

    def grown(self, name: str) -> int:
        """The most by which a figure of a process has grown."""
        return max(of[-1].get(name, 0) - of[0].get(name, 0) for of in self.figures.values())


async def soak(
    cluster: Cluster, num_requests: int = 10_000, num_warm: int = 1000, in_flight: int = 64
) -> Soak:
    """Kills a decode worker at a quarter, a prefill worker at half and the decode worker again at
    three quarters; the other two and the router live through it.

    num_warm: requests before, of the same kind, so that what is made once is not taken for a leak.
    """
    result, asks = Soak(num_requests), some_asks(64, (5, 60), (2, 8))
    async with stub_of(cluster.router) as stub:
        client = Faults(cluster, stub)
        await client.expect(asks)
        await _run(client, asks, Soak(num_warm), in_flight, [])
        await _note(cluster, result)
        begun = time.monotonic()
        half = num_requests // 2
        for kills in (["decode", "prefill"], ["decode"]):
            await _run(client, asks, result, in_flight, kills, half)
            await _note(cluster, result)
        result.took_s = time.monotonic() - begun
    return result


async def _note(cluster: Cluster, result: Soak) -> None:
    """Figures of all that is never killed, once they are idle."""
    await cluster.settled()
    living = {role: of[-1] for role, of in cluster.workers.items()} | {"router": cluster.router}
    for name, process in living.items():
        held = process.state() if process is not cluster.router else {}
        result.figures.setdefault(name, []).append(held | process.resources())


async def _run(
    client: Faults,
    asks: list[Ask],
    result: Soak,
    in_flight: int,
    kills: list[str],
    count: int | None = None,
) -> None:
    """So many clients, each with one request after the other; each kill is due when as many more
    requests have been sent.
    """
    count = count or result.num_requests
    left, rng = iter(range(count)), random.Random(count + len(kills))
    due = {count * at // (len(kills) + 1): role for at, role in enumerate(kills, 1)}
    killing: list[asyncio.Task[None]] = []

    async def one_after_the_other() -> None:
        for index in left:
            if role := due.get(index):
                victim = client.cluster.workers[role][0]
                killing.append(asyncio.ensure_future(_kill(client.cluster, victim, result)))
            await _one(client, rng.choice(asks), rng, result)

    await asyncio.gather(*(one_after_the_other() for _ in range(in_flight)))
    await asyncio.gather(*killing)


async def _kill(cluster: Cluster, victim: Process, result: Soak) -> None:
    victim.send(signal.SIGKILL)
    result.num_killed += 1
    await asyncio.to_thread(cluster.replace, victim)


async def _one(client: Faults, ask: Ask, rng: random.Random, result: Soak) -> None:
    """One request; one of ten is cancelled after some of its tokens, or none."""
    leaves_at = rng.randrange(ask.max_tokens) if rng.random() < 0.1 else None
    load = client.load([ask])
    if leaves_at is not None:
        await load.until(lambda got: len(got[0].tokens) >= leaves_at or got[0].code is not None)
        load.cancel()
        result.num_cancelled += 1
    (answer,) = await load.done()
    for wrong in _errors(answer, leaves_at is not None):
        result.failed[wrong] += 1
        return
    if answer.code is _OK:
        result.tokens_wrong += client.num_wrong([ask], [answer])


def _errors(answer: Answer, may_be_cancelled: bool) -> Iterator[str]:
    if answer.code is not _OK and not (may_be_cancelled and answer.code is _CANCELLED):
        yield f"{answer.code}: {answer.details}"
