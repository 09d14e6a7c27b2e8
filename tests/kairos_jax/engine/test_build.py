"""Several instances, colocated ones, and KV that is evicted and comes back, with fake engines."""

import asyncio
import threading
from dataclasses import replace
from types import SimpleNamespace

import fakes
import pytest

from kairos_jax.engine.build import choose_kernels
from kairos_jax.process.command import UsageError
from kairos_jax.routing.peer import Peer
from kairos_jax.worker.build import build_policy
from kairos_jax.worker.messages import Handover, Submit
from schedulers.cost import CostModel
from schedulers.ledger.instance import Instance, Role
from schedulers.ledger.journal import Journal, check
from schedulers.ledger.request import Request, Slo
from schedulers.policies import decode, prefill
from schedulers.policies.routing import outline

TWO_AND_TWO = fakes.altered(prefill__instances=2, decode__instances=2)
COLOCATED = fakes.altered(colocated=True)
# 16 pages of 8 tokens, the least for a context of 128: three long outputs do not fit at once.
LIMITS = fakes.CONFIG.limits(Role.PREFILL)
SCARCE = fakes.altered(decode__kv_tokens=128)


def test_two_prefill_and_two_decode_instances_share_the_work():
    harness = asyncio.run(fakes.serve_right(TWO_AND_TWO, 60))
    assert all(engine.num_steps for engine in harness.engines)


@pytest.mark.parametrize("prefill_policy", prefill.POLICIES)
@pytest.mark.parametrize("decode_policy", decode.POLICIES)
def test_a_colocated_instance_gives_every_token(prefill_policy, decode_policy):
    config = fakes.altered(COLOCATED, prefill__policy=prefill_policy, decode__policy=decode_policy)
    harness = asyncio.run(fakes.serve_right(config))
    assert len(harness.engines) == 1


def test_two_colocated_instances_share_the_work():
    harness = asyncio.run(fakes.serve_right(fakes.altered(COLOCATED, prefill__instances=2), 60))
    assert all(engine.num_steps for engine in harness.engines)


@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("decode_policy", decode.POLICIES)
def test_evicted_requests_come_back_with_every_token(decode_policy, colocated):
    """Five that would each fill more than a third of the pool."""
    config = fakes.altered(SCARCE, decode__policy=decode_policy, colocated=colocated)

    async def main():
        async with fakes.running(config) as harness:
            prompts = [[i] * 10 for i in range(5)]
            answers = await asyncio.gather(*(harness.generate(p, 60) for p in prompts))
            for prompt, answer in zip(prompts, answers, strict=True):
                assert fakes.ids(answer) == fakes.expected_tokens(prompt, 60)
            await harness.assert_nothing_held()
            assert harness.engines[-1].num_reads, "nothing was evicted"

    asyncio.run(main())


def test_a_peer_counts_what_its_summary_does_not_know_yet():
    cost = CostModel.from_profile(fakes.PROFILE)
    idle, sent = outline(Instance("p", Role.PREFILL, LIMITS), cost, 0.0), []
    peer, slo = Peer("p", Role.PREFILL, sent.append, cost, idle), Slo(30.0, 30.0)
    for index in range(3):
        peer.submit(Submit(Request(str(index), 0.0, [1] * 20, 5, slo)), 0.0)
    one_s = cost.prefill_s(20)
    assert peer.summary.work_s(0.0) == pytest.approx(3 * one_s)
    assert len(sent) == 3
    peer.update(replace(idle, free_at=6.0), num_received=2)
    assert peer.summary.work_s(5.0) == pytest.approx(1.0 + one_s)
    assert peer.summary.work_s(5.4) == pytest.approx(0.6 + one_s), "less of the step is left"
    peer.update(idle, num_received=3)
    assert peer.summary.work_s(9.0) == 0.0


@pytest.mark.parametrize("late", [False, True])
def test_a_peer_counts_no_load_for_a_request_that_missed_its_ttft(late):
    cost = CostModel.from_profile(fakes.PROFILE)
    idle, sent = outline(Instance("d", Role.DECODE, LIMITS), cost, 0.0), []
    peer = Peer("d", Role.DECODE, sent.append, cost, idle)
    request = Request("a", 0.0, [1] * 20, 5, Slo(30.0, 30.0))
    peer.hand_over(Handover(request, (7,), 31.0 if late else 29.0, None))
    summary = peer.summary
    assert (summary.load == 0.0) == late
    assert summary.room == idle.room - 21


