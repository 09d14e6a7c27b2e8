"""Late prompts that wait for one worker, while another has time for them."""

import asyncio
import threading
from dataclasses import replace

import fakes
import pytest
from fleet import PROMPT, Fleet, Played, asked, in_loop

from kairos_jax.kv.transport import Ticket
from kairos_jax.routing.observer import Observer
from kairos_jax.worker.messages import (
    Cancel,
    Draining,
    Kept,
    Offered,
    Outlined,
    Recall,
    Returned,
    Submit,
)
from schedulers.ledger.instance import Role
from schedulers.policies.routing import Summary

WHY = "p1 has time for it"


class Counts(Observer):
    num_recalled = num_recovered = 0

    def recalled(self, stream):
        self.num_recalled += 1

    def recovered(self, stream, cause):
        self.num_recovered += 1


async def outlined(fleet, id, num_received=0, **fields):
    """A worker tells how it stands: idle, but for `fields`."""
    summary = Summary(id, Role.PREFILL, 0.0, [], [], 1.0, 0.0, 0.0)
    await fleet.say(Outlined(id, replace(summary, **fields), num_received))


async def has_time(fleet, num_received=0):
    """p1 tells that it could begin prompts of 100 tokens."""
    await outlined(fleet, "p1", num_received, spare=100.0)


async def told_late(fleet, ids):
    """p0 tells which of its prompts are late and have not begun."""
    await outlined(fleet, "p0", len(fleet.router.streams), num_late=len(ids), late=tuple(ids[:4]))


async def late(count):
    """A router whose p0 has so many prompts, all late by now; p1 joins it then."""
    counts = Counts()
    fleet = Played("p0", "d0", observers=[counts])
    streams = [fleet.router.submit(replace(asked(), arrival=float(i))) for i in range(count)]
    ids = [submit.request.id for submit in fleet.taken("p0", Submit)]
    fleet.join("p1")
    fleet.now = 100.0
    await has_time(fleet)
    return fleet, streams, ids, counts


@in_loop
async def test_the_oldest_go_where_there_is_time():
    fleet, streams, ids, counts = await late(3)
    assert len(ids) == 3
    assert not fleet.posts["p0"], "it has not told that any is late"
    await told_late(fleet, ids)
    assert fleet.taken("p0", Recall) == [Recall(ids[0], WHY), Recall(ids[1], WHY)]
    await told_late(fleet, ids)
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
    await told_late(fleet, ids[2:])
    assert not fleet.posts["p0"], "p1 has not told that it has begun them"
    await has_time(fleet, 2)
    assert fleet.read("p0") == Recall(ids[2], WHY)


@in_loop
async def test_one_that_does_not_fit_is_passed_over():
    fleet, _, ids, _ = await late(4)
    await outlined(fleet, "p1", spare=len(PROMPT) - 1.0)
    await told_late(fleet, ids)
    assert not fleet.posts["p0"]
    await outlined(fleet, "p1", spare=len(PROMPT) + 1.0)
    assert fleet.read("p0") == Recall(ids[0], WHY)


@in_loop
async def test_one_whose_kv_does_not_get_on_is_given_none():
    fleet, _, ids, _ = await late(2)
    peers = fleet.router.fleet.peers
    fleet.router.fleet.transfer_failed(peers["p1"], peers["d0"])
    await told_late(fleet, ids)
    assert not fleet.posts["p0"]


@in_loop
async def test_one_that_told_of_its_time_while_a_place_was_kept_there_has_it_afterwards():
    fleet, _, ids, _ = await late(2)
    await told_late(fleet, ids[:1])
    assert fleet.read("p0") == Recall(ids[0], WHY)
    await has_time(fleet)  # and no more, since it has nothing to do
    await fleet.say(Kept(ids[0]))
    await told_late(fleet, ids[1:])
    assert fleet.read("p0") == Recall(ids[1], WHY)


