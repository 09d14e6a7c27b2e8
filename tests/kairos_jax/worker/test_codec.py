"""Messages and events survive the way over the wire, on clocks that do not agree."""

import math
from dataclasses import replace

import fakes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kairos_jax.engine.calls import PromptLogprobs, Token
from kairos_jax.kv.transport import Ticket
from kairos_jax.rpc import internal_pb2 as pb
from kairos_jax.worker import codec
from kairos_jax.worker.messages import (
    Cancel,
    Died,
    Draining,
    HandBack,
    Handover,
    Lost,
    Moved,
    Offered,
    Outlined,
    Output,
    Prefetch,
    Release,
    Returned,
    Stepped,
    Submit,
)
from kairos_jax.worker.status import Status
from models.sampling import SamplingParams
from schedulers.ledger.instance import Limits, Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies.routing import Summary

# The receiver's clock is ahead by this: exact in binary, so that times come out exact.
SKEW = 4096.0
times = st.integers(0, 2**20).map(lambda n: n / 8)
seconds = st.integers(1, 2**20).map(lambda n: n / 64)
ids = st.text(max_size=20)
tokens = st.integers(0, 2**31 - 1)
samplings = st.none() | st.builds(
    SamplingParams,
    temperature=seconds,
    top_k=tokens,
    top_p=seconds,
    min_p=seconds,
    seed=st.integers(0, 2**32 - 1),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)
requests = st.builds(
    Request,
    id=ids,
    arrival=times,
    prompt=st.lists(tokens, max_size=5),
    max_tokens=tokens,
    slo=st.builds(Slo, seconds, seconds),
    stop=st.frozensets(tokens, max_size=3),
    sampling=samplings,
    serial=st.integers(0, 2**40),
)
tickets = st.builds(
    Ticket, request_id=ids, num_tokens=tokens, uuid=st.integers(0, 2**64 - 1), address=ids
)
logprobs = st.floats(-100, 0)
singles = st.lists(st.floats(-100, 0, width=32), max_size=3).map(tuple)
outputs = st.builds(
    Output,
    id=ids,
    token=st.builds(
        Token,
        id=tokens,
        logprob=st.none() | logprobs,
        top=st.lists(st.tuples(tokens, logprobs), max_size=3).map(tuple),
        prompt=st.none()
        | st.builds(PromptLogprobs, singles, st.lists(tokens, max_size=3).map(tuple), singles),
    ),
    begun_at=times,
    at=times,
    finish_reason=st.sampled_from([None, "stop", "length"]),
    ticket=st.none() | tickets,
    cached=tokens,
)
traces = st.dictionaries(st.sampled_from(["traceparent", "tracestate"]), st.just("x"))
messages = st.one_of(
    st.builds(Submit, requests, traces),
    st.builds(Handover, requests, st.lists(tokens, max_size=4).map(tuple), times, tickets, traces),
    st.builds(Prefetch, tickets, st.lists(tokens, max_size=4).map(tuple)),
    st.builds(Release, ids),
    st.builds(Cancel, ids),
)


def later(request: Request) -> Request:
    return replace(request, arrival=request.arrival + SKEW)


@given(messages, times)
def test_a_message_arrives_as_it_was_sent(message, now):
    sent = pb.ToWorker.FromString(codec.encode_message(message, now).SerializeToString())
    got = codec.decode_message(sent, now + SKEW)
    match message:
        case Submit(request):
            message = replace(message, request=later(request))
        case Handover(request, _, at):
            message = replace(message, request=later(request), first_token_at=at + SKEW)
    assert got == message


@given(st.lists(outputs, max_size=3), times)
def test_the_outputs_of_a_step_arrive_as_they_were(outputs, now):
    said = codec.encode_event(Stepped(tuple(outputs)), now).SerializeToString()
    got = codec.decode_event(pb.FromWorker.FromString(said), "d@1", Role.DECODE, now + SKEW)
    expected = [replace(o, begun_at=o.begun_at + SKEW, at=o.at + SKEW) for o in outputs]
    assert got == Stepped(tuple(expected))


def summary(id, skew):
    due = [2.0 + skew, 9.0 + skew]
    return Summary(id, Role.BOTH, 1.0, due, [1.0, 2.5], 1.5, 0.5, 8.0, 4.0, math.inf)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Moved("a", 3.0), Moved("a", 3.0 + SKEW)),
        (Offered("a", Ticket("a", 3, 9, "h:1")), Offered("a", Ticket("a", 3, 9, "h:1"))),
        (Returned("a"), Returned("a")),
        (Returned("a", Ticket("a", 3, 9, "h:1")), Returned("a", Ticket("a", 3, 9, "h:1"))),
        (Draining("here"), Draining("there")),
        (
            Outlined("here", summary("here", 0.0), 7),
            Outlined("there", summary("there", SKEW), 7),
        ),
    ],
)
def test_an_event_arrives_with_the_id_by_which_the_router_knows_the_worker(event, expected):
    said = codec.encode_event(event, 5.0)
    assert codec.decode_event(said, "there", Role.BOTH, 5.0 + SKEW) == expected


def test_an_error_arrives_by_its_kind_and_text():
    lost = codec.decode_event(codec.encode_event(Lost("a", KeyError("b")), 0), "p", Role.BOTH, 0)
    assert isinstance(lost, Lost)
    assert (lost.id, str(lost.error)) == ("a", "KeyError: 'b'")
    died = codec.decode_event(codec.encode_event(Died("x", MemoryError()), 0), "p", Role.BOTH, 0)
    assert isinstance(died, Died)
    assert (died.instance, str(died.error)) == ("p", "MemoryError")


def test_a_welcome_arrives_as_it_was_sent():
    welcome = codec.Welcome(
        instance="decode-0",
        incarnation="0123",
        role=Role.DECODE,
        model="m",
        fingerprint="f",
        dtype="bfloat16",
        limits=Limits(1, 2, 3, 4, 5, math.inf),
        profile=fakes.PROFILE,
        mesh_size=4,
        device_kind="TPU v5e",
        kv_address="10.0.0.1:50061",
        prefix_cache=True,
    )
    assert codec.decode_welcome(codec.encode_welcome(welcome)) == welcome


def test_what_an_instance_holds_arrives_with_the_answer_to_a_ping():
    status = Status(1, 2, 3, 4, 5, 6.5, math.inf, 7, 8.5, 9.5, 10, ("a", "b"))
    assert codec.decode_pong(codec.encode_pong(status).pong) == status
    assert codec.decode_pong(pb.Pong()) is None


def test_what_is_no_message_is_refused():
    with pytest.raises(ValueError, match="ping is no message"):
        codec.decode_message(pb.ToWorker(ping=pb.Ping()), 0)
    with pytest.raises(ValueError, match="None is no event"):
        codec.decode_event(pb.FromWorker(), "p", Role.BOTH, 0)
    with pytest.raises(ValueError, match="answered by pong"):
        codec.decode_welcome(pb.FromWorker(pong=pb.Pong()))
    with pytest.raises(ValueError, match=r"slo\.ttft must be a positive number"):
        codec.decode_message(pb.ToWorker(submit=pb.Request(id="a", tpot_s=1)), 0)
    with pytest.raises(TypeError, match="HandBack is not for other processes"):
        codec.encode_message(HandBack(running=False), 0)
