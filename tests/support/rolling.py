"""A rolling restart: every process of a cluster is replaced by readiness alone, amid requests."""

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc
from clients import Load, some_asks, stub_of
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import Cluster, Process
from scenarios import Faults

# As in deploy/: a router lets its requests end, while workers hand theirs on.
_GRACE_OF_ROUTER = "--grace_s=60"


@dataclass(slots=True)
class Restart:
    """restarted: the processes, in order, with their exit codes. failed: how requests ended, where
    not well. tokens_wrong: lost, doubled or changed.
    """

    num_requests: int = 0
    tokens_wrong: int = 0
    took_s: float = 0.0
    restarted: list[tuple[str, int]] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)


async def rolling_restart(cluster: Cluster, in_flight: int = 24) -> Restart:
    """Replaces each worker, and then a router. The next one goes as soon as the last one's health
    is SERVING. `cluster.router` stays, without requests.

    in_flight: clients, each with one request after the other.
    """
    result, asks = Restart(), some_asks(32, (5, 60), (20, 60))
    async with contextlib.AsyncExitStack() as stack:

        async def router() -> tuple[Process, Faults]:
            process = await asyncio.to_thread(cluster.start_router, _GRACE_OF_ROUTER)
            stack.callback(process.end)
            await _serving(process)
            return process, Faults(cluster, await stack.enter_async_context(stub_of(process)))

        first, front = await router()
        await front.expect(asks)
        expected, going = front, True
        reached = asyncio.Condition()
        sent: dict[int, Faults] = {}  # by client: where its request is on the way to

        async def one_after_the_other(number: int) -> None:
            rng = random.Random(number)
            while going:
                ask = rng.choice(asks)
                load, sent[number] = Load(front.stub, [ask], 100), front
                await load.until(lambda answers: bool(answers[0].tokens or answers[0].code))
                async with reached:
                    del sent[number]
                    reached.notify_all()
                (answer,) = await load.done()
                result.num_requests += 1
                if answer.code is grpc.StatusCode.OK:
                    result.tokens_wrong += expected.num_wrong([ask], [answer])
                else:
                    result.failed[f"{answer.code}: {answer.details}"] += 1

        begun = time.monotonic()
        clients = asyncio.gather(*map(one_after_the_other, range(in_flight)))
        try:
            for worker in cluster.all_workers:
                await _end(worker, result)
                await _serving(await asyncio.to_thread(cluster.replace, worker))
            # The second takes all new requests, as behind a load balancer. The first ends once what
            # was on its way there has arrived, for which deploy/ gives it time by a `preStop`.
            before, (_, front) = front, await router()
            async with reached:
                await reached.wait_for(lambda: before not in sent.values())
            await _end(first, result)
        finally:
            going = False
            await clients
        result.took_s = time.monotonic() - begun
    return result


async def _end(process: Process, result: Restart) -> None:
    process.send(signal.SIGTERM)
    result.restarted.append((process.binary, await asyncio.to_thread(process.wait)))


async def _serving(process: Process) -> None:
    """Returns when its health says so, which is all that an orchestrator goes by."""
    async with grpc.aio.insecure_channel(process.address) as channel, asyncio.timeout(60):
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        async for said in watched:
            if said.status == health_pb2.HealthCheckResponse.SERVING:
                return
