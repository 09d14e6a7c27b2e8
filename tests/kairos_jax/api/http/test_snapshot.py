"""What a snapshot for the live page tells."""

import asyncio
import json

import cluster
import fakes
import pytest

from kairos_jax.api.backend import Backend
from kairos_jax.api.gate import Gate
from kairos_jax.api.http import snapshot as snapshots
from kairos_jax.api.http.live import Live
from kairos_jax.api.http.snapshot import MAX_INSTANCES, MAX_NAME, MAX_ROWS, snapshot
from kairos_jax.api.validator import Validator
from kairos_jax.engine.engine import Token
from kairos_jax.kv.transport import LocalTransport
from kairos_jax.observe.metrics import Metrics
from kairos_jax.observe.recent import RecentCounts
from kairos_jax.routing.router import Router
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.worker.build import build_workers
from kairos_jax.worker.messages import Output
from schedulers.cost import CostModel
from schedulers.ledger.request import Request, Slo

NOW = 1000.0


def run(main):
    asyncio.run(asyncio.wait_for(main(), 60))


def at_rest(max_requests=4000, config=fakes.CONFIG):
    """What answers requests, with workers that have not been started."""
    cost, loop = CostModel.from_profile(fakes.PROFILE), asyncio.get_running_loop()
    router = Router(loop, max_requests, cost, lambda: NOW)
    workers = build_workers(config, fakes.fake_engines(config), cost, LocalTransport(), router.emit)
    router.connect(workers)
    validator = Validator("fake", fakes.VOCAB, frozenset({0}), config, None)
    return Backend(validator, router, Metrics(), pb.Model()), workers


def asked(ttft=2.0, tpot=0.1, name="", arrival=NOW, length=10):
    return Request(name, arrival, [1] * length, 50, Slo(ttft, tpot))


def has_tokens(stream, times):
    """Books a token at each of these times."""
    for at in times:
        stream.put(Output(stream.request.id, Token(1), NOW - 5.0, at))


def test_of_a_thousand_queued_the_most_urgent_are_told_and_the_rest_counted():
    async def main():
        backend, _ = at_rest()
        # One in ten can no longer make it; the others are due one after another.
        for index in range(1000):
            ttft = 0.001 if index % 10 == 0 else 0.05 * (1000 - index)
            backend.router.submit(asked(ttft, name=f"request-{index}", arrival=NOW - 0.01))
        told = snapshot(backend, NOW)
        queued = told["queued"]
        assert (queued["count"], queued["late"], queued["begun"]) == (1000, 100, 0)
        assert (sum(queued["counts"]), queued["counts"][0]) == (1000, 100)
        assert len(queued["counts"]) == len(queued["bounds"]) + 1
        names = [row["name"] for row in queued["rows"]]
        assert names[:3] == ["request-999", "request-998", "request-997"]
        assert len(names) == MAX_ROWS
        first = queued["rows"][0]
        assert first["waited_s"] == pytest.approx(0.01)
        assert first["due_s"] == pytest.approx(0.04)
        prefill_s = backend.router.fleet.cost.prefill_s(10)
        assert first["laxity_s"] == pytest.approx(0.04 - prefill_s, abs=1e-4)
        assert first["at"] == "prefill-0"
        assert len(json.dumps(told, allow_nan=False)) < 10_000

    run(main)


def test_whoever_is_computed_comes_first_and_the_hopeless_last():
    async def main():
        backend, (prefill, _) = at_rest()
        for name, ttft in (("late", 0.0001), ("soon", 1.0), ("begun", 9.0)):
            stream = backend.router.submit(asked(ttft, name=name, arrival=NOW - 0.01))
        ledger = prefill.instance
        ledger.add(stream.request)
        ledger.begin(prefill.policy(ledger, NOW), NOW)
        rows = snapshot(backend, NOW)["queued"]["rows"]
        states = [(row["name"], row["state"]) for row in rows]
        assert states == [("begun", "prefill"), ("soon", "queued"), ("late", "queued")]

    run(main)


