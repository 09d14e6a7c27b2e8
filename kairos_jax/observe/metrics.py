"""What became of a router's requests, for Prometheus. Names: docs/reference/metrics-and-traces.md.

A request is counted when its first token comes and when it ends, from its stream's own record; a
token costs two additions. All else is read at a scrape (`collectors.py`).
"""

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import exposition as openmetrics

from kairos_jax.observe.collectors import RouterGauges, TallyHistogram, VllmHistograms, WorkerGauges
from kairos_jax.observe.recent import RecentCounts
from kairos_jax.routing.observer import Observer
from kairos_jax.routing.router import Router
from kairos_jax.routing.stream import Stream, Timing
from kairos_jax.worker.tally import Tally
from kairos_jax.worker.worker import Worker
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Slo

# SLOs come from clients, who may think of any number of them; series must not.
MAX_CLASSES = 16
OTHER_CLASS, UNKNOWN_CLASS = "other", "unknown"

# Turned away for want of room or time, and so missed; the others are the client's own mistakes.
MISSED = frozenset({"max_requests", "parked_kv", "predicted_ttft", "no_worker", "closed"})

# The columns of `Metrics.flow`.
_TAKEN, _ENDED, _TOKENS = range(3)

_LATENCY_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0),
)
_TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5),
)
# Time to spare, below zero where it was not enough.
_SPARE_S = (
    *(-30.0, -10.0, -5.0, -2.5, -1.0, -0.5, -0.25, -0.1, -0.05, -0.01, 0.0),
    *(0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)


class Metrics(Observer):
    """The metrics of one router. Told on its event loop, rendered on any thread.

    model: as the aliases name it. slo: of requests that state none, whose class always has a name.
    registry: of prometheus_client, which is rendered at a scrape; takes further collectors. judged:
    requests of the last minutes that an SLO was held against; and of them, those that met that of
    the TTFT, of the TPOT, and both. flow: requests taken, requests ended and output tokens of the
    last minutes.
    """

    def __init__(
        self,
        model: str = "",
        slo: Slo | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.registry = CollectorRegistry()
        self.judged, self.flow, self._clock = RecentCounts(4), RecentCounts(3), clock
        self._model, self._classes = model, {_name(slo)} if slo else set()
        self._by_outcome()
        self._by_time()
        self.gaps = Tally(_TOKEN_S)
        gaps = TallyHistogram(
            "kairos_inter_token_latency_seconds",
            "From each token of a request to its next.",
            self.gaps,
        )
        aliases = {
            "time_to_first_token_seconds": self._ttft.collect,
            "inter_token_latency_seconds": gaps.collect,
            "e2e_request_latency_seconds": self._total.collect,
        }
        for collector in (gaps, VllmHistograms(model, aliases)):
            self.registry.register(collector)
        ProcessCollector(registry=self.registry)

    def watch(self, router: Router) -> None:
        """Tells of a router's requests in progress and of its workers, as they are when asked."""
        self.registry.register(RouterGauges(self._model, router))

    def watch_workers(self, workers: Sequence[Worker]) -> None:
        """Tells of the ledgers and steps of workers in this process."""
        self.registry.register(WorkerGauges(workers))

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics, and the content type, which is what an Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        if content_type.startswith("application/openmetrics-text"):
            # Else it writes vllm_ for vllm: in every sample. No name of ours needs an escape.
            return openmetrics.generate_latest(self.registry, openmetrics.ALLOWUTF8), content_type
        return encode(self.registry), content_type

    # What happens to requests.

    def rejected(self, reason: str, slo: Slo | None = None) -> None:
        """A request was not taken. reason: a word, of which there are few. slo: None where nobody
        had read it yet.
        """
        name = self._class(slo)
        self._rejections.labels(reason, name).inc()
        if reason in MISSED:
            self._judge(name, False, False)

    def begun(self, stream: Stream) -> None:
        """A request was taken."""
        self.flow.add_one(self._clock(), _TAKEN)

    def first_token(self, stream: Stream) -> None:
        """The first token of a request has come."""
        self.flow.add_one(self._clock(), _TOKENS)
        timing, name = stream.timing(), self._class(stream.request.slo)
        self._prompt_tokens.labels(name).inc(len(stream.request.prompt))
        self._cached_tokens.labels(name).inc(stream.cached_tokens)
        self._ttft.labels(name).observe(timing.ttft_s)
        self._queue.labels(name).observe(timing.queue_s)
        self._prefill.labels(name).observe(timing.prefill_s)
        self._laxity.labels("first_step", name).observe(timing.laxity_s)
        self._laxity.labels("first_token", name).observe(stream.request.slo.ttft - timing.ttft_s)

    def next_token(self, gap_s: float) -> None:
        """Another token of a request has come."""
        self.gaps.add(gap_s)
        self.flow.add_one(self._clock(), _TOKENS)

    def ended(self, stream: Stream, outcome: str) -> None:
        """A request is over. outcome: "stop", "length", "cancelled" or "failed"."""
        self.flow.add_one(self._clock(), _ENDED)
        name = self._class(stream.request.slo)
        self._requests.labels(outcome, name).inc()
        self._output_tokens.labels(name).inc(len(stream.tokens))
        if outcome == "failed":
            self._judge(name, False, False)
        elif outcome != "cancelled":
            self._answered(stream, stream.timing(), name)

    def placed(self, stream: Stream, stays: bool) -> None:
        """A request goes on where its prompt was computed, or elsewhere."""
        self._placements.labels("stays" if stays else "elsewhere").inc()

    def transfer_failed(self, source: str, target: str) -> None:
        """KV did not move from one worker to another."""
        names = (id.partition("@")[0] for id in (source, target))
        self._failed_transfers.labels(*names).inc()

    def recovered(self, stream: Stream, cause: str) -> None:
        """A request is prefilled again."""
        self._recoveries.labels(cause).inc()

    def recalled(self, stream: Stream) -> None:
        """A late request has left its queue for a worker which has time for it."""
        self._recalls.inc()

    def failed(self, stream: Stream, cause: str) -> None:
        """A request that was taken cannot be brought to its end."""
        self._failures.labels(cause).inc()

    def lost(self, role: Role) -> None:
        """A worker that did not drain is gone."""
        self._lost.labels(role.value).inc()

    def _answered(self, stream: Stream, timing: Timing, name: str) -> None:
        self._total.labels(name).observe(timing.total_s)
        self._decode.labels(name).observe(timing.decode_s)
        if timing.transfer_s is not None:
            self._transfer.labels(name).observe(timing.transfer_s)
        if timing.tpot_s is not None:
            self._tpot.labels(name).observe(timing.tpot_s)
            self._slack.labels("last", name).observe(timing.slack_s)
            self._slack.labels("worst", name).observe(timing.worst_slack_s)
        self._judge(name, timing.ttft_met, timing.tpot_met)
        if timing.ttft_met and timing.tpot_met:
            self._goodput_tokens.labels(name).inc(len(stream.tokens))

    def _judge(self, name: str, ttft_met: bool, tpot_met: bool) -> None:
        self.judged.add(self._clock(), (1, ttft_met, tpot_met, ttft_met and tpot_met))
        for objective, met in (
            ("ttft", ttft_met),
            ("tpot", tpot_met),
            ("both", ttft_met and tpot_met),
        ):
            # Both, so that a share of none is 0 and not unknown.
            self._slo.labels(objective, "met", name).inc(met)
            self._slo.labels(objective, "missed", name).inc(not met)

    def _class(self, slo: Slo | None) -> str:
        if slo is None:
            return UNKNOWN_CLASS
        name = _name(slo)
        if name not in self._classes:
            if len(self._classes) >= MAX_CLASSES:
                return OTHER_CLASS
            self._classes.add(name)
        return name

    # The metrics themselves.

    def _by_outcome(self) -> None:
        count = self._counter
        self._requests = count("requests", "Requests that were taken and are over.", "outcome")
        self._rejections = count("requests_rejected", "Requests that were not taken.", "reason")
        self._slo = count(
            "slo_requests", "Requests that met or missed an objective.", "objective", "result"
        )
        self._prompt_tokens = count("prompt_tokens", "Prompt tokens of requests with output.")
        self._cached_tokens = count(
            "cached_prompt_tokens", "Those of them that were in the prefix cache."
        )
        self._output_tokens = count("output_tokens", "Output tokens of requests that are over.")
        self._goodput_tokens = count(
            "goodput_tokens", "Those of requests that met both objectives."
        )
        registry = self.registry
        self._recoveries = Counter(
            "kairos_recoveries", "Requests that were prefilled again.", ["cause"], registry=registry
        )
        self._recalls = Counter(
            "kairos_recalls",
            "Late requests that left their queue for an instance which had time for them.",
            registry=registry,
        )
        self._placements = Counter(
            "kairos_placements",
            "Requests by where they went on after their prompts, where roles flow.",
            ["goes"],
            registry=registry,
        )
        self._failed_transfers = Counter(
            "kairos_transfers_failed",
            "KV transfers that failed, by the workers between which.",
            ["source", "target"],
            registry=registry,
        )
        self._failures = Counter(
            "kairos_requests_failed",
            "Requests that were taken and could not be brought to their end.",
            ["cause"],
            registry=registry,
        )
        self._lost = Counter(
            "kairos_workers_lost", "Workers lost without a drain.", ["role"], registry=registry
        )

    def _by_time(self) -> None:
        spread = self._histogram
        self._ttft = spread("time_to_first_token", "From arrival to the first token.", _LATENCY_S)
        self._tpot = spread("time_per_output_token", "Mean per token after the first.", _TOKEN_S)
        self._total = spread("request_duration", "From arrival to the last token.", _LATENCY_S)
        self._queue = spread("request_queue", "From arrival to the first step.", _LATENCY_S)
        self._prefill = spread("request_prefill", "First step to first token.", _LATENCY_S)
        self._transfer = spread("request_transfer", "First token to KV moved.", _LATENCY_S)
        self._decode = spread("request_decode", "From the first token to the last.", _LATENCY_S)
        self._laxity = spread("laxity", "Time left until the first token is due.", _SPARE_S, "at")
        self._slack = spread("slack", "Time ahead of the line of the TPOT.", _SPARE_S, "at")

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"kairos_{name}", what, [*labels, "class"], registry=self.registry)

    def _histogram(self, name: str, what: str, bounds: Sequence[float], *labels: str) -> Histogram:
        labels = (*labels, "class")
        return Histogram(
            f"kairos_{name}_seconds", what, labels, buckets=bounds, registry=self.registry
        )


def _name(slo: Slo) -> str:
    return f"ttft={slo.ttft:g}s tpot={slo.tpot:g}s"
