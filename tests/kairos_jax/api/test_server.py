"""Router, prefill, transfer and decode over real loopback gRPC, with fake engines."""

import asyncio
import logging
import random

import fakes
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kairos_jax.api import servicer
from kairos_jax.api.servicer import SERVICE
from kairos_jax.rpc import kairos_pb2 as pb
from schedulers.policies import decode, prefill

served = fakes.served_as(fakes.CONFIG)
ids = fakes.ids


async def refusal(call):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in call:
            pass
    return error.value.code(), error.value.details()


PAIRS = [(p, d) for p in prefill.POLICIES for d in decode.POLICIES]


@pytest.mark.parametrize(("prefill_policy", "decode_policy"), PAIRS)
def test_every_token_is_right_under_every_policy(prefill_policy, decode_policy):
    config = fakes.altered(prefill__policy=prefill_policy, decode__policy=decode_policy)
    asyncio.run(fakes.serve_right(config))


@served
async def test_the_last_message_says_how_it_went(harness):
    *_, last = await harness.generate([1, 2, 3], 5, request_id="mine", slo=pb.Slo(ttft_s=1e-4))
    assert last.request_id == "mine"
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 5)
    timing = last.timing
    assert timing.ttft_s == pytest.approx(timing.queue_s + timing.prefill_s)
    assert timing.total_s == pytest.approx(timing.ttft_s + 4 * timing.tpot_s)
    assert timing.transfer_s > 0
    assert (timing.ttft_met, timing.tpot_met) == (False, True)


@served
async def test_stop_tokens_end_the_output(harness):
    tokens = fakes.expected_tokens([5, 6], 20)
    stop = tokens[7]
    sampling = pb.Sampling(temperature=0, ignore_eos=True, stop_token_ids=[stop])
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[5, 6]), max_tokens=20, sampling=sampling
    )
    answer = [response async for response in harness.stub.Generate(request, timeout=30)]
    assert ids(answer) == tokens[: tokens.index(stop) + 1]
    assert answer[-1].finish_reason == pb.FINISH_REASON_STOP
    await harness.assert_nothing_held()


@served
async def test_logprobs_come_with_each_token(harness):
    request = fakes.ask([5, 6], 3)
    request.sampling.logprobs = 1
    answer = [response async for response in harness.stub.Generate(request, timeout=30)]
    for response in answer:
        for id, logprobs in zip(response.token_ids, response.logprobs, strict=True):
            assert logprobs.token_id == logprobs.top[0].token_id == id
            assert logprobs.logprob == -0.5


@served
async def test_logprobs_of_a_prompt_come_before_its_first_token(harness):
    prompt = list(range(3, 60))
    request = fakes.ask(prompt, 3)
    request.sampling.prompt_logprobs = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servicer, "_PROMPT_PART", 60)
        answer = [response async for response in harness.stub.Generate(request, timeout=30)]
    parts = [part for part in answer if part.prompt_logprobs]
    assert answer[: len(parts)] == parts
    assert [len(part.prompt_logprobs) for part in parts] == [20, 20, 16]
    assert not any(part.token_ids for part in parts)
    told = [entry for part in parts for entry in part.prompt_logprobs]
    expected = list(fakes.expected_prompt_logprobs(prompt, 2).tokens(prompt))
    for entry, token in zip(told, expected, strict=True):
        top = tuple((each.token_id, each.logprob) for each in entry.top)
        assert (entry.token_id, entry.logprob, top) == (token.id, token.logprob, token.top)
    assert ids(answer) == fakes.expected_tokens(prompt, 3)
    assert not any(part.prompt_logprobs for part in await harness.generate([5], 2))
    await harness.assert_nothing_held()


@served
async def test_cancelled_in_every_state_nothing_stays(harness):
    """Some wait for prefill, some for the transfer, some for a decode step, some are in one."""
    rng = random.Random(2)
    for round in range(6):
        for engine in harness.engines:
            engine.gate.set() if rng.random() < 0.7 else engine.gate.clear()
        calls = [
            harness.stub.Generate(fakes.ask([i, round] * rng.randrange(1, 30), 30), timeout=30)
            for i in range(12)
        ]
        readers = [asyncio.ensure_future(call.read()) for call in calls]
        await asyncio.wait(readers, timeout=0.05)
        for call in calls:
            call.cancel()
        for engine in harness.engines:
            engine.gate.set()
        await asyncio.gather(*readers, return_exceptions=True)
    prompt = [3, 1, 4]
    assert ids(await harness.generate(prompt, 9)) == fakes.expected_tokens(prompt, 9)
    await harness.assert_nothing_held()


