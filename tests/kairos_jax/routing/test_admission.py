"""Who is turned away, and when it is told to come back: by prediction, and where KV is stuck."""

import asyncio
import math

import fakes
import pytest
from costs import decodes, prefills

from kairos_jax.kv.transport import LocalTransport
from kairos_jax.routing.fleet import LEAST_RETRY_S, Full
from kairos_jax.routing.peer import Peer
from kairos_jax.routing.router import Router
from kairos_jax.worker.build import build_worker
from kairos_jax.worker.messages import Moved, Outlined
from schedulers.cost import CostModel, TransferCost
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies.routing import Summary

# A prompt takes 1 s a token.
COST = CostModel(prefills(0, 1, 0), decodes(1, 0, 0), TransferCost(0, 0), 1000)


def asked(length, ttft=100.0):
    return Request("", 0.0, [1] * length, 5, Slo(ttft, 2.0))


def peer(id, role=Role.PREFILL, **known):
    values = {"free_at": 0.0, "deadline": [], "ahead_s": [], "pace": 1.0, "load": 0.0, "room": 100}
    return Peer(id, role, lambda message: None, COST, Summary(id, role, **values | known))


async def router_of(*peers, max_requests=10, **kwargs):
    loop = asyncio.get_running_loop()
    router = Router(loop, max_requests, COST, lambda: 0.0, **kwargs)
    for each in peers:
        router.join(each)
    return router


def refused(router, request):
    with pytest.raises(Full) as error:
        router.submit(request)
    return error.value


def test_predicted_turns_away_what_is_late_everywhere():
    async def main():
        prefill = [peer("p0", free_at=20.0), peer("p1", deadline=[5.0], ahead_s=[10.0])]
        router = await router_of(*prefill, peer("d", Role.DECODE), admission="predicted")
        router.submit(asked(5, ttft=15.0))  # p1 has it in time, by nothing to spare
        error = refused(router, asked(5, ttft=16.0))
        assert error.retry_after_s == 4.0, "behind the first: 20 s, and it should be 16"
        assert "4 s later than slo.ttft_s allows, 16 s" in str(error)
        router.submit(asked(5, ttft=20.0))
        router.submit(asked(5, ttft=2e4))
        assert router.num_streams == 3

    asyncio.run(main())


def test_by_default_what_is_late_everywhere_is_taken():
    async def main():
        router = await router_of(peer("p0", free_at=20.0), peer("d", Role.DECODE))
        router.submit(asked(5, ttft=1.0))

    asyncio.run(main())


def test_a_draining_instance_promises_nothing():
    async def main():
        first, second = peer("p0"), peer("p1", free_at=20.0)
        router = await router_of(first, second, peer("d", Role.DECODE), admission="predicted")
        first.draining = True
        assert refused(router, asked(5, ttft=15.0)).retry_after_s == 10.0

    asyncio.run(main())


def test_what_cannot_be_parked_goes_elsewhere_or_nowhere():
    async def main():
        stuck, free = peer("p0", parked_room=7.0), peer("p1", free_at=50.0)
        router = await router_of(stuck, free, peer("d", Role.DECODE, end_s=3.0))
        assert router.submit(asked(5)).peers == [free]
        router.leave("p1")
        refused(router, asked(8))
        # The one that was taken over from p1 has its place there too.
        error = refused(router, asked(3))
        assert "holds all the KV for decode that it may" in str(error)
        assert error.retry_after_s == 5.0
        router.submit(asked(2))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("busy_s", "end_s", "retry_s"),
    [(0.0, math.inf, LEAST_RETRY_S), (2.0, math.inf, 2.0), (2.0, 7.0, 7.0), (9.0, 7.0, 9.0)],
)
def test_the_hint_of_a_full_server_is_what_ends_first(busy_s, end_s, retry_s):
    async def main():
        prefill, decode = peer("p0", free_at=busy_s), peer("d", Role.DECODE, end_s=end_s)
        later = peer("p1", free_at=99.0), peer("e", Role.DECODE, end_s=99.0)
        router = await router_of(prefill, decode, *later, max_requests=0)
        if math.isinf(end_s):
            router.leave("e")
        assert refused(router, asked(5)).retry_after_s == retry_s

    asyncio.run(main())


def test_a_server_whose_decode_is_stuck_turns_away_and_takes_again():
    """Decode holds one prompt's KV, two are parked, two wait; the sixth is turned away."""
    config = fakes.altered(decode__kv_tokens=128, prefill__parked_tokens=128)
    cost = CostModel.from_profile(fakes.PROFILE)

    async def main():
        loop, transport = asyncio.get_running_loop(), LocalTransport()
        router, outlined, moved = Router(loop, 64, cost), asyncio.Event(), asyncio.Event()

        def emit(event):
            router.emit(event)
            if isinstance(event, Moved):
                loop.call_soon_threadsafe(moved.set)
            if isinstance(event, Outlined) and event.summary.parked_room < math.inf:
                loop.call_soon_threadsafe(outlined.set)

        engines = fakes.fake_engines(config)
        workers = [
            build_worker(config, role, role.value, engine, cost, transport, emit)
            for role, engine in zip(config.roles, engines, strict=True)
        ]
        router.connect(workers)
        engines[1].gate.clear()
        for worker in workers:
            worker.start()
        prompts, streams, firsts = [[i] * 57 for i in range(7)], [], []
        for prompt in prompts[:3]:
            streams.append(router.submit(asked_of_real(prompt)))
            firsts.append(await anext(aiter(streams[-1])))
            # Else the KV of two might come before decode's first step, and both would fit.
            await moved.wait()
        outlined.clear()  # it may have been stuck for a moment before
        streams.append(router.submit(asked_of_real(prompts[3])))
        await outlined.wait()
        streams.append(router.submit(asked_of_real(prompts[4])))
        assert refused(router, asked_of_real(prompts[5])).retry_after_s >= LEAST_RETRY_S
        engines[1].gate.set()
        for index, stream in enumerate(streams):
            head = [firsts[index].token.id] if index < 3 else []
            rest = [output.token.id async for output in stream]
            assert head + rest == fakes.expected_tokens(prompts[index], 5)
        stream = router.submit(asked_of_real(prompts[6]))
        tokens = [output.token.id async for output in stream]
        assert tokens == fakes.expected_tokens(prompts[6], 5)
        await fakes.assert_nothing_held(workers, transport)
        transport.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def asked_of_real(prompt):
    return Request("", fakes.time.monotonic(), prompt, 5, Slo(30.0, 30.0))
