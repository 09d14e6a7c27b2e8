"""A run's journal as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing.

A process for each instance, with its steps and counters; and one for the requests, each a row of
the phases that it went through. An arrow leads from the step that made a request's first token to
the first that it was in on the decode side. Time starts at the first record.
"""

import copy
import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from schedulers.ledger.instance import Batch, Instance, Role
from schedulers.ledger.journal import Event, Ledgers, Record
from schedulers.ledger.request import Request, Seq

_REQUESTS = 0  # the process id of the requests; instances follow


def trace_events(records: Iterable[Record]) -> dict[str, Any]:
    """The trace as an object to be written as JSON (the legacy Chrome format: times in us).

    Linear in the number of records. Raises ValueError if the journal is malformed.
    """
    ledgers, trace = Ledgers(), _Trace()
    for record in records:
        trace.add(ledgers, record)
    trace.finish()
    return _whole([*trace.names, *trace.events])


class RecentTrace:
    """The last of a run that goes on: about so many events of its trace, however long it runs.

    Records are added on one thread; the trace may be asked for on others.
    """

    def __init__(self, num_events: int = 50_000):
        self._ledgers, self._trace = Ledgers(), _Trace(num_events)
        self._lock = threading.Lock()

    def add(self, records: Iterable[Record]) -> None:
        """Takes what happened since the last call, from the run's beginning on. Raises ValueError
        if it is malformed.
        """
        for record in records:
            with self._lock:
                self._trace.add(self._ledgers, record)

    def trace(self) -> dict[str, Any]:
        """As of `trace_events`; what had begun before the first event begins with it."""
        with self._lock:
            trace = self._trace.copy()
        trace.finish()
        return _whole([*trace.names, *_clipped(list(trace.events))])


