"""Late prompts that wait for one worker, while another has time for them."""

import asyncio
from dataclasses import replace

import fakes
import pytest
from fleet import PROMPT, Fleet, Played, asked, in_loop

from kairos_jax.kv.transport import Ticket
from kairos_jax.routing.observer import Observer
from kairos_jax.worker.messages import (
    Cancel,
    Draining,
    Offered,
    Outlined,
    Recall,
    Returned,
    Submit,
)
from schedulers.ledger.instance import Role

WHY = "p1 has time for it"


class Counts(Observer):
    num_recalled = num_recovered = 0

    def recalled(self, stream):
        self.num_recalled += 1

    def recovered(self, stream, cause):
        self.num_recovered += 1


async def outlined(fleet, id, num_received=0, **fields):
    """A worker tells how it stands: idle, but for `fields`."""
    summary = replace(fleet.router.fleet.peers[id].summary, deadline=[], ahead_s=[], **fields)
    await fleet.say(Outlined(id, summary, num_received))


async def late(count):
    """A router whose p0 has so many prompts, all late by now; p1 joins it then."""
    counts = Counts()
    fleet = Played("p0", "d0", observers=[counts])
    streams = [fleet.router.submit(replace(asked(), arrival=float(i))) for i in range(count)]
    ids = [submit.request.id for submit in fleet.taken("p0", Submit)]
    fleet.join("p1")
    fleet.now = 100.0
    return fleet, streams, ids, counts


@in_loop
async def test_the_oldest_go_where_there_is_time():
    fleet, streams, ids, counts = await late(3)
    assert len(ids) == 3
    await outlined(fleet, "p1")
    assert not fleet.posts["p0"], "it has not told that any is late"
    await outlined(fleet, "p0", 3, num_late=3)
    assert fleet.taken("p0", Recall) == [Recall(ids[0], WHY), Recall(ids[1], WHY)]
    await outlined(fleet, "p0", 3, num_late=3)
    assert not fleet.posts["p0"], "p1 has no time until these have come and are done"
    for id in ids[:2]:
        await fleet.say(Returned(id))
    assert not fleet.posts["p0"], "it has forgotten them"
    first, second = fleet.taken("p1", Submit)
    assert [list(each.request.prompt) for each in (first, second)] == [PROMPT] * 2
    assert (first.request.arrival, second.request.arrival) == (0.0, 1.0)
    assert first.request.id not in ids
    assert [stream.num_lost for stream in streams] == [0, 0, 0]
    assert (counts.num_recalled, counts.num_recovered) == (2, 0)
    await outlined(fleet, "p0", 3, num_late=1)
    assert not fleet.posts["p0"], "p1 has not told that it has begun them"
    await outlined(fleet, "p1", 2)
    assert fleet.read("p0") == Recall(ids[2], WHY)


@pytest.mark.parametrize("first", ["a token", "KV"])
@in_loop
async def test_one_that_has_begun_goes_on_where_it_is(first):
    fleet, streams, ids, _ = await late(1)
    p1 = fleet.router.fleet.peers["p1"]
    await outlined(fleet, "p0", 1, num_late=1)
    assert not p1.summary.has_time, "its place is kept"
    if first == "a token":
        await fleet.output(ids[0], 5, ticket=True)
    else:
        await fleet.say(Offered(ids[0], Ticket(ids[0], 2)))
    assert p1.summary.has_time
    assert streams[0].recalled_to is None
    assert not fleet.posts["p1"]


@in_loop
async def test_one_that_is_cancelled_leaves_no_place_kept():
    fleet, (stream,), ids, _ = await late(1)
    await outlined(fleet, "p0", 1, num_late=1)
    fleet.router.cancel(stream)
    assert fleet.router.fleet.peers["p1"].summary.has_time
    assert fleet.taken("p0", Cancel) == [Cancel(ids[0])]
    await fleet.say(Returned(ids[0]))
    assert not fleet.posts["p1"]


@pytest.mark.parametrize("how", ["drains", "is lost"])
@in_loop
async def test_where_it_was_to_go_may_be_gone(how):
    fleet, _, ids, counts = await late(1)
    await outlined(fleet, "p0", 1, num_late=1)
    assert fleet.read("p0") == Recall(ids[0], WHY)
    if how == "drains":
        await fleet.say(Draining("p1"))
    else:
        await fleet.fail("p1")
    await fleet.say(Returned(ids[0]))
    assert list((await fleet.sent("p0", Submit)).request.prompt) == PROMPT
    assert counts.num_recalled == 1


@in_loop
async def test_where_it_is_may_be_lost():
    fleet, (stream,), ids, counts = await late(1)
    await outlined(fleet, "p0", 1, num_late=1)
    await fleet.fail("p0", stream)
    assert (await fleet.sent("p1", Submit)).request.id != ids[0]
    assert stream.recalled_to is None
    assert (counts.num_recalled, counts.num_recovered) == (0, 1)


@in_loop
async def test_workers_share_what_is_late():
    """All are late from the start, so all go to the first worker, which is held in its step."""
    fleet = Fleet(num_prefill=2, num_decode=1)
    first, second = fleet.of(Role.PREFILL)
    first.engine.gate.clear()
    prompts = [[i] * 40 for i in range(1, 9)]
    slo = replace(fakes.CONFIG.default_slo, ttft=1e-6)
    asking = [fleet.router.submit(replace(asked(prompt, 5), slo=slo)) for prompt in prompts]
    answers = [asyncio.ensure_future(tokens(stream)) for stream in asking]
    # The held one computes none.
    await asyncio.wait(answers, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    assert second.engine.num_steps > 0
    first.engine.gate.set()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert await answer == fakes.expected_tokens(prompt, 5)
    await fleet.close()


async def tokens(stream):
    return [output.token.id async for output in stream]
