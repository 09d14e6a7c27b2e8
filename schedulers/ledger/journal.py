"""A record of all that happened to the ledgers of a run: every decision can be replayed from it.

A record is a plain sequence, a line of JSON: instance id, verb, time in seconds, and what the verb
was told. No prompt's text or token ids are in it.

    "instance"  role, limits by name (null for infinity), learn_outputs, and whether it receives if
                it does: an instance's first record
    "add"       [id, arrival, num_prompt, max_tokens, ttft, tpot, serial, and page_keys if it has
                any], num_tokens, first_token_at
    "begin"     whole, work, fetch, evict, predicted_s
    "expect"    nothing
    "end"       stopped
    "fetched", "copied", "release", "cancel"    id
    "stay", "hand_over", "give_back"    id, why

whole: every running sequence takes a token, in the order of its row, and `work` is only what is
added to them. So the usual decode step costs a few bytes, however large its batch is.
"""

import dataclasses
import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from schedulers.ledger.instance import Batch, Instance, Limits, Policy, Role, during_step
from schedulers.ledger.request import Request, Seq, Slo

Record = Sequence[Any]

_WITH_WHY = frozenset({"stay", "hand_over", "give_back"})
_OF_AN_ID = frozenset({"fetched", "copied", "release", "cancel"}) | _WITH_WHY
# Ids that a message names at most.
_NAMED = 5


class Journal:
    """Collects the records of the instances of one run, from whichever threads drive them.

    clock: the time of verbs that are not told it, on the ledgers' own clock.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._records: deque[Record] = deque()

    def recorder(self, instance: Instance) -> Callable[..., None]:
        """What to set as `instance.journal`, while its ledger is new."""
        if instance.waiting or instance.running or instance.parked or instance.outputs.num_finished:
            raise ValueError(f"instance {instance.id!r} must be new to be journaled from its start")
        id, clock, append = instance.id, self._clock, self._records.append
        limits = dataclasses.asdict(instance.limits)
        if math.isinf(instance.limits.parked_tokens):
            limits["parked_tokens"] = None
        receives = (True,) if instance.receives else ()
        kind = instance.role.value, limits, instance.outputs.learn
        append((id, "instance", clock(), *kind, *receives))

        def record(verb: str, *args: Any) -> None:
            match verb:
                case "begin":
                    now, batch = args
                    append((id, verb, now, *_pack(instance, batch)))
                case "expect":
                    (now,) = args
                    append((id, verb, now))
                case "end":
                    now, _, stopped = args
                    append((id, verb, now, stopped))
                case "add":
                    request, *handed_over = args
                    append((id, verb, clock(), _fields(request), *handed_over))
                case _:
                    append((id, verb, clock(), *args))

        return record

    def take(self) -> Iterator[Record]:
        """The records since the last call, which are then forgotten here."""
        while self._records:
            yield self._records.popleft()


def to_lines(records: Iterable[Record]) -> Iterator[str]:
    """A line of JSON each. Floats come back the same to the last bit."""
    encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=_number).encode
    return (encode(record) + "\n" for record in records)


def from_lines(lines: Iterable[str]) -> Iterator[Record]:
    """The records of `lines`, of which the last may be cut short, as by a killed writer.

    Raises ValueError with the number of a line that is no record.
    """
    wrong = ""
    for number, line in enumerate(lines, 1):
        if wrong:
            raise ValueError(wrong)
        try:
            record = json.loads(line)
        except ValueError as error:
            wrong = f"line {number} of the journal is no JSON: {error}"
            continue
        if not isinstance(record, list) or len(record) < 3:
            raise ValueError(f"line {number} of the journal is no record: {line[:80].strip()}")
        yield record


@dataclass(frozen=True, slots=True)
class Event:
    """A record read back. args: what `verb` of the ledger is called with. number: from 1."""

    number: int
    instance: Instance
    verb: str
    at: float
    args: tuple[Any, ...]

    @property
    def batch(self) -> Batch:
        """Of "begin" and "end"."""
        return self.args[0]

    @property
    def id(self) -> str | None:
        """The request's, where the verb is of one."""
        if self.verb == "add":
            return self.args[0].id
        return self.args[0] if self.verb in _OF_AN_ID else None


class Ledgers:
    """The ledgers of a run, brought to life again record by record: `read`, look, `apply`."""

    def __init__(self) -> None:
        self.instances: dict[str, Instance] = {}
        self._num_read = 0

    def read(self, record: Record) -> Event:
        """What the next record says. Changes no ledger. Raises ValueError with its number."""
        self._num_read += 1
        try:
            id, verb, at, *args = record
            if verb == "instance":
                self.instances[id] = _instance(id, *args)
            instance = self.instances[id]
            return Event(self._num_read, instance, verb, at, _args(instance, verb, at, args))
        except (ValueError, TypeError, LookupError) as error:
            where = f"record {self._num_read} ({str(record)[:80]})"
            raise ValueError(f"{where} is malformed: {error!r}") from error

    def apply(self, event: Event) -> list[Seq]:
        """Does to the ledger what was done to it. Returns what `end` returned, else nothing."""
        instance = event.instance
        if event.verb == "instance":
            return []
        try:
            left = getattr(instance, event.verb)(*event.args)
        except Exception as error:
            raise ValueError(
                f"record {event.number} ({event.verb} on instance {instance.id!r}) cannot follow "
                f"those before it: {error!r}"
            ) from error
        return left if event.verb == "end" else []


