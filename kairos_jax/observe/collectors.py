"""What is looked at when somebody asks for metrics: ledgers and steps of this process, and the
workers as a router knows them.

Read from another thread than the one that owns a ledger: each number is right, but they may be of
moments some microseconds apart.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from kairos_jax.routing.peer import Peer
from kairos_jax.routing.router import Router
from kairos_jax.worker.tally import Tally
from kairos_jax.worker.worker import Worker
from schedulers.ledger.instance import Role

_WORKER = ("worker", "role")
_OF_DISPATCH = (
    ("steps_ahead", "Steps dispatched before the result of the step before was there."),
    ("steps_waited_for", "Steps for whose result the next decision had to wait."),
    ("rows_wasted", "Rows of steps computed for sequences that had ended by then."),
)


class WorkerGauges(Collector):
    """The workers of this process, by name and role; there may be more of them later."""

    def __init__(self, workers: Sequence[Worker]):
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        workers = list(self._workers)
        yield from self._ledgers(workers)
        yield from self._steps(workers)
        received = CounterMetricFamily(
            "kairos_kv_received_bytes", "KV that was brought to the workers of this process."
        )
        transports = {id(worker.transport): worker.transport for worker in workers}
        received.add_metric([], sum(each.received_bytes for each in transports.values()))
        yield received

    def _ledgers(self, workers: Sequence[Worker]) -> Iterator[Metric]:
        requests = GaugeMetricFamily(
            "kairos_worker_requests",
            "Requests that wait, run, or are parked until their KV is fetched.",
            labels=(*_WORKER, "state"),
        )
        pages = GaugeMetricFamily(
            "kairos_worker_kv_pages", "Pages of the KV pool.", labels=(*_WORKER, "state")
        )
        parked = GaugeMetricFamily(
            "kairos_worker_kv_parked_tokens",
            "Tokens whose KV waits outside of the pool for the decode side.",
            labels=_WORKER,
        )
        pace = GaugeMetricFamily(
            "kairos_worker_pace_ratio",
            "Recent step times, measured over predicted, by which predictions are scaled.",
            labels=_WORKER,
        )
        for worker in workers:
            ledger, labels = worker.instance, _labels(worker)
            free = ledger.pages.num_free
            requests.add_metric([*labels, "waiting"], len(ledger.waiting))
            running = len(ledger.running) + len(ledger.ending)
            requests.add_metric([*labels, "running"], running)
            requests.add_metric([*labels, "parked"], len(ledger.parked))
            pages.add_metric([*labels, "used"], ledger.limits.num_pages - free)
            pages.add_metric([*labels, "free"], free)
            parked.add_metric(labels, ledger.parked_tokens)
            pace.add_metric(labels, ledger.pace)
        yield from (requests, pages, parked, pace)

    def _steps(self, workers: Sequence[Worker]) -> Iterator[Metric]:
        predicted = CounterMetricFamily(
            "kairos_worker_step_predicted_seconds",
            "What the cost model had said of the steps that ran.",
            labels=_WORKER,
        )
        seconds = _histogram("kairos_worker_step_seconds", "Measured time of a step.")
        ratio = _histogram("kairos_worker_step_time_ratio", "Step time, measured over predicted.")
        sequences = _histogram("kairos_worker_step_sequences", "Sequences of a step.")
        counted = [
            CounterMetricFamily(f"kairos_worker_{name}", what, labels=_WORKER)
            for name, what in _OF_DISPATCH
        ]
        for worker in workers:
            steps, labels = worker.ran, _labels(worker)
            predicted.add_metric(labels, steps.predicted_s)
            for family, count in zip(
                counted, (steps.num_ahead, steps.num_waited, steps.num_wasted), strict=True
            ):
                family.add_metric(labels, count)
            for family, tally in (
                (seconds, steps.seconds),
                (ratio, steps.ratio),
                (sequences, steps.sequences),
            ):
                family.add_metric(labels, buckets(tally), tally.sum)
        yield from (predicted, *counted, seconds, ratio, sequences)


class RouterGauges(Collector):
    """The requests in progress, and the workers by the last word that came from each."""

    def __init__(self, model: str, router: Router):
        self._model, self._router = model, router

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        streams, peers = self._router.streams, self._router.peers
        waiting = sum(stream.first_token_at is None for stream in streams)
        running, kv_used = len(streams) - waiting, kv_usage(peers)
        requests = GaugeMetricFamily(
            "kairos_requests_in_progress",
            "Requests before their first token (waiting), and after it (running).",
            labels=["state"],
        )
        requests.add_metric(["waiting"], waiting)
        requests.add_metric(["running"], running)
        yield requests
        yield from self._of_peers(peers)
        for name, value, what in (
            ("num_requests_waiting", waiting, "requests before their first token"),
            ("num_requests_running", running, "requests after their first token"),
            ("kv_cache_usage_perc", kv_used, "used part of the decode pools, 0 to 1"),
        ):
            alias = GaugeMetricFamily(f"vllm:{name}", f"As vLLM names it: {what}.", labels=_MODEL)
            alias.add_metric([self._model], value)
            yield alias

    def _of_peers(self, peers: Sequence[Peer]) -> Iterator[Metric]:
        now = self._router.clock()
        # By name: one that was started anew is another peer, and for a moment there may be both.
        rows = {peer.id.partition("@")[0]: (peer, peer.summary) for peer in peers}
        for name, what, value in (
            ("taking", "1 if it takes new requests, 0 if it drains.", lambda p, s: not p.draining),
            ("queued_prompts", "Prompts that can be in time.", lambda p, s: len(s.deadline)),
            ("queue_seconds", "Time that all its prompts need.", lambda p, s: s.work_s(now)),
            ("load_ratio", "Share of its time that decoding in time takes.", lambda p, s: s.load),
            ("room_tokens", "Tokens whose KV it could take in.", lambda p, s: s.room),
        ):
            family = GaugeMetricFamily(f"kairos_peer_{name}", what, labels=_WORKER)
            for id, (peer, summary) in rows.items():
                family.add_metric([id, peer.role.value], float(value(peer, summary)))
            yield family


def kv_usage(peers: Sequence[Peer]) -> float:
    """The used part of the pools that decode, 0 to 1, as the router knows it."""
    pools = [peer for peer in peers if peer.role is not Role.PREFILL and peer.kv_tokens]
    total = sum(peer.kv_tokens for peer in pools)
    room = sum(max(peer.summary.room, 0.0) for peer in pools)
    return min(max(1 - room / total, 0.0), 1.0) if total else 0.0


_MODEL = ("model_name",)


class VllmHistograms(Collector):
    """Histograms under the names by which benchmark tools look for them, all classes in one.

    sources: by name, what makes the families that are to be told so.
    """

    def __init__(self, model: str, sources: Mapping[str, Callable[[], Iterable[Metric]]]):
        self._model, self._sources = model, sources

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        for name, source in self._sources.items():
            counts: dict[str, float] = {}
            total = 0.0
            for sample in (sample for family in source() for sample in family.samples):
                if sample.name.endswith("_bucket"):
                    bound = sample.labels["le"]
                    counts[bound] = counts.get(bound, 0.0) + sample.value
                elif sample.name.endswith("_sum"):
                    total += sample.value
            family = HistogramMetricFamily(f"vllm:{name}", "As vLLM names it.", labels=_MODEL)
            if counts:
                family.add_metric([self._model], list(counts.items()), total)
            yield family


class TallyHistogram(Collector):
    """A tally as a histogram without labels."""

    def __init__(self, name: str, what: str, tally: Tally):
        self._name, self._what, self._tally = name, what, tally

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        tally = self._tally
        yield HistogramMetricFamily(self._name, self._what, buckets(tally), tally.sum)


def buckets(tally: Tally) -> list[tuple[str, float]]:
    """Each bound, and how many values are at or below it."""
    below, rows = 0, []
    for bound, count in zip((*map(float, tally.bounds), "+Inf"), tally.counts, strict=True):
        below += count
        rows.append((str(bound), float(below)))
    return rows


def _histogram(name: str, what: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, what, labels=_WORKER)


def _labels(worker: Worker) -> list[str]:
    return [worker.instance.id, worker.instance.role.value]