@served
async def test_a_cancel_frees_all_with_the_steps_under_way(harness):
    _, decode_engine = harness.engines
    call, answers, _ = await harness.stream([1, 2, 3], 60)
    await anext(answers)
    # The step under way, and the one dispatched behind it, are the last that may have the request.
    decode_engine.gate.clear()
    call.cancel()
    await asyncio.wait_for(harness.router.drained(), 30)
    before = decode_engine.num_steps
    decode_engine.gate.set()
    await harness.assert_nothing_held()
    assert decode_engine.num_steps <= before + 2


@served
async def test_a_deadline_frees_all(harness):
    harness.engines[1].gate.clear()
    call = harness.stub.Generate(fakes.ask([1, 2, 3], 60), timeout=0.2)
    code, _ = await refusal(call)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(harness.router.drained(), 30)
    harness.engines[1].gate.set()
    await harness.assert_nothing_held()


@served
async def test_an_id_in_use_is_refused_and_free_again_after(harness):
    harness.engines[1].gate.clear()
    _, answers, _ = await harness.stream([1, 2, 3], 4, request_id="same")
    second = harness.stub.Generate(fakes.ask([9], 4, request_id="same"), timeout=30)
    code, details = await refusal(second)
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert "'same'" in details
    harness.engines[1].gate.set()
    rest = [response async for response in answers]
    assert len(ids(rest)) == 3, "the refused one must not disturb the first"
    again = await harness.generate([9], 4, request_id="same")
    assert ids(again) == fakes.expected_tokens([9], 4)


@served
async def test_a_client_that_takes_the_servers_names_stands_in_nobodys_way(harness):
    harness.engines[1].gate.clear()
    forms = ("request", harness.router._prefix)
    names = [f"{form}-{number}" for form in forms for number in (1, 2, 9)]
    streams = [await harness.stream([1, 2], 4, request_id=name) for name in names]
    streams += [await harness.stream([1, 2], 4) for _ in range(6)]
    assert len({first.request_id for _, _, first in streams}) == len(streams)
    harness.engines[1].gate.set()
    for _, answers, first in streams:
        rest = [response async for response in answers]
        assert ids([first, *rest]) == fakes.expected_tokens([1, 2], 4)


def test_more_than_max_requests_are_turned_away_with_a_hint():
    async def main():
        async with fakes.running(fakes.altered(max_requests=2)) as harness:
            harness.engines[1].gate.clear()
            streams = [(await harness.stream([i], 4))[1] for i in range(2)]
            third = harness.stub.Generate(fakes.ask([9], 4), timeout=30)
            code, details = await refusal(third)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "2 requests" in details
            hint = dict(await third.trailing_metadata())
            assert float(hint["retry-after-s"]) > 0
            harness.engines[1].gate.set()
            for index, answers in enumerate(streams):
                rest = [response async for response in answers]
                assert ids(rest) == fakes.expected_tokens([index], 4)[1:]
            assert ids(await harness.generate([9], 4)) == fakes.expected_tokens([9], 4)

    asyncio.run(main())


@served
async def test_a_bad_request_leaves_the_others_alone(harness):
    good = [asyncio.ensure_future(harness.generate([i], 20)) for i in range(5)]
    bad = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[fakes.VOCAB]))
    code, details = await refusal(harness.stub.Generate(bad, timeout=30))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details == "prompt.token_ids[0] must be from 0 to 96, got 97"
    code, details = await refusal(harness.stub.Generate(pb.GenerateRequest(model="other")))
    assert code is grpc.StatusCode.NOT_FOUND
    for index, task in enumerate(good):
        assert ids(await task) == fakes.expected_tokens([index], 20)


@served
async def test_a_refusal_quotes_no_more_than_a_status_holds(harness):
    code, details = await refusal(harness.stub.Generate(pb.GenerateRequest(model="x" * 100_000)))
    assert code is grpc.StatusCode.NOT_FOUND
    assert len(details) < 1100


