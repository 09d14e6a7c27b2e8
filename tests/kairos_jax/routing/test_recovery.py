"""Streams that go on when workers are lost, drain, or lose KV: message by message, with workers
that the test plays.
"""

import asyncio
from dataclasses import replace

import pytest
from fleet import PROMPT, Played, asked, in_loop

from kairos_jax.kv.transport import Ticket
from kairos_jax.routing import dispatch, trials
from kairos_jax.routing.fleet import WorkerLost
from kairos_jax.worker.codec import RemoteError
from kairos_jax.worker.messages import (
    Cancel,
    Died,
    Draining,
    Handover,
    Lost,
    Moved,
    Offered,
    Outlined,
    Prefetch,
    Release,
    Returned,
    Submit,
)
from models.sampling import SamplingParams
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Slo
from schedulers.policies.routing import Summary


@in_loop
async def test_ids_are_the_routers_own():
    one, two = Played("p0", "d0"), Played("p0", "d0")
    ids = []
    for played in (one, two):
        played.router.submit(replace(asked(), id="same"))
        ids.append(played.read("p0").request.id)
    assert len(set(ids)) == 2
    assert all(id.endswith("/same#1") for id in ids)


@in_loop
async def test_a_request_without_tokens_is_submitted_elsewhere_as_it_was():
    played = Played("p0", "d0")
    stream = played.router.submit(asked())
    first = played.read("p0").request
    played.join("p1")
    await played.say(Died("p0", RuntimeError("gone")))
    again = played.read("p1").request
    assert again == replace(first, id=again.id, serial=again.serial)
    assert again.id != first.id
    await played.output(first.id, 99, ticket=True)
    assert not stream.tokens, "what was said of the lost one is passed over"
    assert not played.posts["d0"]
    assert not played.posts["p0"]


@in_loop
async def test_a_stream_goes_on_with_its_tokens_as_a_part_of_the_prompt():
    played = Played("p0", "d0")
    sampling = SamplingParams(temperature=1.0, seed=7)
    whole = replace(sampling, prompt_logprobs=1)  # which come with the first token
    stream = played.router.submit(asked(sampling=whole, stop=frozenset({5})))
    handed = await played.prefilled(11)
    assert played.posts["p0"] == []
    played.now = 2.0
    await played.say(Moved(handed.request.id, 1.0))
    assert played.read("p0") == Release(handed.request.id)
    await played.output(handed.request.id, 12)
    played.join("d1")
    played.now = 50.0
    await played.say(Died("d0", RuntimeError("gone")))
    rest = played.read("p0").request
    assert rest.prompt == [*PROMPT, 11, 12]
    assert (rest.max_tokens, rest.sampling, rest.stop) == (7, sampling, frozenset({5}))
    assert (rest.arrival, rest.slo) == (50.0, Slo(15.0, 30.0)), "due soon, yet not hopeless"
    await played.output(handed.request.id, 99)
    await played.output(rest.id, 13, ticket=True)
    again = played.read("d1")
    assert again.request == replace(handed.request, id=rest.id, serial=rest.serial)
    assert (again.tokens, again.first_token_at) == ((11, 12, 13), 0.0)
    await played.say(Moved(rest.id, 50.0))
    assert played.read("p0") == Release(rest.id)
    await played.output(rest.id, 14, finish_reason="length")
    assert [output.token.id async for output in stream] == [11, 12, 13, 14]
    assert (stream.begun_at, stream.first_token_at, stream.moved_at) == (0.0, 0.0, 1.0)
    assert played.router.num_streams == 0
    assert not any(played.posts.values())


@in_loop
async def test_parked_kv_whose_decode_worker_is_lost_is_dropped():
    played = Played("p0", "d0", "d1")
    played.router.submit(asked())
    submit = played.read("p0")
    await played.output(submit.request.id, 11, ticket=True)
    (had,) = [id for id in ("d0", "d1") if played.posts[id]]
    await played.say(Died(had, RuntimeError("gone")))
    cancel, again = played.posts["p0"]
    assert cancel == Cancel(submit.request.id)
    assert again.request.prompt == [*PROMPT, 11]