def _whole(events: list[dict[str, Any]]) -> dict[str, Any]:
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _clipped(events: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Events, of which the first are not there any more, without ends that have no beginning."""
    first_us = min((event["ts"] for event in events), default=0.0)
    begun, arrows, whole, before = set(), set(), [], []
    for event in events:
        key = event.get("id"), event["name"]
        match event["ph"]:
            case "b":
                begun.add(key)
            case "e" if key in begun:
                begun.discard(key)
            case "e":
                before.append(event | {"ph": "b", "ts": first_us})
            case "s":
                arrows.add(key)
            case "f" if key not in arrows:
                continue
        whole.append(event)
    # What ends last began first.
    yield from reversed(before)
    yield from whole


@dataclass(slots=True)
class _Step:
    """A step under way. joined: the phases that requests enter with it, by id."""

    batch: Batch
    predicted_s: float
    joined: dict[str, str]
    begun_at: float


class _Trace:
    """names: of the processes. events: the last of them, if there are to be so many at most."""

    def __init__(self, num_events: int | None = None) -> None:
        self.names: list[dict[str, Any]] = []
        self.events: deque[dict[str, Any]] = deque(maxlen=num_events)
        self._origin = math.nan
        self._last_at = -math.inf
        self._pids: dict[str, int] = {}
        self._steps: dict[int, list[_Step]] = {}  # under way, by instance
        # Of requests in progress: the number that is their row, and the phase that they are in.
        self._rows: dict[str, tuple[int, str]] = {}
        self._num_rows = 0
        self._arrows: dict[str, int] = {}
        self._decodes = False  # whether an instance is told of that does
        self._name(_REQUESTS, "requests")

    def copy(self) -> "_Trace":
        """One that may be finished while this goes on."""
        other = copy.copy(self)
        # With room for what is still open.
        other.names, other.events = list(self.names), deque(self.events)
        other._rows, other._arrows = dict(self._rows), dict(self._arrows)
        return other

    def add(self, ledgers: Ledgers, record: Record) -> None:
        """Takes the next record, and does to the ledgers what it says."""
        event = ledgers.read(record)
        self._before(event)
        self._after(event, ledgers.apply(event))

    def _before(self, event: Event) -> None:
        """Notes what an event begins, on the ledger as it was."""
        if math.isnan(self._origin):
            self._origin = event.at
        self._last_at = max(self._last_at, event.at)
        instance = event.instance
        if event.verb == "instance":
            pid = self._pids[instance.id] = len(self._pids) + 1
            self._decodes |= instance.role is not Role.PREFILL
            self._name(pid, f"{instance.id} ({instance.role.value})")
        elif event.verb == "begin":
            self._begun(instance, event.batch, event.at)
        elif event.verb == "cancel" and event.id and instance.get(event.id):
            self._leave(event.id, event.at, "cancelled")
        elif event.verb == "release" and event.id and not self._decodes:
            self._leave(event.id, event.at, "handed over")  # to another process

    def _after(self, event: Event, left: list[Seq]) -> None:
        """Notes what it has led to."""
        match event.verb:
            case "add":
                request, num_tokens, _ = event.args
                if not num_tokens or request.id not in self._rows:
                    self._arrive(request, event.at)
            case "fetched":
                self._phase(event.args[0], "ready", event.at)
            case "begin" if event.batch.work:
                self._count(event.instance, event.batch, event.at)
            case "end":
                self._ended(event, left)

    def finish(self) -> None:
        """Ends what the journal leaves open."""
        for id in list(self._rows):
            self._leave(id, self._last_at, "unfinished")

    def _begun(self, instance: Instance, batch: Batch, now: float) -> None:
        pid = self._pids[instance.id]
        for id in batch.evict:
            self._phase(id, "evicted", now)
        for id in batch.fetch:
            self._phase(id, "transfer", now)
        if batch.evict or batch.fetch:
            args = {"evict": list(batch.evict), "fetch": list(batch.fetch)}
            self._put("i", pid, now, name="moves", s="t", args=args)
        if not batch.work:
            return
        joined = {
            id: "decode" if instance.waiting[id].num_tokens else "prefill"
            for id in batch.work
            if id in instance.waiting
        }
        steps = self._steps.setdefault(pid, [])
        steps.append(_Step(batch, instance.pace * batch.predicted_s, joined, now))
        if len(steps) == 1:
            self._runs(pid, steps[0], now)

    def _runs(self, pid: int, step: _Step, now: float) -> None:
        """A step begins to run: where it was dispatched behind another, when that one has ended."""
        step.begun_at = now
        for id, phase in step.joined.items():
            self._phase(id, phase, now)
            if id in self._arrows:
                arrow = self._arrows.pop(id)
                self._put("f", pid, now, name="hand-over", cat="hand-over", id=arrow, bp="e")

    def _ended(self, event: Event, left: list[Seq]) -> None:
        instance, now = event.instance, event.at
        pid = self._pids[instance.id]
        step = self._steps[pid].pop(0)
        batch, begun_at = step.batch, step.begun_at
        tokens = sum(batch.work.values())
        what = "step" if instance.role is Role.BOTH else instance.role.value
        args = {
            "batch": len(batch.work),
            "tokens": tokens,
            "predicted_ms": 1e3 * step.predicted_s,
            "took_ms": 1e3 * (now - begun_at),
        }
        dur = round(self._us(now) - self._us(begun_at), 3)
        self._put("X", pid, begun_at, name=f"{what} {len(batch.work)}", dur=dur, args=args)
        for seq in left:
            id = seq.request.id
            if seq.finish_reason:
                self._leave(id, now, seq.finish_reason)
                continue
            self._phase(id, "parked", now)
            arrow = self._arrows[id] = self._rows[id][0]
            self._put("s", pid, begun_at, name="hand-over", cat="hand-over", id=arrow)
        if instance.role is Role.BOTH:
            for id in batch.work:
                seq = instance.running.get(id)
                if seq is not None and seq.first_token_at == now:
                    self._phase(id, "decode", now)
        for behind in self._steps[pid]:
            self._runs(pid, behind, now)

    def _count(self, instance: Instance, batch: Batch, now: float) -> None:
        """The counters of an instance, as a step begins. Step slack: the least TPOT of its batch
        less the time that is predicted.
        """
        pid, running = self._pids[instance.id], instance.running
        used = instance.limits.num_pages - instance.pages.num_free
        counters: dict[str, dict[str, float]] = {
            "sequences": {
                "running": len(running),
                "waiting": len(instance.waiting),
                "parked": len(instance.parked),
            },
            "pages used": {"pages": used},
            "pace": {"pace": instance.pace},
        }
        rows = running.where(batch.work)
        tpot = running.tpot[rows][running.count[rows] > 0]
        if tpot.size:
            slack_s = float(tpot.min()) - self._steps[pid][-1].predicted_s
            counters["step slack, ms"] = {"slack": 1e3 * slack_s}
        for name, args in counters.items():
            self._put("C", pid, now, name=name, args=args)

    def _arrive(self, request: Request, at: float) -> None:
        if request.id in self._rows:
            self._leave(request.id, at, "replaced")
        self._num_rows += 1
        self._rows[request.id] = self._num_rows, ""
        args = {
            "num_prompt": len(request.prompt),
            "max_tokens": request.max_tokens,
            "ttft_slo_s": request.slo.ttft,
            "tpot_slo_s": request.slo.tpot,
        }
        self._slice("b", self._num_rows, request.id, at, args)
        self._phase(request.id, "queued", at)

    def _phase(self, id: str, phase: str, at: float) -> None:
        """Ends the phase that a request is in, and begins another."""
        if id not in self._rows:
            return
        row, before = self._rows[id]
        if before:
            self._slice("e", row, before, at)
        if phase:
            self._slice("b", row, phase, at)
        self._rows[id] = row, phase

    def _leave(self, id: str, at: float, why: str) -> None:
        if id not in self._rows:
            return
        self._phase(id, "", at)
        row, _ = self._rows.pop(id)
        self._arrows.pop(id, None)
        self._slice("e", row, id, at, {"end": why})

    def _slice(
        self, ph: str, row: int, name: str, at: float, args: dict[str, Any] | None = None
    ) -> None:
        self._put(ph, _REQUESTS, at, name=name, cat="request", id=row, args=args or {})

    def _name(self, pid: int, name: str) -> None:
        for kind, args in (("name", {"name": name}), ("sort_index", {"sort_index": pid})):
            self.names.append({"ph": "M", "pid": pid, "name": f"process_{kind}", "args": args})

    def _put(self, ph: str, pid: int, at: float, **fields: Any) -> None:
        self.events.append({"ph": ph, "pid": pid, "tid": pid, "ts": self._us(at), **fields})

    def _us(self, at: float) -> float:
        """Microseconds since the first record, in whole nanoseconds."""
        return round(1e9 * (at - self._origin)) / 1e3