@served
async def test_a_message_over_the_size_limit_is_refused(harness):
    code, _ = await refusal(harness.stub.Generate(fakes.ask([1] * 5_000_000, 1), timeout=30))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert ids(await harness.generate([1], 2)) == fakes.expected_tokens([1], 2)


@pytest.mark.parametrize("which", [0, 1])
def test_a_dead_engine_fails_its_streams_with_the_reason(which):
    async def main():
        async with fakes.running() as harness:
            harness.engines[which].fail = RuntimeError("the device is on fire")
            code, details = await refusal(harness.stub.Generate(fakes.ask([1, 2], 9), timeout=30))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "its step failed" in details
            assert "on fire" not in details, "the log has it"
            died = await asyncio.wait_for(harness.router.died, 30)
            assert died.instance == ("prefill-0", "decode-0")[which]
            code, _ = await refusal(harness.stub.Generate(fakes.ask([1, 2], 9), timeout=30))
            assert code is grpc.StatusCode.UNAVAILABLE

    asyncio.run(main())


@served
async def test_after_a_failed_transfer_a_request_begins_again(harness):
    extend, refused = harness.transport.extend, []

    def lossy(ticket, kv, last):
        extend(ticket, kv, last)
        if len(refused) < 2:
            refused.append(ticket)
            harness.transport.release(ticket)

    harness.transport.extend = lossy
    *_, last = answer = await harness.generate([1, 2], 9)
    assert ids(answer) == fakes.expected_tokens([1, 2], 9)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (2, 9)
    assert len({ticket.request_id for ticket in refused}) == 2
    await harness.assert_nothing_held()


@served
async def test_a_transfer_that_always_fails_is_given_up(harness):
    extend = harness.transport.extend

    def lossy(ticket, kv, last):
        extend(ticket, kv, last)
        harness.transport.release(ticket)

    harness.transport.extend = lossy
    code, details = await refusal(harness.stub.Generate(fakes.ask([1, 2], 9), timeout=30))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "the KV transfer failed" in details
    harness.transport.extend = extend
    assert ids(await harness.generate([1, 2], 9)) == fakes.expected_tokens([1, 2], 9)
    await harness.assert_nothing_held()


@served
async def test_a_drain_finishes_what_runs_and_takes_nothing_new(harness):
    health = health_pb2_grpc.HealthStub(harness.channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    watch = health.Watch(request)
    assert (await watch.read()).status == serving
    harness.engines[1].gate.clear()
    _, answers, first = await harness.stream([1, 2, 3], 10)
    drain = asyncio.ensure_future(harness.server.drain(30))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    code, details = await refusal(harness.stub.Generate(fakes.ask([9], 4), timeout=30))
    assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "the server is draining")
    harness.engines[1].gate.set()
    rest = [response async for response in answers]
    assert ids([first, *rest]) == fakes.expected_tokens([1, 2, 3], 10)
    assert await drain is True


@served
async def test_shut_it_refuses_until_it_is_opened_again(harness):
    backend = harness.server.gate.backend
    harness.engines[1].gate.clear()
    _, answers, first = await harness.stream([1, 2, 3], 10)
    await harness.server.shut("waiting for a decode worker")
    code, details = await refusal(harness.stub.Generate(fakes.ask([9], 4), timeout=30))
    assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "waiting for a decode worker")
    harness.engines[1].gate.set()
    rest = [response async for response in answers]
    assert ids([first, *rest]) == fakes.expected_tokens([1, 2, 3], 10)
    await harness.server.open(backend)
    assert ids(await harness.generate([9], 4)) == fakes.expected_tokens([9], 4)
    assert await harness.server.drain(30)
    await harness.server.open(backend)
    assert harness.server.gate.closed == "the server is draining"


@served
async def test_reflection_lists_the_services(harness):
    stub = reflection_pb2_grpc.ServerReflectionStub(harness.channel)
    call = stub.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    response = await call.read()
    names = {server.name for server in response.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


def test_a_client_that_is_gone_before_its_refusal_leaves_no_traceback(caplog):
    @served
    async def test(harness):
        log = logging.getLogger("grpc._cython.cygrpc")
        log.error("ExecuteBatchError raised in core by servicer method [/x]")
        log.error("Unexpected [KeyError] raised by servicer method [/x]")

    test()
    assert [record.getMessage() for record in caplog.records] == [
        "Unexpected [KeyError] raised by servicer method [/x]"
    ]