@in_loop
async def test_a_lost_transfer_is_cancelled_on_both_sides_and_begun_again():
    played = Played("p0", "d0")
    played.router.submit(asked())
    handed = await played.prefilled()
    await played.say(Lost(handed.request.id, LookupError("nothing there")))
    assert played.read("p0") == played.read("d0") == Cancel(handed.request.id)
    again = await played.sent("p0", Submit)  # after a pause: what failed may mend itself
    assert again.request.prompt == [*PROMPT, 11]


@in_loop
async def test_a_prefill_worker_lost_after_the_fetch_is_no_loss():
    played = Played("p0", "d0", "p1")
    stream = played.router.submit(asked())
    (had,) = [id for id in ("p0", "p1") if played.posts[id]]
    id = played.read(had).request.id
    await played.output(id, 11, ticket=True)
    handed = played.read("d0")
    assert isinstance(handed, Handover)
    await played.say(Died(had, RuntimeError("gone")))
    await played.say(Moved(id, 1.0))
    await played.output(id, 12, finish_reason="stop")
    assert [output.token.id async for output in stream] == [11, 12]
    assert not any(played.posts.values())


@in_loop
async def test_a_peer_that_leaves_is_told_to_forget_its_requests():
    played = Played("b0", "b1")
    stream = played.router.submit(asked())
    (had,) = [id for id in ("b0", "b1") if played.posts[id]]
    other = {"b0": "b1", "b1": "b0"}[had]
    id = played.read(had).request.id
    await played.output(id, 11)
    played.router.leave(had)
    assert played.read(had) == Cancel(id)
    rest = played.read(other).request
    assert rest.prompt == [*PROMPT, 11]
    await played.output(rest.id, 12, finish_reason="length")
    assert [output.token.id async for output in stream] == [11, 12]
    played.router.leave(had)  # unknown by now


@in_loop
async def test_a_draining_peer_is_sent_nothing_new():
    played = Played("p0", "d0", "p1")
    await played.say(Draining("p0"))
    for _ in range(3):
        played.router.submit(asked())
    assert len(played.posts["p1"]) == 3
    id = played.posts["p1"][0].request.id
    await played.say(Draining("p1"))
    with pytest.raises(
        WorkerLost, match=r"prefills takes requests \(a prefill instance is draining\)"
    ):
        played.router.submit(asked())
    played.join("p2")
    await played.say(Returned(id))
    assert played.posts["p1"][-1] == Cancel(id)
    assert played.read("p2").request.prompt == PROMPT


@in_loop
async def test_kv_that_a_draining_peer_has_not_asked_for_goes_to_another_by_the_same_ticket():
    played = Played("p0", "d0")
    stream = played.router.submit(asked())
    handed = await played.prefilled()
    for drained, other in (("d0", "d1"), ("d1", "d2")):
        played.join(other)
        await played.say(Draining(drained))
        await played.say(Returned(handed.request.id, handed.ticket))
        assert played.read(other) == handed
    assert not any(played.posts.values()), "it is not prefilled again"
    await played.say(Moved(handed.request.id, 1.0))
    assert played.read("p0") == Release(handed.request.id)
    await played.output(handed.request.id, 12, finish_reason="stop")
    assert [output.token.id async for output in stream] == [11, 12]
    assert not any(played.posts.values())


@in_loop
async def test_kv_given_back_is_computed_anew_where_who_had_it_is_lost_or_who_takes_it_fails():
    for lost in (True, False):
        played = Played("p0", "d0")
        stream = played.router.submit(asked())
        handed = await played.prefilled()
        played.join("d1")
        await played.say(Draining("d0"))
        if lost:
            played.join("p1")
            await played.say(Died("p0", RuntimeError("gone")))
        await played.say(Returned(handed.request.id, handed.ticket))
        if not lost:
            assert played.read("d1") == handed
            await played.say(Lost(handed.request.id, PermissionError("claimed already")))
            assert played.posts["p0"] == [Cancel(handed.request.id)]
        again = await played.sent("p1" if lost else "p0", Submit)
        assert again.request.prompt == [*PROMPT, 11]
        assert stream.num_lost == (not lost)


@in_loop
async def test_kv_given_back_is_dropped_where_nobody_decodes():
    played = Played("p0", "d0")
    stream = played.router.submit(asked())
    handed = await played.prefilled()
    await played.say(Draining("d0"))
    await played.say(Returned(handed.request.id, handed.ticket))
    assert played.read("p0") == Cancel(handed.request.id)
    with pytest.raises(WorkerLost, match="a decode instance is draining"):
        _ = [output async for output in stream]


