"""What the log says of requests: a line when one ends, and a line every ten seconds while there is
work. Of a router's requests, and of the steps of a worker in a process of its own.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from absl import flags

from kairos_jax.observe.collectors import kv_usage
from kairos_jax.observe.metrics import MISSED
from kairos_jax.process.logs import of_request
from kairos_jax.routing.observer import Observer
from kairos_jax.routing.router import Router
from kairos_jax.routing.stream import Stream
from kairos_jax.worker.status import Status
from schedulers.ledger.request import Slo

log = logging.getLogger(__name__)

PERIOD_S = 10.0


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    flags.DEFINE_bool("log_requests", True, "Log one line for each request when it ends.")


class RequestLog(Observer):
    """Logs the requests of one router. Told on its event loop; a token costs nothing here.

    each: a line a request when it ends.
    """

    def __init__(self, each: bool = True, clock: Callable[[], float] = time.monotonic):
        self._each, self._clock, self._since = each, clock, clock()
        self._causes: dict[str, str] = {}  # of requests that are failing, by name
        self._router: Router | None = None
        self._telling: asyncio.Task[None] | None = None
        self._start_interval(0)

    @classmethod
    def from_flags(cls) -> "RequestLog":
        """As `--log_requests` says."""
        return cls(flags.FLAGS.log_requests)

    def watch(self, router: Router) -> None:
        """Logs a line every ten seconds from now on. To be called on the router's event loop."""
        self._router = router
        self._telling = asyncio.ensure_future(every_period(self.tell_interval))

    # What happens to requests.

    def rejected(self, reason: str, slo: Slo | None = None) -> None:
        """A request was not taken: it counts in the interval's line."""
        self._rejected[reason] += 1

    def recovered(self, stream: Stream, cause: str) -> None:
        """A request is prefilled again."""
        text = f"prefilled again: {cause}, {len(stream.tokens)} output tokens so far"
        log.warning(text, extra=of_request(stream.name, cause=cause))

    def transfer_failed(self, source: str, target: str) -> None:
        """KV did not move from one worker to another."""
        log.warning("KV was not moved from %s to %s", source, target)

    def failed(self, stream: Stream, cause: str) -> None:
        """A request that was taken cannot be brought to its end; `ended` comes next."""
        self._causes[stream.name] = cause

    def ended(self, stream: Stream, outcome: str) -> None:
        """A request is over."""
        cause = self._causes.pop(stream.name, "")
        self._ended += 1
        self._tokens_ended += len(stream.tokens)
        if outcome != "cancelled":
            self._judged += 1
            self._kept += outcome != "failed" and _missed(stream) == []
        if self._each and log.isEnabledFor(logging.INFO):
            text, fields = request_line(stream, outcome, cause)
            log.info(text, extra=of_request(stream.name, **fields))

    # The interval.

    def tell_interval(self) -> None:
        """Logs what happened since the last time, if anything did."""
        if self._router is None:
            return
        now, streams = self._clock(), self._router.streams
        took_s, tokens = now - self._since, sum(len(stream.tokens) for stream in streams)
        if streams or self._ended or self._rejected:
            waiting = sum(stream.first_token_at is None for stream in streams)
            judged = self._judged + sum(self._rejected[reason] for reason in MISSED)
            fields = {
                "interval_s": round(took_s, 3),
                "requests_per_s": self._ended / took_s,
                "waiting": waiting,
                "running": len(streams) - waiting,
                "tokens_per_s": max(self._tokens_ended + tokens - self._tokens_before, 0) / took_s,
                "judged": judged,
                "attainment": 100.0 * self._kept / judged if judged else None,
                "kv_used": kv_usage(self._router.peers),
                "rejected": dict(self._rejected),
            }
            log.info(interval_line(fields), extra={"fields": fields})
        self._since = now
        self._start_interval(tokens)

    def _start_interval(self, tokens_before: int) -> None:
        """tokens_before: that requests in progress had."""
        self._ended = self._judged = self._kept = self._tokens_ended = 0
        self._tokens_before, self._rejected = tokens_before, Counter[str]()


