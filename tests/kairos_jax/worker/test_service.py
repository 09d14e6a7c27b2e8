"""What a worker's service tells which router, and whom it drops."""

import asyncio
import contextlib
from dataclasses import replace

import fakes
import grpc
import pytest

from kairos_jax.engine.calls import Token
from kairos_jax.kv.transport import Ticket
from kairos_jax.net.well_formed import EOF
from kairos_jax.rpc import internal_pb2 as pb
from kairos_jax.rpc import internal_pb2_grpc
from kairos_jax.worker import codec
from kairos_jax.worker.codec import Sender
from kairos_jax.worker.messages import (
    Cancel,
    Died,
    Draining,
    Failed,
    Handover,
    Lost,
    Moved,
    Offered,
    Outlined,
    Output,
    Prefetch,
    Recall,
    Release,
    Returned,
    Stepped,
    Submit,
    Welcome,
)
from kairos_jax.worker.service import WorkerService
from kairos_jax.worker.tally import Steps
from schedulers.cost import CostModel
from schedulers.ledger.instance import Batch, Instance, Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies.routing import outline

LIMITS = fakes.CONFIG.limits(Role.BOTH)
COST = CostModel.from_profile(fakes.PROFILE)
WELCOME = Welcome("w", "1", Role.BOTH, "m", "f", "float32", LIMITS, fakes.PROFILE)


class Mute:
    """A worker that says only what the test says."""

    def __init__(self):
        self.instance, self.ran = Instance("w", Role.BOTH, LIMITS), Steps()
        self.got, self.more = [], asyncio.Event()

    def outline(self, instance, now):
        return outline(instance, COST, now)

    def post(self, message):
        self.got.append(message)
        self.more.set()

    async def until(self, count):
        """The first so many messages that came."""
        async with asyncio.timeout(30):
            while len(self.got) < count:
                self.more.clear()
                await self.more.wait()
        return self.got[:count]


