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
from kairos_jax.api.http.snapshot import (
    MAX_INSTANCES,
    MAX_LOST,
    MAX_NAME,
    MAX_ROWS,
    snapshot,
)
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
        lost = [row["name"] for row in queued["lost"]["rows"]]
        assert queued["lost"]["count"] == 100
        assert lost[:2] == ["request-0", "request-10"]
        assert len(lost) == MAX_LOST
        first = queued["rows"][0]
        assert first["waited_s"] == pytest.approx(0.01)
        assert first["due_s"] == pytest.approx(0.04)
        prefill_s = backend.router.fleet.cost.prefill_s(10)
        assert first["laxity_s"] == pytest.approx(0.04 - prefill_s, abs=1e-4)
        assert first["at"] == "prefill-0"
        assert len(json.dumps(told, allow_nan=False)) < 10_000

    run(main)


def test_whoever_is_computed_comes_first_and_the_lost_are_apart():
    async def main():
        backend, (prefill, _) = at_rest()
        for name, ttft in (("late", 0.0001), ("soon", 1.0), ("begun", 9.0)):
            stream = backend.router.submit(asked(ttft, name=name, arrival=NOW - 0.01))
        ledger = prefill.instance
        ledger.add(stream.request)
        ledger.begin(prefill.policy(ledger, NOW), NOW)
        queued = snapshot(backend, NOW)["queued"]
        states = [(row["name"], row["state"]) for row in queued["rows"]]
        assert states == [("begun", "prefill"), ("soon", "queued")]
        assert [row["name"] for row in queued["lost"]["rows"]] == ["late"]

    run(main)


def test_a_prompt_in_prefill_is_not_lost_before_it_is_due():
    async def main():
        backend, (prefill, _) = at_rest()
        # Its prefill takes longer than is left; but how much of it is computed is not known.
        stream = backend.router.submit(asked(0.0111, arrival=NOW - 0.011, length=60))
        ledger = prefill.instance
        now = stream.request.deadline - 1e-4
        assert snapshot(backend, now)["queued"]["lost"]["count"] == 1, "it waits"
        ledger.add(stream.request)
        ledger.begin(prefill.policy(ledger, now), now)
        told = snapshot(backend, now)
        assert told["queued"]["lost"]["count"] == told["queued"]["late"] == 0
        assert told["judged"]["lost"] == {"ttft": 0, "tpot": 0, "both": 0}
        late = snapshot(backend, stream.request.deadline + 0.2)
        (row,) = late["queued"]["lost"]["rows"]
        assert (row["state"], row["laxity_s"]) == ("prefill", -0.2)

    run(main)


def test_what_cannot_be_kept_any_more_counts_as_lost_while_it_runs():
    async def main():
        backend, _ = at_rest()
        request = {"in time": (2.0, 0.1), "late": (0.1, 0.1), "slow": (2.0, 0.001)}
        streams = {
            name: backend.router.submit(asked(*slo, name=name, arrival=NOW - 0.5))
            for name, slo in request.items()
        }
        for stream in streams.values():
            has_tokens(stream, [NOW - 0.2, NOW - 0.1])
        backend.router.submit(asked(0.1, name="queued", arrival=NOW - 0.5))
        told = snapshot(backend, NOW)
        running = told["running"]
        assert [row["name"] for row in running["rows"]] == ["in time"]
        lost = {row["name"]: row["missed"] for row in running["lost"]["rows"]}
        # 49 further tokens at 1 ms each were due 50 ms after the first.
        assert lost == {"late": ["TTFT"], "slow": ["TPOT"]}
        assert told["judged"]["lost"] == {"ttft": 2, "tpot": 1, "both": 3}
        assert (running["count"], running["lost"]["count"], running["late"]) == (3, 2, 1)

    run(main)


def test_behind_is_not_lost_as_long_as_it_can_catch_up():
    async def main():
        backend, _ = at_rest()
        stream = backend.router.submit(asked(ttft=9.0, tpot=0.1))
        has_tokens(stream, [NOW - 0.5, NOW - 0.3])
        running = snapshot(backend, NOW)["running"]
        assert (running["late"], running["lost"]["count"]) == (1, 0)
        # 48 more tokens are due by first + 49 * 0.1 s, and a step takes its base at least.
        base_s = backend.router.fleet.cost.decode_base_s
        ends = NOW - 0.5 + 49 * 0.1 - 48 * base_s
        for now, count in ((ends - 0.01, 0), (ends + 0.01, 1)):
            assert snapshot(backend, now)["running"]["lost"]["count"] == count

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
    told = snapshot(harness.server.gate.backend, harness.router.clock())
    sums = {
        name: [sum(column) for column in zip(*told[name]["slots"], strict=True)]
        for name in ("judged", "flow")
    }
    # Of two requests of four tokens each: judged, TTFT, TPOT, both; taken, ended, tokens.
    assert sums == {"judged": [2, 2, 1, 1], "flow": [2, 2, 8]}