async def every_period(tell: Callable[[], object]) -> None:
    """Calls it every ten seconds, without end; an error in it is logged."""
    while True:
        await asyncio.sleep(PERIOD_S)
        try:
            tell()
        except Exception:
            log.exception("a line of the log is missing")


def request_line(stream: Stream, outcome: str, cause: str = "") -> tuple[str, dict[str, Any]]:
    """What the log says of a request that is over, and the same as fields. outcome, cause: as
    observers are told.
    """
    slo, prompt, output = stream.request.slo, len(stream.request.prompt), len(stream.tokens)
    fields: dict[str, Any] = {"outcome": outcome, "prompt_tokens": prompt, "output_tokens": output}
    said = [f"{outcome} ({cause})" if cause else outcome, f"{prompt} + {output} tokens"]
    if cause:
        fields["cause"] = cause
    if stream.cached_tokens:
        said[1] += f" ({stream.cached_tokens} cached)"
        fields["cached_tokens"] = stream.cached_tokens
    with contextlib.suppress(ValueError):  # of a request without a token
        timing = stream.timing()
        said.append(f"TTFT {timing.ttft_s:.3f} s (queued {timing.queue_s:.3f} s)")
        fields |= {"ttft_s": timing.ttft_s, "queue_s": timing.queue_s}
        if timing.tpot_s is not None:
            said.append(f"TPOT {1000 * timing.tpot_s:.1f} ms")
            fields["tpot_s"] = timing.tpot_s
    fields |= {"slo_ttft_s": slo.ttft, "slo_tpot_s": slo.tpot}
    if outcome == "failed":
        said.append("SLO missed: failed")
        fields["slo"] = "missed"
    elif outcome != "cancelled":
        missed = _missed(stream)
        said.append(f"SLO missed: {' and '.join(missed)}" if missed else "SLO kept")
        fields["slo"] = "missed" if missed else "kept"
    return ", ".join(said), fields


def interval_line(fields: dict[str, Any]) -> str:
    """In words, what happened in an interval."""
    kept, rejected = fields["attainment"], fields["rejected"]
    said = [
        f"{fields['requests_per_s']:.2f} requests/s",
        f"{fields['waiting']} waiting",
        f"{fields['running']} running",
        f"{fields['tokens_per_s']:.1f} tokens/s",
        "SLO kept: -" if kept is None else f"SLO kept: {kept:.0f} % of {fields['judged']}",
        f"KV used: {100 * fields['kv_used']:.0f} %",
    ]
    said += [f"{count} rejected: {reason}" for reason, count in sorted(rejected.items())]
    return ", ".join(said)


def worker_line(before: Status, now: Status, took_s: float) -> tuple[str, dict[str, Any]] | None:
    """What a worker did in an interval, in words and as fields; None if it had no work."""
    if now.steps == before.steps and not (now.waiting or now.running or now.parked):
        return None
    fields = {
        "interval_s": round(took_s, 3),
        "steps_per_s": (now.steps - before.steps) / took_s,
        "waiting": now.waiting,
        "running": now.running,
        "parked": now.parked,
        "kv_used": now.used_pages / now.num_pages,
    }
    text = (
        f"{fields['steps_per_s']:.1f} steps/s, {now.waiting} waiting, {now.running} running, "
        f"{now.parked} parked, KV used: {100 * fields['kv_used']:.0f} %"
    )
    return text, fields


class WorkerLog:
    """Logs the work of one worker. look: what it holds and has run."""

    def __init__(self, look: Callable[[], Status], clock: Callable[[], float] = time.monotonic):
        self._look, self._clock = look, clock
        self._before, self._since = look(), clock()

    def tell_interval(self) -> None:
        """Logs what it did since the last time, if it had work."""
        now, status = self._clock(), self._look()
        if said := worker_line(self._before, status, now - self._since):
            log.info(said[0], extra={"fields": said[1]})
        self._before, self._since = status, now


def _missed(stream: Stream) -> list[str]:
    """Each objective that was not kept, with by how much. Of a request with a token."""
    timing, slo = stream.timing(), stream.request.slo
    missed = []
    if not timing.ttft_met:
        missed.append(f"TTFT over {slo.ttft:g} s")
    if not timing.tpot_met:
        missed.append(f"TPOT over {1000 * slo.tpot:g} ms")
    return missed