@dataclass(frozen=True, slots=True)
class Decision:
    """A point at which a policy was asked, and what was done: `batch`. The ledger is as it was,
    until the next decision is taken from the iterator. number: of its record.
    """

    number: int
    instance: Instance
    now: float
    batch: Batch

    def again(self, policy: Policy) -> Batch:
        """What would be done if `policy` were asked: while a step is under way, a part of it."""
        batch = policy(self.instance, self.now)
        return during_step(batch) if self.instance.under_way else batch


def replay(records: Iterable[Record]) -> Iterator[Decision]:
    """Every decision of a run that gave something to do, in order, on ledgers made anew."""
    ledgers = Ledgers()
    for record in records:
        event = ledgers.read(record)
        if event.verb == "begin":
            yield Decision(event.number, event.instance, event.at, event.batch)
        ledgers.apply(event)


def check(records: Iterable[Record], policies: Mapping[str, Policy]) -> int:
    """Asks the policies, by instance id, for every decision again.

    Returns how many there were. Raises ValueError at the first that differs, or that has no policy.
    """
    count = 0
    for decision in replay(records):
        id = decision.instance.id
        if id not in policies:
            raise ValueError(f"no policy for instance {id!r}; there are {sorted(policies)}")
        if wrong := differences(decision.batch, decision.again(policies[id])):
            raise ValueError(
                f"record {decision.number}: instance {id!r} decided otherwise at {decision.now} s: "
                + "; ".join(wrong)
            )
        count += 1
    return count


def differences(recorded: Batch, replayed: Batch) -> list[str]:
    """How two decisions differ, in words; none if they are the same, whatever order they name their
    work in.
    """
    wrong = []
    for name in ("fetch", "evict"):
        before, after = getattr(recorded, name), getattr(replayed, name)
        if before != after:
            wrong.append(f"{name} {some(before)} recorded, {some(after)} replayed")
    for text, one, other in (
        ("only recorded", recorded.work, replayed.work),
        ("only replayed", replayed.work, recorded.work),
    ):
        if odd := [f"{id}: {n}" for id, n in one.items() if other.get(id) != n]:
            wrong.append(f"work {text} {some(odd)}")
    if recorded.predicted_s != replayed.predicted_s:
        wrong.append(
            f"predicted_s {recorded.predicted_s} recorded, {replayed.predicted_s} replayed"
        )
    return wrong


def some(names: Iterable[str], count: int = _NAMED) -> str:
    """The first of `names`, and how many more there are; "none" if there are none."""
    named = list(names)
    more = f" and {len(named) - count} more" if len(named) > count else ""
    return ", ".join(named[:count]) + more or "none"


def _pack(instance: Instance, batch: Batch) -> tuple[Any, ...]:
    running, work = instance.running, batch.work
    count = len(running)
    whole = (
        0 < count <= len(work)
        and list(itertools.islice(work, count)) == list(running)
        and sum(itertools.islice(work.values(), count)) == count
    )
    if whole:
        work = dict(itertools.islice(work.items(), count, None))
    return whole, work, batch.fetch, batch.evict, batch.predicted_s


def _args(instance: Instance, verb: str, at: float, args: list[Any]) -> tuple[Any, ...]:
    match verb:
        case "instance":
            return ()
        case "add":
            fields, num_tokens, first_token_at = args
            return _request(*fields), num_tokens, first_token_at
        case "begin":
            return _unpack(instance, *args), at
        case "expect":
            return (at,)
        case "end":
            (stopped,) = args
            return instance.next_to_end, at, tuple(stopped)
        case _ if verb in _WITH_WHY:
            id, why = args
            return id, why
        case _ if verb in _OF_AN_ID:
            (id,) = args
            return (id,)
    raise ValueError(f"unknown verb {verb!r}")


def _unpack(
    instance: Instance,
    whole: bool,
    work: Mapping[str, int],
    fetch: Iterable[str],
    evict: Iterable[str],
    predicted_s: float,
) -> Batch:
    running = dict.fromkeys(instance.running, 1) if whole else {}
    return Batch({**running, **work}, tuple(fetch), tuple(evict), predicted_s)


def _fields(request: Request) -> tuple[Any, ...]:
    slo = request.slo
    lengths = len(request.prompt), request.max_tokens
    keys = (tuple(request.page_keys),) if request.page_keys else ()
    return request.id, request.arrival, *lengths, slo.ttft, slo.tpot, request.serial, *keys


def _request(id, arrival, num_prompt, max_tokens, ttft, tpot, serial, page_keys=()) -> Request:
    slo, prompt = Slo(ttft, tpot), range(num_prompt)
    return Request(id, arrival, prompt, max_tokens, slo, serial=serial, page_keys=page_keys)


def _instance(
    id: str, role: str, limits: Mapping[str, Any], learn_outputs: bool, receives: bool = False
) -> Instance:
    finite = {name: value for name, value in limits.items() if value is not None}
    return Instance(id, Role(role), Limits(**finite), learn_outputs, receives)


def _number(value: Any) -> Any:
    """numpy's numbers as Python's."""
    return value.item()
