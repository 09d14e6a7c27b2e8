"""What a run looked like, in few enough points to keep and to draw."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from schedulers.ledger.instance import Batch, Instance, Role
from schedulers.simulation.attainment import Outcome

MAX_POINTS = 600
"""Of one line: more cannot be seen, and make files and pages heavy."""


def thin(count: int, most: int = MAX_POINTS) -> np.ndarray:
    """Indices of at most `most` of `count` points, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def cdf(outcomes: Sequence[Outcome], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of "ttft_s" or "tpot_s", in seconds, and the percentage of requests at or under each.

    Failed requests count among all, and come at no value. One-token answers have no tpot.
    """
    raw = (getattr(outcome, name) for outcome in outcomes if outcome.done)
    values = np.sort(np.array([value for value in raw if value is not None], dtype=float))
    if not values.size:
        return values, values
    total = values.size + sum(not outcome.done for outcome in outcomes)
    kept = thin(values.size)
    return values[kept], 100 * (kept + 1) / total


class Timeline:
    """Samples a run as it goes: evenly in time, at most twice MAX_POINTS of them.

    It listens to the first of the instances that decode, in the place of a journal. A sample is
    taken where a step of it begins: now, the requests that wait for their prompt on all instances,
    the step's sequences, and its slack: their least TPOT less the step's predicted seconds.
    """

    def __init__(self, instances: Sequence[Instance]):
        self._prefill = [each for each in instances if each.role is not Role.DECODE]
        decode = [each for each in instances if each.role is not Role.PREFILL]
        self._decode = next((each for each in decode if each.receives), decode[0])
        self._decode.journal = self._on_verb
        self._samples: list[tuple[float, int, int, float]] = []
        self._next_at, self._period_s = -np.inf, 0.0

    def columns(self, start: float = 0.0) -> dict[str, list[Any]]:
        """at_s (since `start`), queue, batch and slack_s of the samples, MAX_POINTS at most."""
        kept = [self._samples[index] for index in thin(len(self._samples))]
        return {
            "at_s": [round(at - start, 4) for at, *_ in kept],
            "queue": [queue for _, queue, _, _ in kept],
            "batch": [batch for _, _, batch, _ in kept],
            "slack_s": [round(slack_s, 6) for *_, slack_s in kept],
        }

    def _on_verb(self, verb: str, *args: Any) -> None:
        if verb == "begin" and args[0] >= self._next_at and args[1].work:
            self._sample(*args)

    def _sample(self, now: float, batch: Batch) -> None:
        seqs = [self._decode.get(id) for id in batch.work]
        tpot = min(seq.request.slo.tpot for seq in seqs if seq)
        queue = sum(len(each.waiting) for each in self._prefill)
        slack_s = tpot - self._decode.pace * batch.predicted_s
        self._samples.append((now, queue, len(batch.work), float(slack_s)))
        if len(self._samples) >= 2 * MAX_POINTS:
            # How long the run will be is not known: as it grows, samples come more rarely.
            self._samples = self._samples[::2]
            self._period_s = (now - self._samples[0][0]) / MAX_POINTS
        self._next_at = now + self._period_s
