"""Messages and events as internal.proto has them, and back.

Times go out as ages and come in as times of the receiver's clock: `now` is when a message is
written, or was read. They are off by how long it was on its way.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import grpc

from kairos_jax.engine.calls import PromptLogprobs, Token
from kairos_jax.kv.transport import Ticket
from kairos_jax.rpc import internal_pb2 as pb
from kairos_jax.worker.messages import (
    Cancel,
    Died,
    Draining,
    Event,
    Handover,
    Lost,
    Message,
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

# Of internal.proto; both sides must have the same.
VERSION = 2
SERVICE = "kairos.internal.v1.Worker"
# A prompt of a million tokens, and what else a message has.
MAX_MESSAGE_BYTES = 16 << 20
# What a stream's reader gets when there is no more.
EOF: Any = grpc.aio.EOF  # pyright: ignore[reportAttributeAccessIssue]


class RemoteError(Exception):
    """What went wrong in another process."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """Who a worker is, and what it has. incarnation: random, new at each start. profile: its step
    times (DESIGN: "Profile file"). kv_address: "host:port" of its KV service.
    """

    instance: str
    incarnation: str
    role: Role
    model: str
    fingerprint: str
    dtype: str
    limits: Limits
    profile: Mapping[str, Any]
    mesh_size: int = 1
    device_kind: str = ""
    kv_address: str = ""
    prefix_cache: bool = False


# What a router says.


def encode_message(message: Message, now: float) -> pb.ToWorker:
    """Raises TypeError for a message that does not leave the process."""
    match message:
        case Submit(request, trace):
            return pb.ToWorker(submit=_request(request, now, trace))
        case Handover(request, tokens, first_token_at, ticket, trace):
            handover = pb.Handover(
                request=_request(request, now, trace),
                tokens=tokens,
                first_token_age_s=now - first_token_at,
                ticket=_ticket(ticket),
            )
            return pb.ToWorker(handover=handover)
        case Prefetch(ticket, prompt):
            return pb.ToWorker(prefetch=pb.Prefetch(ticket=_ticket(ticket), prompt=prompt))
        case Release(id):
            return pb.ToWorker(release=id)
        case Cancel(id):
            return pb.ToWorker(cancel=id)
    raise TypeError(f"{type(message).__name__} is not for other processes")


def decode_message(sent: pb.ToWorker, now: float) -> Message:
    """Raises ValueError for what is none."""
    match sent.WhichOneof("kind"):
        case "submit":
            return Submit(_to_request(sent.submit, now), dict(sent.submit.trace))
        case "handover":
            handover = sent.handover
            return Handover(
                _to_request(handover.request, now),
                tuple(handover.tokens),
                now - handover.first_token_age_s,
                _to_ticket(handover.ticket),
                dict(handover.request.trace),
            )
        case "prefetch":
            return Prefetch(_to_ticket(sent.prefetch.ticket), tuple(sent.prefetch.prompt))
        case "release":
            return Release(sent.release)
        case "cancel":
            return Cancel(sent.cancel)
    raise ValueError(f"{sent.WhichOneof('kind')} is no message for a worker")


# What a worker says.


def encode_event(event: Event, now: float) -> pb.FromWorker:
    """An event, without the instance's id: the router knows it by one of its own."""
    match event:
        case Stepped(outputs):
            return pb.FromWorker(stepped=pb.Stepped(outputs=[_output(o, now) for o in outputs]))
        case Offered(id, ticket):
            return pb.FromWorker(offered=pb.Offered(id=id, ticket=_ticket(ticket)))
        case Moved(id, at):
            return pb.FromWorker(moved=pb.Moved(id=id, age_s=now - at))
        case Lost(id, error):
            return pb.FromWorker(lost=pb.Lost(id=id, error=_error(error)))
        case Died(_, error):
            return pb.FromWorker(died=pb.Died(error=_error(error)))
        case Outlined(_, summary, num_received):
            return pb.FromWorker(outlined=_outlined(summary, num_received, now))
        case Returned(id, ticket):
            unclaimed = None if ticket is None else _ticket(ticket)
            return pb.FromWorker(returned=pb.Returned(id=id, ticket=unclaimed))
        case Draining():
            return pb.FromWorker(draining=pb.Draining())
    raise TypeError(f"{type(event).__name__} is not for other processes")


