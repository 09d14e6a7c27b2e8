"""How tokens become messages: those that wait go out together."""

import asyncio
import dataclasses
from types import SimpleNamespace
from typing import Any

import grpc
import http_fakes
import pytest

from kairos_jax.api import servicer
from kairos_jax.engine.calls import Token
from kairos_jax.lab.replay import Received
from kairos_jax.routing import stream
from kairos_jax.routing.fleet import WorkerLost
from kairos_jax.routing.stream import Stream
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.worker.messages import Output
from models.sampling import SamplingParams
from schedulers.ledger.request import Request, Slo

TEXT = "hello"


class Aborted(Exception):
    pass


class Context:
    """What gRPC gives to a call, whose client reads one message at a time when it is told to."""

    def __init__(self) -> None:
        self.written: list[pb.GenerateResponse] = []
        self.reads = asyncio.Event()

    async def write(self, message: pb.GenerateResponse) -> None:
        self.written.append(message)
        await self.reads.wait()

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise Aborted(code, details)


def begun(count: int = len(TEXT)) -> Stream:
    """A stream of which so many tokens wait to be read; the last of the text ends it."""
    made = Stream("one", Request("one", 0.0, [1], len(TEXT), Slo(1, 1)))
    for at, id in enumerate(http_fakes.ids_of(TEXT)[:count]):
        reason = "length" if at + 1 == len(TEXT) else None
        made.put(Output("one", Token(id, -0.5), 0.5, 1.0 + at, reason))
    return made


async def answer(made: Stream, context: Context) -> None:
    validator = SimpleNamespace(tokenizer=http_fakes.tokenizer())
    backend: Any = SimpleNamespace(
        validator=validator, router=SimpleNamespace(cancel=lambda stream: None)
    )
    await servicer._answer(backend, made, context)


def test_tokens_that_wait_go_out_in_one_message():
    async def run():
        context, made = Context(), begun()
        context.reads.set()
        await answer(made, context)
        (message,) = context.written
        assert list(message.token_ids) == http_fakes.ids_of(TEXT)
        assert (message.text_delta, len(message.logprobs)) == (TEXT, len(TEXT))
        assert message.finish_reason == pb.FINISH_REASON_LENGTH
        assert message.timing.tpot_s == 1.0, "the server's own times are not those of messages"

    asyncio.run(run())


def test_a_message_has_so_many_tokens_at_most(monkeypatch):
    monkeypatch.setattr(stream, "_MOST_TAKEN", 2)

    async def run():
        context = Context()
        context.reads.set()
        await answer(begun(), context)
        assert [len(message.token_ids) for message in context.written] == [2, 2, 1]
        assert [bool(message.finish_reason) for message in context.written] == [False, False, True]
        assert "".join(message.text_delta for message in context.written) == TEXT

    asyncio.run(run())


def test_a_client_counts_tokens_and_not_messages():
    class Stub:
        async def Generate(self, request, timeout):
            for ids in ([4], [5, 6, 7], [8]):
                yield pb.GenerateResponse(token_ids=ids, text_delta="x" * len(ids))
            yield pb.GenerateResponse(finish_reason=pb.FINISH_REASON_LENGTH)

    received, stub = Received(), Stub()
    asyncio.run(received.read(stub, pb.GenerateRequest()))  # type: ignore[arg-type]
    assert (received.token_ids, received.text) == ([4, 5, 6, 7, 8], "xxxxx")
    first, *together, last = received.token_times
    assert len(set(together)) == 1, "they came at once"
    outcome = received.outcome(Slo(1, 1), first)
    assert outcome.num_output == 5
    assert outcome.tpot_s == pytest.approx((last - first) / 4)


def test_what_waited_when_a_worker_was_lost_still_goes_out():
    async def run():
        context, made = Context(), begun(1)
        answering = asyncio.ensure_future(answer(made, context))
        while not context.written:
            await asyncio.sleep(0)
        for output in (Output("one", Token(id, -0.5), 0.5, 2.0) for id in (4, 5)):
            made.put(output)
        made.fail(WorkerLost("gone"))
        context.reads.set()
        with pytest.raises(Aborted):
            await answering
        assert [list(message.token_ids) for message in context.written][1:] == [[4, 5]]

    asyncio.run(run())


def test_a_client_that_does_not_read_is_cut_off(monkeypatch, caplog):
    monkeypatch.setattr(servicer, "WRITE_S", 0.05)

    async def run():
        with pytest.raises(Aborted) as error:
            await answer(begun(), Context())  # which reads nothing
        why = "the client has read nothing of its answer for 0.05 s"
        assert error.value.args == (grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        assert f"{why}: it is cut off" in caplog.text

    asyncio.run(run())


@pytest.mark.parametrize(("logprobs", "sizes"), [(None, [5]), (0, [5]), (1, [3, 2]), (20, [1] * 5)])
def test_a_message_has_so_many_logprobs_at_most(logprobs, sizes, monkeypatch):
    monkeypatch.setattr(stream, "_MOST_TAKEN", 6)

    async def run():
        made, context = begun(), Context()
        how = SamplingParams(temperature=0.0, logprobs=logprobs)
        made.request = dataclasses.replace(made.request, sampling=how)
        context.reads.set()
        await answer(made, context)
        assert [len(message.token_ids) for message in context.written] == sizes

    asyncio.run(run())