def test_running_ones_are_told_by_slack():
    async def main():
        backend, _ = at_rest()
        ahead, behind = (backend.router.submit(asked(name=name)) for name in ("ahead", "behind"))
        has_tokens(ahead, [NOW - 0.1, NOW - 0.05, NOW])  # the next is due at -0.1 + 3 * 0.1
        has_tokens(behind, [NOW - 0.5, NOW - 0.3])  # the next was due at -0.5 + 2 * 0.1
        running = snapshot(backend, NOW)["running"]
        assert (running["count"], running["late"], sum(running["counts"])) == (2, 1, 2)
        first, second = running["rows"]
        assert (first["name"], second["name"]) == ("behind", "ahead")
        assert first["slack_s"] == pytest.approx(-0.3)
        assert second["slack_s"] == pytest.approx(0.2)
        assert (first["tokens"], first["max_tokens"]) == (2, 50)
        assert first["tpot_s"] == pytest.approx(0.2)
        assert (first["queue_s"], first["prefill_s"]) == pytest.approx((-5.0, 4.5))

    run(main)


def test_instances_tell_of_their_pools_and_steps(monkeypatch):
    async def main():
        backend, (prefill, decode) = at_rest()
        stream = backend.router.submit(asked(length=20))
        ledger = prefill.instance
        ledger.add(stream.request)
        ledger.begin(prefill.policy(ledger, NOW), NOW)
        decode.ran.add(0.03, 0.02, 4)
        told = snapshot(backend, NOW)
        one, other = told["instances"]
        assert (one["id"], one["role"], one["taking"]) == ("prefill-0", "prefill", True)
        assert (one["status"]["used_pages"], one["status"]["num_pages"]) == (3, 512 / 8)
        assert one["status"]["parked_limit"] == 4096
        assert other["status"] == {
            "waiting": 0,
            "running": 0,
            "parked": 0,
            "used_pages": 0,
            "num_pages": 1024 / 8,
            "parked_tokens": 0,
            "parked_limit": None,
            "steps": 1,
            "measured_s": 0.03,
            "predicted_s": 0.02,
            "sequences": 4,
        }
        monkeypatch.setattr(snapshots, "MAX_INSTANCES", 1)
        told = snapshot(backend, NOW)
        assert (len(told["instances"]), told["num_instances"]) == (1, 2)

    assert MAX_INSTANCES > 1
    run(main)


def test_slos_without_end_leave_it_valid_json():
    def refuse(constant):
        raise AssertionError(constant)

    async def main():
        backend, _ = at_rest()
        live = Live(Gate(lambda: NOW, backend, None))
        waits, runs = (backend.router.submit(asked(1.7e308, 1.7e308)) for _ in range(2))
        has_tokens(runs, [NOW, NOW])
        frame = live._frame().removeprefix(b"data: ")
        told = json.loads(frame, parse_constant=refuse)
        assert told["running"]["rows"][0]["slack_s"] is None
        assert told["queued"]["rows"][0]["laxity_s"] == 1.7e308
        assert waits.request.slo.ttft == 1.7e308

    run(main)


def test_long_names_are_cut():
    async def main():
        backend, _ = at_rest()
        backend.router.submit(asked(name="x" * 256))
        (row,) = snapshot(backend, NOW)["queued"]["rows"]
        assert row["name"] == "x" * MAX_NAME

    run(main)


def test_workers_in_other_processes_are_told_of_too():
    async def main():
        async with cluster.running() as (_, front, _):
            while not all(peer.look() for peer in front.router.peers):
                await asyncio.sleep(0)
            validator = Validator("fake", fakes.VOCAB, frozenset(), fakes.CONFIG, None)
            backend = Backend(validator, front.router, Metrics(), pb.Model())
            told = snapshot(backend, front.router.clock())
            pools = {each["role"]: each["status"]["num_pages"] for each in told["instances"]}
            assert pools == {"prefill": 512 / 8, "decode": 1024 / 8}
            assert not any("@" in each["id"] for each in told["instances"])

    run(main)


def test_the_last_minutes_are_counted_by_slots():
    recent = RecentCounts(2, slot_s=5.0, num_slots=3)
    for now, counts in ((1.0, (1, 0)), (6.0, (1, 1)), (9.0, (1, True)), (16.0, (1, 0))):
        recent.add(now, counts)
    assert recent.slots(16.0) == [[2, 2], [0, 0], [1, 0]]
    assert recent.slots(22.0) == [[0, 0], [1, 0], [0, 0]]
    assert recent.slots(99.0) == [[0, 0]] * 3


@fakes.served_as(fakes.CONFIG)
async def test_who_kept_their_slo_is_told(harness):
    for tpot in (30.0, 1e-4):
        await harness.generate([1, 2, 3], 4, slo=pb.Slo(ttft_s=30.0, tpot_s=tpot))
    slots = snapshot(harness.server.gate.backend, harness.router.clock())["judged"]["slots"]
    assert [sum(column) for column in zip(*slots, strict=True)] == [2, 2, 1, 1]
