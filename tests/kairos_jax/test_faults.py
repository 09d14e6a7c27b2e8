"""A cluster of processes outlives what befalls any of them: kill -9, SIGSTOP, SIGTERM, cancels."""

import asyncio
import signal

import processes
import pytest
import rolling
import scenarios
import soak
from clients import some_asks, stub_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# What a heartbeat (0.25 s), a step and a busy machine may take.
FREED_S = 1.0
# Longer than workers wait for a router, 10 s.
STOPPED_S = 15.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two workers of each role. A scenario that fails may leave it broken, for those after it."""
    cache = tmp_path_factory.mktemp("cache")
    with processes.cluster(
        cache, 2, 2, *scenarios.ARGUMENTS, of_workers=scenarios.OF_WORKERS
    ) as started:
        yield started


@pytest.mark.parametrize("scenario", scenarios.SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_nothing_is_lost(cluster, scenario):
    row = asyncio.run(scenarios.run(cluster, scenario))
    print(row)
    assert row.hit > 0
    assert row.tokens_lost == 0
    assert row.pages_leaked == 0
    if row.detection_s is not None:
        # A worker that hangs is found within --hang_s, 1 s, and a quarter of it for the look; one
        # that died, by its connection. The rest is for a busy machine.
        assert row.detection_s < (2.5 if "SIGSTOP" in row.fault else 1.0)
    if row.freed_s is not None:
        assert row.freed_s < FREED_S
    if row.fault.startswith("decode"):
        assert row.recovery_s < (row.detection_s or 0.0) + 3.0, "with the prefill of what it had"
    if "exit" in row.note:
        assert row.note.startswith("exit 0")


def test_streams_go_on_after_their_router_was_stopped(cluster):
    async def main():
        async with stub_of(cluster.router) as stub:
            faults, asks = scenarios.Faults(cluster, stub), some_asks(16, (5, 60), (500, 600))
            await faults.expect(asks)
            load = faults.load(asks)
            await load.until(lambda answers: all(len(each.tokens) >= 100 for each in answers))
            cluster.router.send(signal.SIGSTOP)
            try:
                await asyncio.sleep(STOPPED_S)
            finally:
                cluster.router.send(signal.SIGCONT)
            assert faults.num_wrong(asks, await load.done()) == 0
        assert await cluster.settled() == 0

    asyncio.run(main())


def test_a_rolling_restart_by_readiness_fails_no_request(cluster):
    result = asyncio.run(rolling.rolling_restart(cluster))
    print(result)
    roles = ("prefill", "prefill", "decode", "decode", "router")
    assert result.restarted == [(role, 0) for role in roles]
    assert result.num_requests > 100
    assert not result.failed
    assert result.tokens_wrong == 0


def test_nothing_is_left_after_cancels_and_kills(cluster):
    result = asyncio.run(soak.soak(cluster, num_requests=2000))
    print(result)
    assert not result.failed
    assert result.num_killed == 3
    assert result.tokens_wrong == 0
    for name in ("offers", "fetches", "requests", "waiting", "running", "parked"):
        assert result.grown(name) == 0
    for figures in result.figures.values():
        before, _, after = figures
        assert after.get("pages_free") == before.get("pages")
    assert result.grown("threads") <= 2
    # A worker connects to another when it first takes KV from it: four sockets and a channel. There
    # are two of the other role. What is kept of the dead is counted in kv/test_processes.py.
    assert result.grown("fds") <= 2 * 5
    assert result.grown("rss_mib") <= 64
