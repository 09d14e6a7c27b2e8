"""Why a request waited: its timeline, from the journal of a run, live or simulated."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from schedulers.ledger.instance import Batch, Instance, Policy
from schedulers.ledger.journal import Event, Ledgers, Record, some
from schedulers.ledger.request import Request, Seq
from schedulers.ledger.rows import Column
from schedulers.simulation.attainment import Outcome

# Ids named as having run in its stead.
_NAMED = 4
# What a decision means for the request: words for a span of those that pass it over. Steps that
# leave a decoding one out are told with those that it is in.
_QUEUED = "in the queue of {}"
_COMPUTES = "in the prefill of {}"
_PREEMPTED = "preempted on {}"
_FAR = "its KV not yet fetched by {}"
_HERE = "its KV on {}, not yet admitted"
_DECODES = "held back on {}"
_PLACED = {"stay": "kept at", "hand_over": "leaves", "give_back": "given back by"}
_FIGURE = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?")


def explain(
    records: Iterable[Record], policies: Mapping[str, Policy], request_id: str
) -> list[str]:
    """The timeline of one request: a line for each thing that happened, or went on for a while, at
    its time in seconds since the request's arrival.

    policies: by instance id. One that has a method `verdict(instance, now, id) -> str` is asked at
    each decision what it thought of the request; else the line tells when its next token was due.

    Raises ValueError if no such request is in the journal, or if the journal is malformed.
    """
    ledgers, timeline = Ledgers(), _Timeline(request_id, policies)
    ids: dict[str, None] = {}
    for record in records:
        event = ledgers.read(record)
        if event.verb == "add":
            ids[event.args[0].id] = None
        timeline.before(event)
        timeline.after(event, ledgers.apply(event))
    if request_id not in ids:
        raise ValueError(f"no request {request_id!r} in the journal; it has {some(ids)}")
    return timeline.finish()


@dataclass(slots=True)
class _Span:
    """Decisions in a row that meant the same for the request.

    key: what they meant, where, and what the policy thought of it, but for the figures. why: that,
    at first and at last. num_passed: how often it was passed over; rivals: the requests that took
    its place. num_steps, sizes, tokens, took_s, predicted_s: of the steps that it was in.
    """

    key: tuple[str, str, str]
    begun_at: float
    why: tuple[str, str]
    num_passed: int = 0
    rivals: dict[str, None] = field(default_factory=dict)
    num_steps: int = 0
    sizes: set[int] = field(default_factory=set)
    tokens: int = 0
    took_s: float = 0.0
    predicted_s: float = 0.0

    def tell(self, now: float) -> str:
        """In words. It ends at `now`."""
        kind, where, _ = self.key
        why = self.why[0] if self.why[0] == self.why[1] else f"{self.why[0]} -> {self.why[1]}"
        rivals = some(self.rivals, _NAMED) if self.rivals else "nobody"
        if not self.num_steps:
            over = f"{_count(self.num_passed, 'time')} in {_s(now - self.begun_at)}"
            return f"{kind.format(where)}, passed over {over} for {rivals}; {why}"
        least, most = min(self.sizes), max(self.sizes)
        text = _count(self.num_steps, "step")
        if kind == _COMPUTES:
            text = f"computed {_count(self.tokens, 'prompt token')} in {text}"
        text += f" on {where}, of a batch of {least}" + (f" to {most}" if most > least else "")
        text += f": took {_s(self.took_s)}, predicted {_s(self.predicted_s)}"
        if self.num_passed:
            text += f"; left out of {self.num_passed} more, for {rivals}"
        return f"{text}; {why}"


@dataclass(slots=True)
class _Step:
    """A step that the request is in. begun_at: or when the step before it ended."""

    instance: Instance
    seq: Seq
    batch: Batch
    begun_at: float


class _Timeline:
    """Listens to all events of a run and writes down what they meant for one request."""

    def __init__(self, id: str, policies: Mapping[str, Policy]):
        self.id, self.policies = id, policies
        self.lines: list[str] = []
        self._request: Request | None = None
        self._span: _Span | None = None
        self._steps: list[_Step] = []  # that it is in, under way
        self._fetch_at = self._last_at = -math.inf
        self._where = ""

    def before(self, event: Event) -> None:
        """Looks at what is decided, on the ledger as the policy saw it."""
        self._last_at = max(self._last_at, event.at)
        if event.verb == "begin":
            self._decided(event.instance, event.batch, event.at)
        elif event.verb == "cancel" and event.id == self.id and event.instance.get(self.id):
            self._say(event.at, f"cancelled on {event.instance.id}")
            self._where = ""
        elif event.verb == "copied" and event.id == self.id:
            self._copied(event)

    def after(self, event: Event, left: list[Seq]) -> None:
        """Looks at what came of it."""
        if event.verb == "end" and self._steps:
            if self._steps[0].batch is event.batch:
                self._ended(event, self._steps.pop(0), left)
            for behind in self._steps:
                if behind.instance is event.instance:
                    behind.begun_at = event.at
        elif event.verb == "add" and event.id == self.id:
            self._added(event)
        elif event.verb == "fetched" and event.id == self.id:
            took_s = event.at - self._fetch_at
            self._say(event.at, f"its KV is on {event.instance.id}: the transfer took {_s(took_s)}")
        elif event.verb in _PLACED and event.id == self.id:
            _, why = event.args
            self._say(event.at, f"{_PLACED[event.verb]} {event.instance.id}: {why}")
            if event.verb == "give_back":
                self._where = ""

    def finish(self) -> list[str]:
        """The lines; where the journal ends before the request did, the last one says so."""
        if self._where:
            self._say(self._last_at, f"the journal ends here, with the request on {self._where}")
        return self.lines

    def _copied(self, event: Event) -> None:
        """Says so of what was evicted; the KV of a prompt is told of as parked."""
        if seq := event.instance.evicting.get(self.id):
            pages = _count(len(seq.pages), "page")
            self._say(event.at, f"its KV is copied out; {event.instance.id} takes back {pages}")

    def _added(self, event: Event) -> None:
        request, num_tokens, _ = event.args
        instance = event.instance
        self._where = instance.id
        known = self._request
        if known is None or not (num_tokens or known.arrival == request.arrival):
            self._request, slo = request, request.slo
            self._say(
                request.arrival,
                f"arrived: {_count(len(request.prompt), 'prompt token')}, max_tokens "
                f"{request.max_tokens}, SLO TTFT {slo.ttft:g} s and TPOT {slo.tpot:g} s",
            )
        self._say(
            event.at,
            f"{'handed over to' if num_tokens else 'queued on'} {instance.id}, beside "
            f"{len(instance.waiting) - 1} waiting and {len(instance.running)} running",
        )

    def _decided(self, instance: Instance, batch: Batch, now: float) -> None:
        waits = self.id in instance.waiting
        seq = instance.waiting.get(self.id) or instance.running.get(self.id)
        if seq is None or (seq.pages and not seq.ready) or (seq.ready and instance.under_way):
            return  # It is not here, its KV is under way, or a step is: nothing is to decide.
        why = self._why(instance, seq, now)
        if self.id in batch.evict:
            self._say(now, f"evicted from {instance.id}, which copies its KV out; {why}")
        elif self.id in batch.fetch:
            self._fetch_at = now
            self._say(now, f"{instance.id} fetches its KV of {seq.computed} tokens; {why}")
        elif self.id in batch.work:
            step_s = instance.pace * batch.predicted_s
            if waits and seq.num_tokens:
                self._say(
                    now,
                    f"admitted to a batch of {len(batch.work)} on {instance.id}, whose step is "
                    f"predicted to take {_s(step_s)}; {why}",
                )
            span = self._go_on(_DECODES if seq.num_tokens else _COMPUTES, instance, now, why)
            span.num_steps += 1
            span.sizes.add(len(batch.work))
            span.tokens += batch.work[self.id]
            span.predicted_s += step_s
            self._steps.append(_Step(instance, seq, batch, now))
        elif batch:
            kind, rivals = _passed_over(instance, batch, seq)
            span = self._go_on(kind, instance, now, why)
            span.num_passed += 1
            span.rivals.update(dict.fromkeys(rivals))

    def _ended(self, event: Event, step: _Step, left: list[Seq]) -> None:
        now, seq = event.at, step.seq
        request = seq.request
        if self._span is not None:
            self._span.took_s += now - step.begun_at
        if seq.first_token_at == now:
            took_s = now - request.arrival
            self._say(now, f"first token: TTFT {_against(took_s, request.slo.ttft)}")
        if not any(each is seq for each in left):
            return
        if seq.finish_reason is None:
            self._say(now, f"parked on {event.instance.id}, until its KV is fetched")
            return
        outcome = Outcome(request.slo, request.arrival, seq.first_token_at, now, seq.num_tokens)
        text = f"finished ({seq.finish_reason}) with {_count(seq.num_tokens, 'token')}"
        if outcome.tpot_s is not None:
            text += f": TPOT {_against(outcome.tpot_s, request.slo.tpot)}"
        self._say(now, text)
        missed = [
            name
            for name, met in (("TTFT", outcome.met_ttft), ("TPOT", outcome.met_tpot))
            if not met
        ]
        self._say(now, f"SLO missed: {' and '.join(missed)}" if missed else "SLO attained")
        self._where = ""

    def _why(self, instance: Instance, seq: Seq, now: float) -> str:
        verdict = getattr(self.policies.get(instance.id), "verdict", None)
        if verdict is not None:
            return verdict(instance, now, self.id)
        which = "next" if seq.num_tokens else "first"
        due = float(seq.cells[Column.DUE]) if seq.num_tokens else seq.request.deadline
        late = now > due
        return f"{which} token {'overdue by' if late else 'due in'} {_s(abs(due - now))}"

    def _go_on(self, kind: str, instance: Instance, now: float, why: str) -> _Span:
        """The span of such decisions: the one at hand, or one that begins now."""
        key = kind, instance.id, _FIGURE.sub("#", why)
        if self._span is None or self._span.key != key:
            self._close(now)
            self._span = _Span(key, now, (why, why))
        self._span.why = self._span.why[0], why
        return self._span

    def _close(self, now: float) -> None:
        span, self._span = self._span, None
        if span is not None:
            self._write(span.begun_at, span.tell(now))

    def _say(self, at: float, text: str) -> None:
        self._close(at)
        self._write(at, text)

    def _write(self, at: float, text: str) -> None:
        assert self._request is not None
        self.lines.append(f"{at - self._request.arrival:10.4f} s  {text}")


def _passed_over(instance: Instance, batch: Batch, seq: Seq) -> tuple[str, list[str]]:
    """In what state it was passed over, and the requests that took its place."""
    runs = seq.request.id in instance.running
    if not seq.num_tokens:
        chunks = [id for id in batch.work if not _at(instance, id).num_tokens]
        return (_PREEMPTED if runs else _QUEUED), chunks
    if runs:
        return _DECODES, list(batch.work)
    admitted = [id for id in batch.work if id in instance.waiting]
    return (_HERE if seq.ready else _FAR), [*batch.fetch, *admitted]


def _at(instance: Instance, id: str) -> Seq:
    return instance.waiting.get(id) or instance.running[id]


def _s(seconds: float) -> str:
    return f"{seconds:.4f} s"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _against(took_s: float, limit_s: float) -> str:
    side = "within" if took_s <= limit_s else "over"
    return f"{_s(took_s)}, {_s(abs(limit_s - took_s))} {side} the {limit_s:g} s of its SLO"