@in_loop
async def test_workers_that_gave_up_a_router_that_stood_still_count_against_nobody():
    """However many: the cause is neither a worker nor a request."""
    played = Played("p0", "d0")
    stream = played.router.submit(asked())
    for count in range(2 * dispatch.MAX_RECOVERIES):
        played.join(f"p{count + 1}")
        error = ConnectionError("reset")
        await played.say(Died(f"p{count}", error, None, stood_still=True))
        again = played.read(f"p{count + 1}").request
        assert again.prompt == PROMPT
    assert (stream.num_lost, stream.aboard) == (0, set())


@in_loop
async def test_without_another_of_its_role_a_stream_fails_at_once():
    for lost in ("p0", "d0"):
        played = Played("p0", "d0")
        stream = played.router.submit(asked())
        if lost == "d0":
            handed = await played.prefilled()
        await played.say(Died(lost, RuntimeError("on fire")))
        with pytest.raises(WorkerLost, match="instance failed: its step failed"):
            _ = [output async for output in stream]
        assert played.router.num_streams == 0
        if lost == "d0":
            assert played.read("p0") == Cancel(handed.request.id)


@in_loop
async def test_no_decode_worker_is_left_when_the_prefill_ends():
    played = Played("p0", "d0")
    stream = played.router.submit(asked())
    id = played.read("p0").request.id
    played.router.leave("d0")
    await played.output(id, 11, ticket=True)
    assert played.read("p0") == Cancel(id)
    with pytest.raises(WorkerLost, match="no instance that decodes"):
        _ = [output async for output in stream]


@in_loop
async def test_what_the_last_prefill_worker_still_had_goes_on():
    played = Played("p0", "d0")
    stream = played.router.submit(asked())
    await played.say(Draining("p0"))
    handed = await played.prefilled()
    await played.say(Moved(handed.request.id, 0.0))
    await played.say(Died("p0", RuntimeError("gone")))
    await played.output(handed.request.id, 12, finish_reason="stop")
    assert [output.token.id async for output in stream] == [11, 12]


@in_loop
async def test_what_is_lost_again_and_again_fails():
    played = Played("p0", "d0")
    stream = played.router.submit(asked())
    for index in range(dispatch.MAX_RECOVERIES + 1):
        id = (await played.sent("p0", Submit)).request.id
        await played.say(Lost(id, LookupError(f"reason {index}")))
    with pytest.raises(WorkerLost, match="the KV transfer failed"):
        _ = [output async for output in stream]
    assert played.router.num_streams == 0


@in_loop
async def test_drained_and_the_names_are_free_after_a_failure():
    played = Played("p0", "d0")
    played.router.submit(replace(asked(), id="same"))
    await played.say(Died("p0", RuntimeError("gone")))
    await played.router.drained()
    played.join("p1")
    played.router.submit(replace(asked(), id="same"))


@in_loop
async def test_a_stream_waits_for_a_worker_to_join_where_its_role_is_empty():
    played = Played("p0", "d0", rejoin_s=60.0)
    stream = played.router.submit(asked())
    handed = await played.prefilled()
    await played.say(Died("d0", RuntimeError("gone")))
    assert played.read("p0") == Cancel(handed.request.id)
    new = played.router.submit(asked())
    assert not played.posts["p0"], "without decode nothing could be brought to its end"
    played.join("d1")
    first, second = played.posts["p0"]
    assert first.request.prompt == [*PROMPT, 11]
    assert second.request.prompt == PROMPT
    await played.output(first.request.id, 12, finish_reason="stop")
    assert [output.token.id async for output in stream] == [11, 12]
    played.router.cancel(new)
    assert played.router.num_streams == 0


@in_loop
async def test_a_prompt_whose_decode_is_gone_when_it_ends_keeps_its_kv_until_one_joins():
    played = Played("p0", "d0", rejoin_s=60.0)
    played.router.submit(asked())
    id = played.read("p0").request.id
    played.router.leave("d0")
    await played.output(id, 11, ticket=True)
    assert not played.posts["p0"]
    played.join("d1")
    assert played.read("d1").request.id == id


