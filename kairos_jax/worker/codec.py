"""The table of messages between routers and workers: each with its form in internal.proto, and by
what its receiver finds the request, instance or call that it is for.

Times go out as ages and come in as times of the receiver's clock: `now` is when a message is
written, or was read. They are off by how long it was on its way.

A new message is a class in `messages.py`, a field in internal.proto, a row (`Entry`) here, and the
code that handles it.
"""

import enum
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from kairos_jax.engine.calls import PromptLogprobs, Token
from kairos_jax.kv.transport import Ticket
from kairos_jax.rpc import internal_pb2 as pb
from kairos_jax.worker.messages import (
    Cancel,
    Died,
    Draining,
    Failed,
    GoOn,
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

# Of internal.proto: the version of this process, and the oldest with which it still works. Routers
# and workers may so be replaced one after another. A new version may add fields and kinds of
# messages that an older peer can ignore, and must work without them; what changes the meaning of a
# field, or must be understood, raises OLDEST.
VERSION, OLDEST = 4, 3
SERVICE = "kairos.internal.v1.Worker"
# A prompt of a million tokens, and what else a message has.
MAX_MESSAGE_BYTES = 16 << 20


class RemoteError(Exception):
    """What went wrong in another process."""


class For(enum.Enum):
    """By which attribute its receiver finds the request, instance or call of a message."""

    CALL = ""  # the two ends of the call
    REQUEST = "id"
    OUTPUTS = "outputs"  # each for a request of its own
    INSTANCE = "instance"


@dataclass(frozen=True, slots=True)
class Sender:
    """Of a message that was read. now: when, on the reader's clock. instance: the id by which the
    reader knows a worker; role: that worker's.
    """

    now: float = 0.0
    instance: str = ""
    role: Role = Role.BOTH


@dataclass(frozen=True, slots=True)
class Entry:
    """One kind of message. field: of the `kind` of a ToWorker or FromWorker. write: what that field
    is set to, for a message and the time now; read: the message again.
    """

    kind: type
    field: str
    receiver: For
    write: Callable[[Any, float], Any]
    read: Callable[[Any, Sender], Any]


TO_WORKER = (
    Entry(
        Hello,
        "hello",
        For.CALL,
        lambda message, now: pb.Hello(
            router=message.router, version=message.version, oldest=message.oldest
        ),
        lambda sent, sender: Hello(sent.router, sent.version, sent.oldest or sent.version),
    ),
    Entry(Ping, "ping", For.CALL, lambda message, now: pb.Ping(), lambda sent, sender: Ping()),
    Entry(
        Submit,
        "submit",
        For.REQUEST,
        lambda message, now: _request(message.request, now, message.trace),
        lambda sent, sender: Submit(_to_request(sent, sender.now), dict(sent.trace)),
    ),
    Entry(
        Handover,
        "handover",
        For.REQUEST,
        lambda message, now: pb.Handover(
            request=_request(message.request, now, message.trace),
            tokens=message.tokens,
            first_token_age_s=now - message.first_token_at,
            ticket=_ticket(message.ticket),
        ),
        lambda sent, sender: Handover(
            _to_request(sent.request, sender.now),
            tuple(sent.tokens),
            sender.now - sent.first_token_age_s,
            _to_ticket(sent.ticket),
            dict(sent.request.trace),
        ),
    ),
    Entry(
        Prefetch,
        "prefetch",
        For.REQUEST,
        lambda message, now: pb.Prefetch(ticket=_ticket(message.ticket), prompt=message.prompt),
        lambda sent, sender: Prefetch(_to_ticket(sent.ticket), tuple(sent.prompt)),
    ),
    Entry(
        Release,
        "release",
        For.REQUEST,
        lambda message, now: message.id,
        lambda sent, sender: Release(sent),
    ),
    Entry(
        Cancel,
        "cancel",
        For.REQUEST,
        lambda message, now: message.id,
        lambda sent, sender: Cancel(sent),
    ),
    Entry(
        Stay,
        "stay",
        For.REQUEST,
        lambda message, now: pb.Place(id=message.id, why=message.why),
        lambda sent, sender: Stay(sent.id, sent.why),
    ),
    Entry(
        GoOn,
        "go_on",
        For.REQUEST,
        lambda message, now: pb.Place(id=message.id, why=message.why),
        lambda sent, sender: GoOn(sent.id, sent.why),
    ),
    Entry(
        Recall,
        "recall",
        For.REQUEST,
        lambda message, now: pb.Place(id=message.id, why=message.why),
        lambda sent, sender: Recall(sent.id, sent.why),
    ),
)

FROM_WORKER = (
    Entry(
        Welcome,
        "welcome",
        For.CALL,
        lambda message, now: _welcome(message),
        lambda said, sender: _to_welcome(said),
    ),
    Entry(
        Pong,
        "pong",
        For.CALL,
        lambda message, now: pb.Pong(status=message.status and _status(message.status)),
        lambda said, sender: Pong(_to_status(said.status) if said.HasField("status") else None),
    ),
    Entry(
        Stepped,
        "stepped",
        For.OUTPUTS,
        lambda event, now: pb.Stepped(outputs=[_output(each, now) for each in event.outputs]),
        lambda said, sender: Stepped(tuple(_to_output(each, sender.now) for each in said.outputs)),
    ),
    Entry(
        Offered,
        "offered",
        For.REQUEST,
        lambda event, now: pb.Offered(id=event.id, ticket=_ticket(event.ticket)),
        lambda said, sender: Offered(said.id, _to_ticket(said.ticket)),
    ),
    Entry(
        Parked,
        "parked",
        For.REQUEST,
        lambda event, now: pb.Offered(id=event.id, ticket=_ticket(event.ticket)),
        lambda said, sender: Parked(said.id, _to_ticket(said.ticket)),
    ),
    Entry(
        Moved,
        "moved",
        For.REQUEST,
        lambda event, now: pb.Moved(id=event.id, age_s=now - event.at),
        lambda said, sender: Moved(said.id, sender.now - said.age_s),
    ),
    Entry(
        Lost,
        "lost",
        For.REQUEST,
        lambda event, now: pb.Lost(id=event.id, error=_error(event.error)),
        lambda said, sender: Lost(said.id, RemoteError(said.error)),
    ),
    Entry(
        Failed,
        "failed",
        For.REQUEST,
        lambda event, now: pb.Failed(id=event.id, cause=event.cause, error=event.error),
        lambda said, sender: Failed(said.id, said.cause, said.error),
    ),
    Entry(
        Returned,
        "returned",
        For.REQUEST,
        lambda event, now: pb.Returned(id=event.id, ticket=event.ticket and _ticket(event.ticket)),
        lambda said, sender: Returned(
            said.id, _to_ticket(said.ticket) if said.HasField("ticket") else None
        ),
    ),
    Entry(
        Kept,
        "kept",
        For.REQUEST,
        lambda event, now: event.id,
        lambda said, sender: Kept(said),
    ),
    Entry(
        Outlined,
        "outlined",
        For.INSTANCE,
        lambda event, now: _outlined(event, now),
        lambda said, sender: _to_outlined(said, sender),
    ),
    Entry(
        Draining,
        "draining",
        For.INSTANCE,
        lambda event, now: pb.Draining(),
        lambda said, sender: Draining(sender.instance),
    ),
    Entry(
        Died,
        "died",
        For.INSTANCE,
        lambda event, now: pb.Died(error=_error(event.error), aboard=event.aboard or ()),
        lambda said, sender: Died(sender.instance, RemoteError(said.error), tuple(said.aboard)),
    ),
)

_TO_WORKER, _FROM_WORKER = (
    {entry.kind: entry for entry in table} for table in (TO_WORKER, FROM_WORKER)
)
_BY_FIELD = {
    form: {entry.field: entry for entry in table}
    for form, table in ((pb.ToWorker, TO_WORKER), (pb.FromWorker, FROM_WORKER))
}


def encode(message: Any, now: float) -> pb.ToWorker | pb.FromWorker:
    """Raises TypeError for a message that does not leave the process."""
    kind = type(message)
    if entry := _TO_WORKER.get(kind):
        return pb.ToWorker(**{entry.field: entry.write(message, now)})
    if entry := _FROM_WORKER.get(kind):
        return pb.FromWorker(**{entry.field: entry.write(message, now)})
    raise TypeError(f"{kind.__name__} is not for other processes")


def decode(sent: pb.ToWorker | pb.FromWorker, sender: Sender) -> Any:
    """Raises ValueError for what is no message, or has a field that makes no sense."""
    field = sent.WhichOneof("kind")
    entry = _BY_FIELD[type(sent)].get(field or "")
    if entry is None:
        raise ValueError(f"{field} is no kind of {type(sent).__name__}")
    return entry.read(getattr(sent, entry.field), sender)


def check_version(version: int, oldest: int) -> None:
    """Raises ValueError for a peer with which this process does not work. version, oldest: its."""
    if version < OLDEST or oldest > VERSION:
        raise ValueError(
            f"its protocol has version {version} and works with {oldest} or newer; this process "
            f"has {VERSION} and works with {OLDEST} or newer"
        )


def address_of(event: Any) -> tuple[For, Any]:
    """What kind of receiver an event of a worker's has, and the attribute that names it."""
    receiver = _FROM_WORKER[type(event)].receiver
    return receiver, getattr(event, receiver.value)


# The parts of messages.


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
        sampling=None if how is None else pb.Sampling(**_fields(how)),
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
    return pb.Ticket(**_fields(ticket))


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


def _outlined(event: Outlined, now: float) -> pb.Outlined:
    summary = event.summary
    return pb.Outlined(
        free_s=max(summary.free_at - now, 0.0),
        due_in_s=[deadline - now for deadline in summary.deadline],
        ahead_s=summary.ahead_s,
        pace=summary.pace,
        load=summary.load,
        room=summary.room,
        num_received=event.num_received,
        end_s=summary.end_s,
        parked_room=summary.parked_room,
        flows=summary.flows,
        receives=summary.receives,
        num_late=summary.num_late,
        late=summary.late,
        spare=summary.spare,
    )


def _to_outlined(said: pb.Outlined, sender: Sender) -> Outlined:
    summary = Summary(
        sender.instance,
        sender.role,
        sender.now + said.free_s,
        [sender.now + due for due in said.due_in_s],
        list(said.ahead_s),
        said.pace,
        said.load,
        said.room,
        said.end_s,
        said.parked_room,
        said.flows,
        said.receives,
        said.num_late,
        tuple(said.late),
        said.spare,
    )
    return Outlined(sender.instance, summary, said.num_received)


def _status(status: Status) -> pb.Status:
    return pb.Status(**_fields(status))


def _to_status(said: pb.Status) -> Status:
    told = _told(said, Status)
    told["begun"] = tuple(said.begun)
    return Status(**told)


def _welcome(welcome: Welcome) -> pb.Welcome:
    # Samples are for people who look at the fit.
    profile = {key: value for key, value in welcome.profile.items() if key != "samples"}
    told = _fields(welcome) | {
        "role": welcome.role.value,
        "limits": pb.Limits(**_fields(welcome.limits)),
        "profile_json": json.dumps(profile),
    }
    del told["profile"]
    return pb.Welcome(**told)


def _to_welcome(said: pb.Welcome) -> Welcome:
    told = _told(said, Welcome)
    told["role"] = Role(said.role)
    told["limits"] = Limits(**_told(said.limits, Limits))
    told["profile"] = json.loads(said.profile_json)
    return Welcome(**told)


def _fields(record: Any) -> dict[str, Any]:
    """Of a dataclass, by name: the message that says it has fields of the same names."""
    return {each.name: getattr(record, each.name) for each in fields(record)}


def _told(said: Any, kind: type) -> dict[str, Any]:
    """What a message says of the fields of a dataclass; not those that it has under other names."""
    names = (each.name for each in fields(kind))
    return {name: getattr(said, name) for name in names if hasattr(said, name)}


def _error(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
