"""Messages and events survive the way over the wire, on clocks that do not agree."""

import math
from dataclasses import replace
from typing import get_args

import fakes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kairos_jax.engine.calls import PromptLogprobs, Token
from kairos_jax.kv.transport import Ticket
from kairos_jax.rpc import internal_pb2 as pb
from kairos_jax.worker import codec
from kairos_jax.worker.codec import For, Sender
from kairos_jax.worker.messages import (
    Cancel,
    Died,
    Draining,
    Event,
    Failed,
    GoOn,
    HandBack,
    Handover,
    Hello,
    Kept,
    Lost,
    Moved,
    Offered,
    Outlined,
    Output,
    Parked,
    Ping,
    Pong,
    Prefetch,
    Recall,
    Release,
    Returned,
    Stay,
    Stepped,
    Submit,
    Welcome,
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
    seed=st.integers(0, 2**64 - 1),
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
    st.builds(Stay, ids, ids),
    st.builds(GoOn, ids, ids),
    st.builds(Recall, ids, ids),
)


def later(request: Request) -> Request:
    return replace(request, arrival=request.arrival + SKEW)


def carried(message, now=0.0, instance="", role=Role.BOTH):
    """What arrives of a message, at a receiver whose clock is ahead."""
    sent = codec.encode(message, now)
    sent = type(sent).FromString(sent.SerializeToString())
    return codec.decode(sent, Sender(now + SKEW, instance, role))


@given(messages, times)
def test_a_message_arrives_as_it_was_sent(message, now):
    got = carried(message, now)
    match message:
        case Submit(request):
            message = replace(message, request=later(request))
        case Handover(request, _, at):
            message = replace(message, request=later(request), first_token_at=at + SKEW)
    assert got == message


@given(st.lists(outputs, max_size=3), times)
def test_the_outputs_of_a_step_arrive_as_they_were(outputs, now):
    expected = [replace(o, begun_at=o.begun_at + SKEW, at=o.at + SKEW) for o in outputs]
    assert carried(Stepped(tuple(outputs)), now) == Stepped(tuple(expected))


def summary(id, skew):
    due = [2.0 + skew, 9.0 + skew]
    rest = 4.0, math.inf, True, True, 3, ("a", "b"), 64.0
    return Summary(id, Role.BOTH, 8.0 + skew, due, [1.0, 2.5], 1.5, 0.5, 8.0, *rest)


EVENTS = [
    (Moved("a", 3.0), Moved("a", 3.0 + SKEW)),
    (Failed("a", "not_finite", "why"), Failed("a", "not_finite", "why")),
    (Offered("a", Ticket("a", 3, 9, "h:1")), Offered("a", Ticket("a", 3, 9, "h:1"))),
    (Parked("a", Ticket("a", 3, 9, "h:1")), Parked("a", Ticket("a", 3, 9, "h:1"))),
    (Returned("a"), Returned("a")),
    (Kept("a"), Kept("a")),
    (Returned("a", Ticket("a", 3, 9, "h:1")), Returned("a", Ticket("a", 3, 9, "h:1"))),
    (Draining("here"), Draining("there")),
    (Outlined("here", summary("here", 0.0), 7), Outlined("there", summary("there", SKEW), 7)),
]


@pytest.mark.parametrize(("event", "expected"), EVENTS)
def test_an_event_arrives_with_the_id_by_which_the_router_knows_the_worker(event, expected):
    assert carried(event, 5.0, "there") == expected


def test_an_error_arrives_by_its_kind_and_text():
    lost = carried(Lost("a", KeyError("b")))
    assert isinstance(lost, Lost)
    assert (lost.id, str(lost.error)) == ("a", "KeyError: 'b'")
    died = carried(Died("x", MemoryError()), instance="p")
    assert isinstance(died, Died)
    assert (died.instance, str(died.error)) == ("p", "MemoryError")


WELCOME = Welcome(
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
    version=3,
    fluid=True,
)
STATUS = Status(1, 2, 3, 4, 5, 6.5, math.inf, 7, 8.5, 9.5, 10, ("a", "b"))


@pytest.mark.parametrize(
    "message",
    [Hello("r", 7, 6), WELCOME, Ping(), Pong(), Pong(STATUS)],
    ids=lambda m: type(m).__name__,
)
def test_what_the_ends_of_a_call_say_to_each_other_arrives_as_it_was(message):
    assert carried(message) == message


def test_a_profile_goes_without_its_samples():
    measured = replace(WELCOME, profile=fakes.PROFILE | {"samples": {"prefill": [(1, 2)]}})
    assert carried(measured) == WELCOME


@pytest.mark.parametrize(
    ("table", "form"), [(codec.TO_WORKER, pb.ToWorker), (codec.FROM_WORKER, pb.FromWorker)]
)
def test_the_table_has_an_entry_for_each_field_of_the_protocol(table, form):
    (kinds,) = form.DESCRIPTOR.oneofs
    assert {entry.field for entry in table} == {field.name for field in kinds.fields}
    assert len({entry.kind for entry in table}) == len(table)


def test_every_event_says_whom_it_is_for():
    told = {type(event): codec.address_of(event) for event, _ in EVENTS}
    told |= {
        type(event): codec.address_of(event) for event in (Lost("a", ValueError()), Stepped(()))
    }
    told[Died] = codec.address_of(Died("x", MemoryError()))
    assert set(told) == set(get_args(Event))
    assert told[Stepped] == (For.OUTPUTS, ())
    for kind in (Moved, Offered, Parked, Returned, Lost, Failed):
        assert told[kind] == (For.REQUEST, "a")
    assert (told[Died], told[Draining]) == ((For.INSTANCE, "x"), (For.INSTANCE, "here"))


def test_what_is_no_message_is_refused():
    with pytest.raises(ValueError, match="None is no kind of ToWorker"):
        codec.decode(pb.ToWorker(), Sender())
    with pytest.raises(ValueError, match="None is no kind of FromWorker"):
        codec.decode(pb.FromWorker(), Sender())
    with pytest.raises(ValueError, match=r"slo\.ttft must be a positive number"):
        codec.decode(pb.ToWorker(submit=pb.Request(id="a", tpot_s=1)), Sender())
    with pytest.raises(TypeError, match="HandBack is not for other processes"):
        codec.encode(HandBack(running=False), 0)