def decode_event(said: pb.FromWorker, instance: str, role: Role, now: float) -> Event:
    """instance: the worker's id here. Raises ValueError for what is no event."""
    match said.WhichOneof("kind"):
        case "stepped":
            return Stepped(tuple(_to_output(output, now) for output in said.stepped.outputs))
        case "offered":
            return Offered(said.offered.id, _to_ticket(said.offered.ticket))
        case "moved":
            return Moved(said.moved.id, now - said.moved.age_s)
        case "lost":
            return Lost(said.lost.id, RemoteError(said.lost.error))
        case "died":
            return Died(instance, RemoteError(said.died.error))
        case "outlined":
            outlined = said.outlined
            summary = Summary(
                instance,
                role,
                outlined.free_s,
                [now + due for due in outlined.due_in_s],
                list(outlined.ahead_s),
                outlined.pace,
                outlined.load,
                outlined.room,
                outlined.end_s,
                outlined.parked_room,
            )
            return Outlined(instance, summary, outlined.num_received)
        case "returned":
            returned = said.returned
            ticket = _to_ticket(returned.ticket) if returned.HasField("ticket") else None
            return Returned(returned.id, ticket)
        case "draining":
            return Draining(instance)
    raise ValueError(f"{said.WhichOneof('kind')} is no event of a worker")


def encode_pong(status: Status) -> pb.FromWorker:
    """Answers a Ping."""
    return pb.FromWorker(pong=pb.Pong(status=pb.Status(**asdict(status))))


def decode_pong(said: pb.Pong) -> Status | None:
    """None: of a worker that does not tell."""
    if not said.HasField("status"):
        return None
    told: dict[str, Any] = {each.name: getattr(said.status, each.name) for each in fields(Status)}
    return replace(Status(**told), begun=tuple(said.status.begun))


def encode_welcome(welcome: Welcome) -> pb.FromWorker:
    """Answers a Hello."""
    limits = welcome.limits
    return pb.FromWorker(
        welcome=pb.Welcome(
            instance=welcome.instance,
            incarnation=welcome.incarnation,
            role=welcome.role.value,
            model=welcome.model,
            fingerprint=welcome.fingerprint,
            dtype=welcome.dtype,
            limits=pb.Limits(
                max_batch=limits.max_batch,
                max_chunk=limits.max_chunk,
                max_context=limits.max_context,
                page_size=limits.page_size,
                num_pages=limits.num_pages,
                parked_tokens=limits.parked_tokens,
            ),
            # Samples are for people who look at the fit.
            profile_json=json.dumps({k: v for k, v in welcome.profile.items() if k != "samples"}),
            mesh_size=welcome.mesh_size,
            device_kind=welcome.device_kind,
            kv_address=welcome.kv_address,
            prefix_cache=welcome.prefix_cache,
        )
    )


def decode_welcome(said: pb.FromWorker) -> Welcome:
    """Raises ValueError for what is none, or has a field that makes no sense."""
    if said.WhichOneof("kind") != "welcome":
        raise ValueError(f"a Hello was answered by {said.WhichOneof('kind')}, not by a Welcome")
    welcome, limits = said.welcome, said.welcome.limits
    return Welcome(
        instance=welcome.instance,
        incarnation=welcome.incarnation,
        role=Role(welcome.role),
        model=welcome.model,
        fingerprint=welcome.fingerprint,
        dtype=welcome.dtype,
        limits=Limits(
            limits.max_batch,
            limits.max_chunk,
            limits.max_context,
            limits.page_size,
            limits.num_pages,
            limits.parked_tokens,
        ),
        profile=json.loads(welcome.profile_json),
        mesh_size=welcome.mesh_size,
        device_kind=welcome.device_kind,
        kv_address=welcome.kv_address,
        prefix_cache=welcome.prefix_cache,
    )


