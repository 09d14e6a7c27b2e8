"""Faults that a cluster of processes must outlive: each is done to one, and what it cost measured.

Every scenario leaves the cluster as it found it: two workers of each role, idle.
"""

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from clients import Answer, Ask, Load, check_ok, some_asks, stub_of
from processes import Cluster, Process

from kairos_jax.rpc import kairos_pb2_grpc

GRACE_S = 0.5

# Room for long streams; `tiny_config` is for short ones.
ARGUMENTS = (
    "--config.max_context=1024",
    "--config.max_tokens=960",
    "--config.max_requests=256",
    f"--grace_s={GRACE_S}",
)
OF_WORKERS = (
    "--config.prefill.kv_tokens=8192",
    "--config.prefill.parked_tokens=16384",
    "--config.prefill.max_chunk=64",
    "--config.decode.kv_tokens=16384",
    "--config.decode.max_batch=16",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One fault, and what it cost. hit: requests that the process had when it was hit. None: does
    not apply. detection_s: until the router knew. recovery_s: until each client had its next token,
    or its error.
    """

    fault: str
    hit: int
    detection_s: float | None
    recovery_s: float
    tokens_lost: int
    pages_leaked: int
    freed_s: float | None = None
    note: str = ""


class Faults:
    """A cluster and a client of its router."""

    def __init__(self, cluster: Cluster, stub: kairos_pb2_grpc.KairosStub):
        self.cluster, self.stub = cluster, stub
        self._expected: dict[Ask, list[int]] = {}

    def load(self, asks: Sequence[Ask], timeout_s: float = 100) -> Load:
        return Load(self.stub, asks, timeout_s)

    async def expect(self, asks: Sequence[Ask]) -> None:
        """Learns the right answers, from a run that nothing disturbs."""
        asks = [ask for ask in dict.fromkeys(asks) if ask not in self._expected]
        for ask, answer in zip(asks, await self.load(asks).done(), strict=True):
            check_ok(answer)
            self._expected[ask] = answer.tokens

    def num_wrong(self, asks: Sequence[Ask], answers: Sequence[Answer]) -> int:
        """Tokens lost, doubled or changed. Raises RuntimeError for a call that failed."""
        for answer in answers:
            check_ok(answer)
        pairs = zip(asks, answers, strict=True)
        return sum(answer.num_wrong(self._expected[ask]) for ask, answer in pairs)

    # Of the cluster.

    async def lost_at(self, worker: Process, since: float) -> float:
        """When the router said that it lost a worker."""
        words = f"{worker.binary} worker at {worker.address}"
        return await asyncio.to_thread(self.cluster.router.said, words, since)

    async def whole(self, worker: Process) -> int:
        """Replaces a worker that has ended. Returns the pages that the others miss then."""
        await asyncio.to_thread(self.cluster.replace, worker)
        return await self.cluster.settled()

    # A worker that decodes.

    async def decode_killed(self) -> Row:
        """Amid its streams, half of which are greedy and half sampled."""
        return await self._decode_hit("decode: kill -9 in mid-stream", signal.SIGKILL)

    async def decode_hangs(self) -> Row:
        """Amid its streams, by SIGSTOP; it wakes when all is over."""
        return await self._decode_hit("decode: SIGSTOP in mid-stream", signal.SIGSTOP)

    async def _decode_hit(self, fault: str, sign: int) -> Row:
        asks = some_asks(16, (5, 60), (500, 600))
        await self.expect(asks)
        victim, load = self.cluster.workers["decode"][0], self.load(asks)
        await load.until(lambda answers: all(len(each.tokens) >= 100 for each in answers))
        hit = (await asyncio.to_thread(victim.state))["requests"]
        at = victim.send(sign)
        try:
            lost_at = await self.lost_at(victim, at)
            answers = await load.done()
        finally:
            if sign == signal.SIGSTOP:
                victim.send(signal.SIGCONT)
        recovered = max(each.next_after(lost_at) for each in answers)
        wrong = self.num_wrong(asks, answers)
        if sign == signal.SIGSTOP:
            leaked = await self.cluster.settled()
        else:
            leaked = await self.whole(victim)
        return Row(fault, hit, lost_at - at, recovered - at, wrong, leaked)

    async def decode_killed_at_first(self) -> Row:
        """As the first request of a burst has its first token, and is about to be claimed."""
        return await self._decode_killed_in_burst(1)

    async def decode_killed_at_tenth(self) -> Row:
        """As ten of a burst have: some decode, some are being fetched, some wait."""
        return await self._decode_killed_in_burst(10)

    async def decode_killed_full(self) -> Row:
        """As all of a burst have, more than a batch holds."""
        return await self._decode_killed_in_burst(48)

    async def _fullest(self, role: str) -> tuple[Process, dict[str, int]]:
        """The worker with the most requests, and what it holds; waits until one has any."""
        while True:
            workers = self.cluster.workers[role]
            states = [await asyncio.to_thread(each.state) for each in workers]
            victim, had = max(
                zip(workers, states, strict=True), key=lambda pair: pair[1]["requests"]
            )
            if had["requests"]:
                return victim, had

    async def _decode_killed_in_burst(self, num_first: int) -> Row:
        asks = some_asks(48, (100, 300), (60, 90))
        await self.expect(asks)
        load = self.load(asks)
        await load.until(lambda answers: sum(bool(each.tokens) for each in answers) >= num_first)
        victim, had = await self._fullest("decode")
        at = victim.send(signal.SIGKILL)
        lost_at = await self.lost_at(victim, at)
        answers = await load.done()
        begun = [each for each in answers if each.times[0] <= at]
        recovered = max(each.next_after(lost_at) for each in begun)
        wrong = self.num_wrong(asks, answers)
        leaked = await self.whole(victim)
        note = ", ".join(f"{had[name]} {name}" for name in ("waiting", "fetches", "running"))
        fault = f"decode: kill -9 at token 1 of request {num_first}"
        return Row(
            fault, had["requests"], lost_at - at, recovered - at, wrong, leaked, None, f"had {note}"
        )

    async def decode_drains(self) -> Row:
        """SIGTERM amid streams that outlast --grace_s: they go on at the other."""
        asks = some_asks(16, (5, 60), (800, 900))
        await self.expect(asks)
        victim, load = self.cluster.workers["decode"][0], self.load(asks)
        await load.until(lambda answers: all(len(each.tokens) >= 20 for each in answers))
        hit = (await asyncio.to_thread(victim.state))["requests"]
        at = victim.send(signal.SIGTERM)
        code = await asyncio.to_thread(victim.wait)
        took_s, answers = time.monotonic() - at, await load.done()
        wrong = self.num_wrong(asks, answers)
        leaked = await self.whole(victim)
        note = f"exit {code} after {took_s:.2f} s, --grace_s={GRACE_S:g}"
        gap_s = _longest_gap(answers, at)
        return Row("decode: SIGTERM in mid-stream", hit, None, gap_s, wrong, leaked, None, note)

    # A worker that prefills.

    async def prefill_killed(self) -> Row:
        """With a queue."""
        return await self._prefill_hit("prefill: kill -9 with a queue", signal.SIGKILL)

    async def prefill_hangs(self) -> Row:
        """With a queue, by SIGSTOP; it wakes when all is over."""
        return await self._prefill_hit("prefill: SIGSTOP with a queue", signal.SIGSTOP)

    async def prefill_drains(self) -> Row:
        """SIGTERM with a queue, which goes to the other."""
        return await self._prefill_hit("prefill: SIGTERM with a queue", signal.SIGTERM)

    async def _prefill_hit(self, fault: str, sign: int) -> Row:
        asks = some_asks(48, (600, 900), (4, 8))
        await self.expect(asks)
        victim, load = self.cluster.workers["prefill"][0], self.load(asks)
        await load.until(lambda answers: sum(bool(each.tokens) for each in answers) >= 4)
        hit = (await asyncio.to_thread(victim.state))["requests"]
        at, note = victim.send(sign), ""
        if sign == signal.SIGTERM:
            code = await asyncio.to_thread(victim.wait)
            note = f"exit {code} after {time.monotonic() - at:.2f} s; "
        try:
            detection_s = None
            if sign != signal.SIGTERM:
                detection_s = await self.lost_at(victim, at) - at
            answers = await load.done()
        finally:
            if sign == signal.SIGSTOP:
                victim.send(signal.SIGCONT)
        first = max(each.times[0] for each in answers)
        wrong = self.num_wrong(asks, answers)
        if sign == signal.SIGSTOP:
            leaked = await self.cluster.settled()
        else:
            leaked = await self.whole(victim)
        note += "recovery: till the last first token of the whole queue"
        return Row(fault, hit, detection_s, first - at, wrong, leaked, None, note)

    # A router, or a client.

    async def router_killed(self) -> Row:
        """A second one beside the first, with requests in every stage."""
        asks = some_asks(24, (5, 900), (700, 900), most=960)
        second = await asyncio.to_thread(self.cluster.start_router)
        try:
            async with stub_of(second) as stub:
                await self.cluster.settled(num_routers=2)
                load = Load(stub, asks, 100)
                await load.until(lambda got: sum(len(each.tokens) > 20 for each in got) >= 12)
                hit = sum(each.code is None for each in load.answers)
                at = second.send(signal.SIGKILL)
                leaked = await self.cluster.settled(num_routers=1)
                freed_s = time.monotonic() - at
                answers = await load.done()
        finally:
            second.end()
        codes = {each.code for each in answers} - {grpc.StatusCode.OK}
        if codes != {grpc.StatusCode.UNAVAILABLE}:
            raise RuntimeError(f"clients of a router that was killed got {codes}")
        told_s = max(each.ended_at for each in answers) - at
        return Row("router: kill -9", hit, None, told_s, 0, leaked, freed_s, "UNAVAILABLE")

    async def clients_cancel(self) -> Row:
        """All at once, with requests in every stage."""
        return await self._clients_leave("client: cancel", grpc.StatusCode.CANCELLED, 100)

    async def deadlines_pass(self) -> Row:
        """All at once, with requests in every stage."""
        return await self._clients_leave("client: deadline", grpc.StatusCode.DEADLINE_EXCEEDED, 0.7)

    async def _clients_leave(self, fault: str, code: grpc.StatusCode, timeout_s: float) -> Row:
        asks, begun = some_asks(24, (5, 900), (700, 900), most=960), time.monotonic()
        load = self.load(asks, timeout_s)
        if code is grpc.StatusCode.CANCELLED:
            await load.until(lambda got: sum(len(each.tokens) > 20 for each in got) >= 12)
            at = time.monotonic()
            load.cancel()
        else:
            at = begun + timeout_s
            await load.done()
        leaked = await self.cluster.settled()
        freed_s, answers = time.monotonic() - at, await load.done()
        hit = [each for each in answers if each.code is not grpc.StatusCode.OK]
        if any(each.code is not code for each in hit):
            raise RuntimeError(f"{fault}: {[(each.code, each.details) for each in hit]}")
        told_s = max(each.ended_at for each in hit) - at
        return Row(fault, len(hit), None, told_s, 0, leaked, freed_s)


Scenario = Callable[[Faults], Coroutine[Any, Any, Row]]
SCENARIOS: tuple[Scenario, ...] = (
    Faults.decode_killed,
    Faults.decode_killed_at_first,
    Faults.decode_killed_at_tenth,
    Faults.decode_killed_full,
    Faults.decode_hangs,
    Faults.decode_drains,
    Faults.prefill_killed,
    Faults.prefill_hangs,
    Faults.prefill_drains,
    Faults.router_killed,
    Faults.clients_cancel,
    Faults.deadlines_pass,
)


async def run(cluster: Cluster, scenario: Scenario) -> Row:
    """One scenario, on a cluster that is whole and idle."""
    async with stub_of(cluster.router) as stub:
        await cluster.settled()
        return await scenario(Faults(cluster, stub))


def _longest_gap(answers: Sequence[Answer], since: float) -> float:
    gaps = [
        after - before
        for answer in answers
        for before, after in zip(answer.times, answer.times[1:], strict=False)
        if after > since
    ]
    return max(gaps, default=0.0)