@in_loop
async def test_a_stream_for_which_no_worker_joins_in_time_fails_with_the_reason():
    played = Played("p0", "d0", rejoin_s=0.01)
    stream = played.router.submit(asked())
    await played.say(Died("p0", RuntimeError("on fire")))
    with pytest.raises(WorkerLost, match="a prefill instance failed: its step failed"):
        _ = [output async for output in stream]
    assert played.router.num_streams == 0
    assert not played.posts["d0"]


@in_loop
async def test_the_one_request_that_was_in_two_steps_that_failed_is_refused_and_others_go_on():
    played = Played("p0", "p1", "p2", "d0")
    poison, other = played.router.submit(asked()), played.router.submit(asked())
    for _ in range(2):
        await played.fail(poison.peers[-1].id, poison)
    with pytest.raises(WorkerLost, match="2 instances that had it failed, and it is refused"):
        _ = [output async for output in poison]
    assert played.router.streams == [other]
    assert not other.aboard


@in_loop
async def test_requests_that_were_in_two_steps_that_failed_are_tried_one_after_another():
    played = Played("p0", "d0")
    streams = [played.router.submit(asked()) for _ in range(5)]
    for _ in range(2):
        await played.replace_prefill(said=True)
    first, *others = streams
    assert [bool(each.peers) for each in streams] == [True] + [False] * 4
    fresh = played.router.submit(asked())
    await played.replace_prefill(said=True)
    with pytest.raises(WorkerLost, match="3 instances that had it failed, and it is refused"):
        _ = [output async for output in first]
    assert not fresh.aboard, "what was with one that is tried is not suspected"
    while others:
        await asyncio.sleep(0)
        assert [bool(each.peers) for each in others] == [True] + [False] * (len(others) - 1)
        stream = others.pop(0)
        await played.output(stream.request.id, 11, ticket=True)
        await played.output(stream.request.id, 12)
        assert not stream.aboard, "it has got through"
    assert len(played.router.streams) == 5


@in_loop
async def test_a_request_whose_workers_crash_or_hang_is_refused_and_others_go_on():
    played = Played("p0", "d0")
    poison, *others = [played.router.submit(asked()) for _ in range(4)]
    lost = 0
    while poison in played.router.streams:
        assert lost < 3
        await played.replace_prefill(said=False)
        lost += 1
    with pytest.raises(WorkerLost, match="its connection ended; 3 instances that had it failed"):
        _ = [output async for output in poison]
    assert played.router.streams == others


@in_loop
async def test_two_crashes_alone_prove_nothing():
    played = Played("p0", "d0")
    stream = played.router.submit(asked())
    for number in range(2):
        await played.replace_prefill(said=False)
        await played.output(stream.request.id, 11 + number)
        await played.output(stream.request.id, 21 + number)
    assert stream.peers
    assert not stream.aboard


@in_loop
async def test_a_worker_that_is_back_had_not_failed():
    played = Played("p0", "d0", rejoin_s=60.0)
    stream = played.router.submit(asked())
    for _ in range(3):
        await played.say(Died("p0", TimeoutError()))
        played.join("p0")
    assert stream.peers, "links fail, and nobody is to blame"


@in_loop
async def test_one_whose_turn_does_not_come_goes_on_beside_the_others(monkeypatch):
    monkeypatch.setattr(trials, "PATIENCE_S", 0.05)
    played = Played("p0", "d0")
    streams = [played.router.submit(asked()) for _ in range(3)]
    for _ in range(2):
        await played.replace_prefill(said=False)
    while not all(each.peers for each in streams):
        await asyncio.sleep(0.01)
    await played.replace_prefill(said=False)
    assert set(played.router.streams) == set(streams), "it was none of them alone"


@in_loop
async def test_all_that_wait_for_their_turn_fail_in_the_end_where_no_worker_is_left():
    played = Played("p0", "d0", max_requests=500)
    streams = [played.router.submit(asked()) for _ in range(400)]
    for _ in range(2):
        await played.replace_prefill(said=False)
    await played.say(Died("p2", ConnectionError()))
    await asyncio.wait_for(played.router.drained(), 30)
    for stream in streams:
        with pytest.raises(WorkerLost):
            _ = [output async for output in stream]


