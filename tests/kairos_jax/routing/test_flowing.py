"""Roles that flow, in a live server: sequences stay or move, and no token is lost by it."""

import asyncio
import json
import random

import fakes
import pytest
from fleet import Played

from kairos_jax.kv.transport import Ticket
from kairos_jax.worker.messages import GoOn, Handover, Moved, Parked, Release, Stay, Submit
from schedulers.ledger.journal import Journal, check
from schedulers.policies import flowing
from schedulers.policies.flowing import Placement

CONFIG = fakes.altered(fluid=True, prefill__instances=2, decode__instances=2)


def test_sequences_move_while_there_is_time_elsewhere():
    harness = asyncio.run(fakes.serve_right(CONFIG))
    text = harness.metrics.render()[0].decode()
    assert [worker.instance.id for worker in harness.workers] == [
        *("prefill-0", "prefill-1", "decode-0", "decode-1")
    ]
    steps = [engine.num_steps for engine in harness.engines]
    assert min(steps[2:]) > 0
    assert 'kairos_placements_total{goes="elsewhere"}' in text


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_wherever_sequences_go_their_tokens_are_the_same(seed, prefix_cache, monkeypatch):
    """Placed at random, and prompts too, with pools so small that some are evicted."""
    rng = random.Random(seed)
    monkeypatch.setattr(
        flowing,
        "place",
        lambda length, slo, late, summaries, home, cost, now: Placement(
            rng.randrange(len(summaries)), "by chance"
        ),
    )
    monkeypatch.setattr(
        flowing, "route_prompt", lambda request, summaries, *_: rng.randrange(len(summaries))
    )
    config = fakes.altered(
        CONFIG,
        decode__kv_tokens=256,
        prefill__kv_tokens=256,
        prefill__parked_tokens=256,
        prefill__prefix_cache=prefix_cache,
    )
    harness = asyncio.run(fakes.serve_right(config))
    assert all(engine.num_steps for engine in harness.engines)


def test_decisions_replay_where_roles_flow():
    async def main():
        journal = Journal(fakes.time.monotonic)
        async with fakes.running(CONFIG, journal) as harness:
            await asyncio.gather(*(harness.generate([i, 2, 3], 9) for i in range(20)))
            await harness.assert_nothing_held()
            policies = {worker.instance.id: worker.policy for worker in harness.workers}
        records = [json.loads(json.dumps(record)) for record in journal.take()]
        assert check(records, policies) > 20
        assert {"stay", "hand_over"} & {record[1] for record in records}

    asyncio.run(main())


def played(monkeypatch, index):
    """A router of two that do both, of which b2 receives: what b1 computes goes to `index`."""
    monkeypatch.setattr(flowing, "flows", lambda summaries: True)
    monkeypatch.setattr(flowing, "place", lambda *_: Placement(index, "so it is"))
    monkeypatch.setattr(flowing, "route_prompt", lambda *_: 0)
    return Played("b1", "b2")


async def begun(fleet):
    """A stream, and the id under which the first worker has it, with its first token."""
    stream = fleet.router.submit(fakes.Request("a", 0.0, [1, 2, 3], 9, fakes.CONFIG.default_slo))
    submit = await fleet.sent("b1", Submit)
    await fleet.output(submit.request.id, 5)
    return stream, submit.request.id


def test_one_that_stays_is_told_so(monkeypatch):
    async def main():
        fleet = played(monkeypatch, 0)
        stream, id = await begun(fleet)
        assert await fleet.sent("b1", Stay) == Stay(id, "so it is")
        await fleet.output(id, 6)
        assert not fleet.posts["b1"], "it is asked once"
        assert [peer.id for peer in stream.peers] == ["b1"]

    asyncio.run(main())


def test_one_that_moves_goes_on_where_it_is_until_it_has_been_handed_over(monkeypatch):
    async def main():
        fleet = played(monkeypatch, 1)
        stream, id = await begun(fleet)
        assert await fleet.sent("b1", GoOn) == GoOn(id, "so it is")
        await fleet.output(id, 6)
        ticket = Ticket(id, 4, 9, "")
        await fleet.say(Parked(id, ticket))
        moved = await fleet.sent("b2", Handover)
        assert (moved.tokens, moved.ticket) == ((5, 6), ticket)
        await fleet.say(Moved(id, 1.0))
        assert await fleet.sent("b1", Release) == Release(id)
        await fleet.output(id, 7, finish_reason="length")
        assert [output.token.id async for output in stream] == [5, 6, 7]

    asyncio.run(main())


def test_one_that_ends_before_it_was_to_move_leaves_no_place_booked(monkeypatch):
    async def main():
        fleet = played(monkeypatch, 1)
        _, id = await begun(fleet)
        peer = fleet.router.fleet.peers["b2"]
        assert peer.summary.load > 0
        await fleet.output(id, 6, finish_reason="stop")
        assert peer.summary.load == 0

    asyncio.run(main())


def test_with_nobody_left_to_take_it_the_one_that_has_it_does_it_again(monkeypatch):
    async def main():
        fleet = played(monkeypatch, 1)
        stream, id = await begun(fleet)
        fleet.router.leave("b2")
        await fleet.say(Parked(id, Ticket(id, 4, 9, "")))
        again = await fleet.sent("b1", Submit)
        assert list(again.request.prompt) == [1, 2, 3, 5]
        assert stream.num_lost == 0

    asyncio.run(main())


def test_the_last_word_of_one_that_is_lost_moves_nothing(monkeypatch):
    async def main():
        fleet = played(monkeypatch, 1)
        stream = fleet.router.submit(
            fakes.Request("a", 0.0, [1, 2, 3], 9, fakes.CONFIG.default_slo)
        )
        submit = await fleet.sent("b1", Submit)
        stream.peers.clear()  # it waits for a worker
        await fleet.output(submit.request.id, 5)
        assert not fleet.posts["b1"]
        assert not fleet.posts["b2"]

    asyncio.run(main())