@pytest.mark.parametrize("first", ["a token", "KV", "word"])
@in_loop
async def test_one_that_has_begun_goes_on_where_it_is(first):
    fleet, streams, ids, _ = await late(1)
    p1 = fleet.router.fleet.peers["p1"]
    await told_late(fleet, ids)
    assert not p1.summary.spare, "its time is kept"
    match first:
        case "a token":
            await fleet.output(ids[0], 5, ticket=True)
        case "KV":
            await fleet.say(Offered(ids[0], Ticket(ids[0], 2)))
        case "word":
            await fleet.say(Kept(ids[0]))
    assert p1.summary.spare == 100.0
    assert streams[0].recalled_to is None
    assert not fleet.posts["p1"]


@in_loop
async def test_one_that_is_cancelled_leaves_no_place_kept():
    fleet, (stream,), ids, _ = await late(1)
    await told_late(fleet, ids)
    fleet.router.cancel(stream)
    assert fleet.router.fleet.peers["p1"].summary.spare
    assert fleet.taken("p0", Cancel) == [Cancel(ids[0])]
    await fleet.say(Returned(ids[0]))
    assert not fleet.posts["p1"]


@pytest.mark.parametrize("how", ["drains", "is lost"])
@in_loop
async def test_where_it_was_to_go_may_be_gone(how):
    fleet, _, ids, counts = await late(1)
    await told_late(fleet, ids)
    assert fleet.read("p0") == Recall(ids[0], WHY)
    if how == "drains":
        await fleet.say(Draining("p1"))
    else:
        await fleet.fail("p1")
    await fleet.say(Returned(ids[0]))
    assert list((await fleet.sent("p0", Submit)).request.prompt) == PROMPT
    assert counts.num_recalled == 0


@in_loop
async def test_where_it_is_may_be_lost():
    fleet, (stream,), ids, counts = await late(1)
    await told_late(fleet, ids)
    await fleet.fail("p0", stream)
    assert (await fleet.sent("p1", Submit)).request.id != ids[0]
    assert stream.recalled_to is None
    assert (counts.num_recalled, counts.num_recovered) == (0, 1)


class Steps(fakes.FakeEngine):
    """One step for each time that it is let go."""

    def __init__(self, limits):
        super().__init__(limits)
        self.begun, self.turns = threading.Semaphore(0), threading.Semaphore(0)

    def step(self, pieces):
        self.begun.release()
        assert self.turns.acquire(timeout=30)
        return super().step(pieces)


@pytest.mark.parametrize("length", [10, 40])
@in_loop
async def test_a_worker_that_joins_takes_over_late_prompts(length):
    """Of 10 tokens, several begin in one step. The one that has all goes on step by step."""
    fleet = Fleet(num_prefill=1, num_decode=1, engine=Steps)
    counts = Counts()
    fleet.router.observers.append(counts)
    (first,), (decode,) = fleet.of(Role.PREFILL), fleet.of(Role.DECODE)
    decode.engine.turns.release(1000)
    prompts = [[i] * length for i in range(1, 25)]
    slo = replace(fakes.CONFIG.default_slo, ttft=1e-6)
    asking = [fleet.router.submit(replace(asked(prompt, 5), slo=slo)) for prompt in prompts]
    answers = [asyncio.ensure_future(tokens(stream)) for stream in asking]
    assert await asyncio.to_thread(first.engine.begun.acquire, timeout=30)
    second = fleet.add(Role.PREFILL)
    first.engine.turns.release()
    while not await asyncio.to_thread(second.engine.begun.acquire, timeout=1):
        first.engine.turns.release()  # it may have begun a step before it could read its inbox
    second.engine.turns.release(1000)
    first.engine.turns.release(1000)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert await answer == fakes.expected_tokens(prompt, 5)
    assert counts.num_recalled > 0
    assert counts.num_recovered == 0
    await fleet.close()


async def tokens(stream):
    return [output.token.id async for output in stream]