@in_loop
async def test_clients_are_told_no_addresses_and_no_errors_of_workers():
    hidden = "KV from 10.2.0.7:50071: UNAVAILABLE: ipv4:10.2.0.7:50071: Connection refused"
    for error in (RemoteError(f"ConnectionError: {hidden}"), ConnectionError(hidden)):
        played = Played("p0", "d0")
        lost, moved = played.router.submit(asked()), played.router.submit(asked())
        for _ in range(dispatch.MAX_RECOVERIES + 1):
            id = (await played.sent("p0", Submit)).request.id
            if id.endswith("#2"):
                id = (await played.sent("p0", Submit)).request.id
            await played.say(Lost(id, error))
        with pytest.raises(WorkerLost, match=r"^the KV transfer failed \(lost 4 times\)$"):
            _ = [output async for output in lost]
        await played.say(Died("p0", error))
        with pytest.raises(WorkerLost) as told:
            _ = [output async for output in moved]
        assert "10.2.0.7" not in str(told.value)
        with pytest.raises(WorkerLost) as told:
            played.router.submit(asked())
        assert "10.2.0.7" not in str(told.value)


@in_loop
async def test_a_pair_between_which_kv_does_not_move_is_avoided_for_a_while():
    played = Played("p0", "d0", "d1")
    for _ in range(4):
        played.router.submit(asked())
    submits = played.posts["p0"][:]
    played.posts["p0"].clear()
    await played.output(submits[0].request.id, 11, ticket=True)
    (first,) = [id for id in ("d0", "d1") if played.posts[id]]
    (other,) = {"d0", "d1"} - {first}
    await played.say(Lost(submits[0].request.id, ConnectionError("refused")))
    for submit in submits[1:]:
        await played.output(submit.request.id, 11, ticket=True)
    assert [type(each) for each in played.posts[first]] == [Handover, Cancel]
    assert [type(each) for each in played.posts[other]] == [Handover] * 3
    played.now = 60.0
    again = (await played.sent("p0", Submit)).request
    await played.output(again.id, 12, ticket=True)
    assert isinstance(played.posts[first][-1], Handover), "after a while it is tried again"


@in_loop
async def test_a_short_refusal_of_kv_connections_fails_nothing():
    played = Played("p0", "d0", max_requests=100, rejoin_s=10.0)
    loop, begin = asyncio.get_running_loop(), asyncio.get_running_loop().time()
    streams = [played.router.submit(asked(max_tokens=20)) for _ in range(70)]
    refused = 0
    while played.router.streams:
        await asyncio.sleep(0.001)
        played.now = loop.time() - begin
        for submit in played.taken("p0", Submit):
            await played.output(submit.request.id, 11, ticket=True)
        for handed in played.taken("d0", Handover):
            if played.now < 0.3 or refused < 70:  # however slow the machine is, each once
                refused += 1
                await played.say(Lost(handed.request.id, ConnectionError("refused")))
            else:
                await played.say(Moved(handed.request.id, played.now))
                await played.output(handed.request.id, 12, finish_reason="length")
    assert refused >= 70
    for stream in streams:
        assert [output.token.id async for output in stream][-1] == 12


@in_loop
async def test_prompts_offered_in_parts_are_spread_over_the_decode_workers():
    ids = [f"d{number}" for number in range(8)]
    played = Played("p0", *ids, max_requests=64)
    for _ in range(64):
        played.router.submit(asked())
    submits = played.posts["p0"][:]
    for submit in submits:
        await played.say(Offered(submit.request.id, Ticket(submit.request.id, 5)))
    assert [len(played.posts[id]) for id in ids] == [8] * 8
    for submit in submits:
        await played.output(submit.request.id, 11, ticket=True)
    handed = [[type(each) for each in played.posts[id]] for id in ids]
    assert handed == [[Prefetch] * 8 + [Handover] * 8] * 8


@in_loop
async def test_a_worker_that_has_filled_up_since_is_not_handed_what_was_sent_ahead():
    played = Played("p0", "d0", "d1")
    stream = played.router.submit(asked())
    id = played.read("p0").request.id
    await played.say(Offered(id, Ticket(id, 5)))
    ahead = stream.peers[0].id
    (other,) = {"d0", "d1"} - {ahead}
    full = Summary(ahead, Role.DECODE, 0.0, [], [], 1.0, 0.5, 1.0)
    await played.say(Outlined(ahead, full, 0))
    await played.output(id, 11, ticket=True)
    assert [type(each) for each in played.posts[ahead]] == [Prefetch, Cancel]
    assert isinstance(played.read(other), Handover)