class Caller:
    """A router's end of a call."""

    def __init__(self, stub, name):
        self.name, self._call = name, stub.Attach()

    async def attach(self):
        """Hello, Welcome and the first outline."""
        await self.send(pb.ToWorker(hello=pb.Hello(router=self.name, version=codec.VERSION)))
        assert codec.decode(await self.read(), Sender()) == WELCOME
        return await self.hear()

    async def send(self, sent):
        await self._call.write(sent)

    async def say(self, *messages):
        for message in messages:
            await self.send(codec.encode(message, 0.0))

    async def read(self):
        return await asyncio.wait_for(self._call.read(), 30)

    async def hear(self):
        return codec.decode(await self.read(), Sender(0.0, "w", Role.BOTH))

    async def ended(self):
        """The code with which it was ended."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await self.read() is not EOF:
                pass
        return await self._call.code(), await self._call.details()

    def leave(self):
        self._call.cancel()


def attached(**options):
    """Runs an async test with a service, the worker behind it, and what makes a caller."""

    def decorate(test):
        def run():
            async def main():
                service = WorkerService(asyncio.get_running_loop(), **options)
                worker = Mute()
                service.open(worker, WELCOME)  # type: ignore[arg-type]
                server = grpc.aio.server()
                internal_pb2_grpc.add_WorkerServicer_to_server(service, server)
                port = server.add_insecure_port("127.0.0.1:0")
                await server.start()
                try:
                    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                        stub = internal_pb2_grpc.WorkerStub(channel)
                        await test(service, worker, lambda name="r": Caller(stub, name))
                finally:
                    await server.stop(None)

            asyncio.run(asyncio.wait_for(main(), 60))

        return run

    return decorate


def submit(id, length=3):
    return Submit(Request(id, 0.0, [1] * length, 5, Slo(1, 1)))


def handover(id):
    return Handover(submit(id).request, (7,), 0.0, Ticket(id, 3))


def ahead(id):
    return Prefetch(Ticket(id, 3), submit(id).request.prompt)


def output(id, **fields):
    return Output(id, Token(1), 0.0, 0.0, **fields)


def stepped(event):
    assert isinstance(event, Stepped)
    return [each.id for each in event.outputs]


@attached()
async def test_each_router_is_told_of_its_own_requests(service, worker, call):
    one, two = call("1"), call("2")
    await one.attach()
    await two.attach()
    await one.say(submit("a"), submit("b"))
    await worker.until(2)
    await two.say(handover("c"))
    assert [m.request.id for m in await worker.until(3)] == ["a", "b", "c"]
    service.emit(Stepped((output("a"), output("c"), output("b", finish_reason="stop"))))
    assert stepped(await one.hear()) == ["a", "b"]
    assert stepped(await two.hear()) == ["c"]
    service.emit(Moved("c", 0.0))
    service.emit(Lost("c", OSError("far")))
    service.emit(Failed("a", "not_finite", "NaN"))
    assert isinstance(await two.hear(), Moved)
    assert isinstance(await two.hear(), Lost)
    assert await one.hear() == Failed("a", "not_finite", "NaN")
    assert service.num_requests == 0
    service.emit(Stepped((output("a"),)))  # nobody's any more
    service.emit(Draining("w"))
    assert await one.hear() == Draining("w")
    assert await two.hear() == Draining("w")
    service.emit(Died("w", RuntimeError("hot")))
    assert isinstance(await one.hear(), Died)
    assert isinstance(await two.hear(), Died)
    assert service.died.done()


@attached()
async def test_an_outline_counts_each_routers_own_requests(service, worker, call):
    one, two = call("1"), call("2")
    await one.attach()
    await two.attach()
    await one.say(submit("a"))
    await worker.until(1)
    await two.say(submit("b"), submit("c"))
    await worker.until(3)
    await one.say(submit("d"))
    await worker.until(4)
    summary = worker.outline(worker.instance, 0.0)
    for received, of_one, of_two in ((0, 0, 0), (2, 1, 1), (3, 1, 2), (4, 2, 2)):
        service.emit(Outlined("w", summary, received))
        for caller, expected in ((one, of_one), (two, of_two)):
            event = await caller.hear()
            assert isinstance(event, Outlined)
            assert event.num_received == expected
    late = replace(worker.outline(worker.instance, 0.0), num_late=3, late=("c", "a", "x"))
    service.emit(Outlined("w", late, 4))
    for caller, expected in ((one, ("a",)), (two, ("c",))):
        event = await caller.hear()
        assert isinstance(event, Outlined)
        assert event.summary.late == expected, "each is told of its own"
        assert event.summary.num_late == 3
    service.emit(Outlined("w", summary, 4))
    late = call("3")
    event = await late.attach()
    assert isinstance(event, Outlined)
    assert event.num_received == 0, "the last outline, of which none is its own"


@attached()
async def test_a_prefetch_comes_before_its_handover_or_is_left_behind(service, worker, call):
    one = call()
    await one.attach()
    await one.say(ahead("a"), handover("a"), ahead("b"))
    await worker.until(3)
    assert service.num_requests == 2
    summary = worker.outline(worker.instance, 0.0)
    service.emit(Outlined("w", summary, 1))
    event = await one.hear()
    assert isinstance(event, Outlined)
    assert event.num_received == 1
    service.emit(Offered("a", Ticket("a", 3, 1)))
    assert await one.hear() == Offered("a", Ticket("a", 3, 1))
    one.leave()
    assert (await worker.until(5))[3:] == [Cancel("a"), Cancel("b")]


@attached()
async def test_what_a_router_leaves_behind_is_cancelled(service, worker, call):
    one, two = call("1"), call("2")
    await one.attach()
    await two.attach()
    await one.say(submit("a"), submit("b"), submit("c"), Release("a"), Cancel("b"))
    await worker.until(5)
    await two.say(submit("d"), Cancel("c"), Release("e"))  # of which two are not its own
    await worker.until(6)
    service.emit(Stepped((output("c"),)))
    await one.hear()
    one.leave()
    got = await worker.until(7)
    assert got[3:] == [Release("a"), Cancel("b"), submit_of("d", got), Cancel("c")]
    assert service.num_requests == 1
    assert service.num_routers == 1


def submit_of(id, got):
    return next(m for m in got if isinstance(m, Submit) and m.request.id == id)


@attached()
async def test_a_router_recalls_only_its_own_requests(service, worker, call):
    one, two = call("1"), call("2")
    await one.attach()
    await two.attach()
    await one.say(submit("a"))
    await worker.until(1)
    await two.say(Recall("a", "not its own"), submit("b"))
    await worker.until(2)
    await one.say(Recall("a", "its own"))
    assert (await worker.until(3))[1:] == [submit_of("b", worker.got), Recall("a", "its own")]


@attached(max_behind=20)
async def test_a_router_that_does_not_read_is_dropped(service, worker, call):
    slow, other = call("slow"), call("other")
    await slow.attach()
    await other.attach()
    await slow.say(submit("a"))
    await worker.until(1)
    big = Stepped(tuple(output("a", ticket=Ticket("a" * 10_000, 1)) for _ in range(10)))
    while service.num_routers == 2:
        service.emit(big)
        await asyncio.sleep(0)
    assert (await worker.until(2))[1] == Cancel("a")
    service.emit(Draining("w"))
    assert await other.hear() == Draining("w")
    code, details = await slow.ended()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details == "the router has read too slowly: it is 20 events behind"


@attached(hang_s=0.1)
async def test_a_router_that_is_silent_is_dropped(service, worker, call):
    silent = call()
    await silent.attach()
    await silent.say(submit("a"))
    code, _ = await silent.ended()
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await worker.until(2))[1] == Cancel("a")


@attached(stuck_s=5.0)
async def test_a_ping_is_answered_while_the_step_loop_goes_on(service, worker, call):
    caller = call()
    await caller.attach()
    ping = pb.ToWorker(ping=pb.Ping())
    await caller.send(ping)
    assert (await caller.read()).HasField("pong")
    now, ledger = service.clock(), worker.instance
    ledger.add(submit("a").request)
    batch = Batch({"a": 3}, predicted_s=1.0)
    ledger.begin(batch, now)
    for later, answered in ((5.9, True), (6.1, False)):
        service.clock = lambda later=later: now + later
        await caller.send(ping)
        await caller.say(submit(f"{later}"))
        await worker.until(1 if answered else 2)
        if answered:
            assert list((await caller.read()).pong.status.begun) == ["a"]
    service.clock = lambda: now
    ledger.end(batch, now)
    await caller.send(ping)
    assert (await caller.read()).HasField("pong"), "and none for the one before"


@attached()
async def test_what_would_end_the_step_loop_ends_the_call_instead(service, worker, call):
    for bad, why in (
        (submit("a"), "request id 'a' is in use here"),
        (submit("b", 200), "must be at most 128 tokens, got 205"),
    ):
        caller = call()
        await caller.attach()
        await caller.say(submit("a"), bad)
        code, details = await caller.ended()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert why in details
    assert [type(m) for m in worker.got] == [Submit, Cancel] * 2


@attached()
async def test_strangers_are_sent_away(service, worker, call):
    for first, code, why in (
        (pb.ToWorker(ping=pb.Ping()), grpc.StatusCode.FAILED_PRECONDITION, "must be a Hello"),
        (
            pb.ToWorker(hello=pb.Hello(version=99)),
            grpc.StatusCode.FAILED_PRECONDITION,
            "its protocol has version 99 and works with 99 or newer",
        ),
        (
            pb.ToWorker(hello=pb.Hello(version=codec.OLDEST - 1)),
            grpc.StatusCode.FAILED_PRECONDITION,
            f"this process has {codec.VERSION} and works with {codec.OLDEST} or newer",
        ),
    ):
        caller = call()
        await caller.send(first)
        assert (await caller.ended())[0] is code
        assert why in (await caller.ended())[1]
    service.drain()
    caller = call()
    await caller.send(pb.ToWorker(hello=pb.Hello(version=codec.VERSION)))
    assert await caller.ended() == (grpc.StatusCode.UNAVAILABLE, "the worker is draining")


@attached()
async def test_a_call_that_is_closed_has_told_all_before(service, worker, call):
    caller = call()
    await caller.attach()
    await caller.say(submit("a"))
    await worker.until(1)
    for _ in range(50):
        service.emit(Stepped((output("a"),)))
    service.emit(Returned("a"))
    await asyncio.wait_for(service.drained(), 30)
    service.close()
    for _ in range(50):
        assert stepped(await caller.hear()) == ["a"]
    assert await caller.hear() == Returned("a")
    assert (await caller.ended())[0] is grpc.StatusCode.OK


@attached()
async def test_a_router_of_a_newer_version_that_still_works_with_this_one_is_taken(
    service, worker, call
):
    caller = call()
    newer = pb.Hello(router="r", version=codec.VERSION + 5, oldest=codec.VERSION)
    await caller.send(pb.ToWorker(hello=newer))
    assert (await caller.read()).HasField("welcome")


@pytest.mark.parametrize(
    ("role", "message", "why"),
    [
        (Role.DECODE, submit("a"), "a Submit is not for a worker whose role is 'decode'"),
        (Role.PREFILL, handover("a"), "a Handover is not for a worker whose role is 'prefill'"),
        (Role.PREFILL, ahead("a"), "a Prefetch is not for a worker whose role is 'prefill'"),
        (
            Role.DECODE,
            replace(handover("a"), tokens=()),
            "request 'a': a Handover must have at least 1 token",
        ),
    ],
)
def test_what_is_not_for_a_workers_role_ends_the_call_and_not_the_worker(role, message, why):
    @attached()
    async def run(service, worker, call):
        service._welcome = replace(WELCOME, role=role)
        caller = call()
        await caller.send(pb.ToWorker(hello=pb.Hello(router="r", version=codec.VERSION)))
        await caller.read(), await caller.read()
        await caller.say(message)
        code, details = await caller.ended()
        assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, why)
        assert not worker.got

    run()