class HeldFetches:
    """Holds every fetch back from the first eviction on, until they are let go."""

    def __init__(self, harness):
        self.engine, self.transport = harness.engines[-1], harness.transport
        self.fetch, self.transport.fetch = self.transport.fetch, self._hold
        self.held, self.any_held = [], threading.Event()

    def _hold(self, *args):
        if not self.engine.num_reads:
            self.fetch(*args)
            return
        self.held.append(args)
        self.any_held.set()

    def let_go(self):
        self.transport.fetch = self.fetch
        for args in self.held:
            self.fetch(*args)


@pytest.mark.parametrize("moment", ["under way", "arriving"])
def test_cancelled_while_its_kv_is_elsewhere_nothing_stays(moment):
    async def main():
        async with fakes.running(SCARCE) as harness:
            fetches = HeldFetches(harness)
            calls = [harness.stub.Generate(fakes.ask([i] * 10, 60), timeout=30) for i in range(5)]
            readers = [asyncio.ensure_future(read(call)) for call in calls]
            assert await asyncio.to_thread(fetches.any_held.wait, 30)
            if moment == "arriving":
                fetches.let_go()
            for call in calls:
                call.cancel()
            await asyncio.wait_for(harness.router.drained(), 30)
            if moment == "under way":
                fetches.let_go()
            await asyncio.gather(*readers, return_exceptions=True)
            answer = await harness.generate([3, 1, 4], 9)
            assert fakes.ids(answer) == fakes.expected_tokens([3, 1, 4], 9)
            await harness.assert_nothing_held()

    asyncio.run(main())


async def read(call):
    return [response async for response in call]


def test_after_a_fetch_that_fails_the_prompt_is_prefilled_again():
    async def main():
        async with fakes.running(SCARCE) as harness:
            fetches = HeldFetches(harness)
            asked = [asyncio.ensure_future(harness.generate([i] * 10, 60)) for i in range(5)]
            assert await asyncio.to_thread(fetches.any_held.wait, 30)
            ticket, *_ = fetches.held[0]
            harness.transport.release(ticket)
            fetches.let_go()
            for index, answer in enumerate(await asyncio.gather(*asked)):
                assert fakes.ids(answer) == fakes.expected_tokens([index] * 10, 60)
            await harness.assert_nothing_held()

    asyncio.run(main())


@pytest.mark.parametrize("config", [SCARCE, TWO_AND_TWO, COLOCATED])
def test_every_live_decision_replays_equal(config):
    journal = Journal(fakes.time.monotonic)

    async def main():
        async with fakes.running(config, journal) as harness:
            await asyncio.gather(*(harness.generate([i] * 10, 60) for i in range(5)))
            await harness.assert_nothing_held()

    asyncio.run(main())
    cost = CostModel.from_profile(fakes.PROFILE)
    roles = {"prefill": Role.PREFILL, "decode": Role.DECODE, "colocated": Role.BOTH}
    policies = {
        f"{name}-{index}": build_policy(config, role, cost)
        for name, role in roles.items()
        for index in range(2)
    }
    assert check(journal.take(), policies) >= 60, "a decision a token, of each output at least"


def test_the_platform_chooses_the_kernels_unless_the_config_does():
    def chosen(kernels, platform, count, capability="8.0"):
        device = SimpleNamespace(
            platform=platform, compute_capability=capability, device_kind="A100"
        )
        devices = [device] * count
        return choose_kernels(fakes.altered(kernels=kernels), devices)

    assert chosen("auto", "gpu", 1) == chosen("auto", "gpu", 8) == "gpu"
    assert chosen("auto", "gpu", 1, "9.0") == chosen("gpu_hopper", "gpu", 1, "9.0") == "gpu_hopper"
    assert chosen("gpu", "gpu", 1, "9.0") == "gpu"
    with pytest.raises(
        UsageError, match=r"gpu_hopper needs GPUs of compute capability 9\.0, got A"
    ):
        chosen("gpu_hopper", "gpu", 1)
    assert chosen("auto", "tpu", 4) == "tpu"
    assert chosen("auto", "cpu", 2) == "cpu"
    assert chosen("reference", "gpu", 1) == "reference"
    with pytest.raises(UsageError, match="kernels=tpu needs devices of tpu, got gpu"):
        chosen("tpu", "gpu", 1)
    with pytest.raises(UsageError, match="kernels=gpu needs devices of gpu, got cpu"):
        chosen("gpu", "cpu", 1)