# Their parts.


def _request(request: Request, now: float, trace: Mapping[str, str]) -> pb.Request:
    how = request.sampling
    return pb.Request(
        id=request.id,
        age_s=now - request.arrival,
        prompt=request.prompt,
        max_tokens=request.max_tokens,
        ttft_s=request.slo.ttft,
        tpot_s=request.slo.tpot,
        stop=sorted(request.stop),
        sampling=None if how is None else _sampling(how),
        serial=request.serial,
        trace=trace,
    )


def _to_request(sent: pb.Request, now: float) -> Request:
    return Request(
        sent.id,
        now - sent.age_s,
        list(sent.prompt),
        sent.max_tokens,
        Slo(sent.ttft_s, sent.tpot_s),
        frozenset(sent.stop),
        _to_sampling(sent.sampling) if sent.HasField("sampling") else None,
        sent.serial,
    )


def _sampling(how: SamplingParams) -> pb.Sampling:
    return pb.Sampling(
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        min_p=how.min_p,
        seed=how.seed,
        logprobs=how.logprobs,
        prompt_logprobs=how.prompt_logprobs,
    )


def _to_sampling(sent: pb.Sampling) -> SamplingParams:
    return SamplingParams(
        sent.temperature,
        sent.top_k,
        sent.top_p,
        sent.min_p,
        sent.seed,
        sent.logprobs if sent.HasField("logprobs") else None,
        sent.prompt_logprobs if sent.HasField("prompt_logprobs") else None,
    )


def _ticket(ticket: Ticket) -> pb.Ticket:
    return pb.Ticket(
        request_id=ticket.request_id,
        num_tokens=ticket.num_tokens,
        uuid=ticket.uuid,
        address=ticket.address,
    )


def _to_ticket(sent: pb.Ticket) -> Ticket:
    return Ticket(sent.request_id, sent.num_tokens, sent.uuid, sent.address)


def _output(output: Output, now: float) -> pb.Output:
    token, ticket = output.token, output.ticket
    return pb.Output(
        id=output.id,
        token=token.id,
        logprob=token.logprob,
        top=[pb.Alternative(token=id, logprob=logprob) for id, logprob in token.top],
        begun_age_s=now - output.begun_at,
        age_s=now - output.at,
        finish_reason=output.finish_reason,
        ticket=None if ticket is None else _ticket(ticket),
        cached=output.cached,
        prompt=None if token.prompt is None else pb.PromptLogprobs(**token.prompt._asdict()),
    )


def _to_output(said: pb.Output, now: float) -> Output:
    token = Token(
        said.token,
        said.logprob if said.HasField("logprob") else None,
        tuple((each.token, each.logprob) for each in said.top),
        _to_prompt_logprobs(said.prompt) if said.HasField("prompt") else None,
    )
    return Output(
        said.id,
        token,
        now - said.begun_age_s,
        now - said.age_s,
        said.finish_reason if said.HasField("finish_reason") else None,
        _to_ticket(said.ticket) if said.HasField("ticket") else None,
        said.cached,
    )


def _to_prompt_logprobs(said: pb.PromptLogprobs) -> PromptLogprobs:
    return PromptLogprobs(tuple(said.logprobs), tuple(said.top_ids), tuple(said.top_logprobs))


def _outlined(summary: Summary, num_received: int, now: float) -> pb.Outlined:
    return pb.Outlined(
        free_s=summary.free_s,
        due_in_s=[deadline - now for deadline in summary.deadline],
        ahead_s=summary.ahead_s,
        pace=summary.pace,
        load=summary.load,
        room=summary.room,
        num_received=num_received,
        end_s=summary.end_s,
        parked_room=summary.parked_room,
    )


def _error(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
