"""How the steps of a live run compare with what the profile says of them."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from schedulers.ledger.instance import Batch, Instance
from schedulers.ledger.journal import Ledgers, Record

# A step is mixed if its longest context is so many times their mean.
_MIXED = 2.0


@dataclass(frozen=True, slots=True)
class Steps:
    """How live steps compare with what the profile says of them.

    ratio: time that they took to time predicted, of all in sum. noise: standard deviation of the
    logarithm of the same of each. between_s: median time from the end of one to the next's begin; 0
    of one that was dispatched before that end, and begins with it.
    num_mixed: steps whose longest decode context is at least twice their mean one; mixed_ratio: as
    `ratio`, of these.
    """

    ratio: float
    noise: float
    between_s: float
    num_mixed: int = 0
    mixed_ratio: float | None = None


def measure_steps(records: Sequence[Record]) -> Steps:
    """Looks at all steps of a run that has at least one."""
    ledgers, ended = Ledgers(), {}
    began: dict[str, list[tuple[float, bool]]] = {}
    steps: list[tuple[float, float, bool]] = []
    between = []
    for record in records:
        event = ledgers.read(record)
        id = event.instance.id
        if event.verb == "begin" and event.batch.work:
            under_way = began.setdefault(id, [])
            if id in ended:
                between.append(0.0 if under_way else event.at - ended[id])
            under_way.append((event.at, _is_mixed(event.instance, event.batch)))
        elif event.verb == "end":
            ended[id] = event.at
            (at, mixed), *behind = began[id]
            began[id] = [(event.at, is_mixed) for _, is_mixed in behind]
            steps.append((event.at - at, event.batch.predicted_s, mixed))
        ledgers.apply(event)
    took, predicted, mixed = np.array(steps).T
    ratio, of_mixed = took.sum() / predicted.sum(), mixed > 0
    mixed_ratio = None
    if of_mixed.any():
        mixed_ratio = float(took[of_mixed].sum() / predicted[of_mixed].sum())
    between_s = float(np.median(between)) if between else 0.0
    noise = float(np.log(took / predicted).std())
    return Steps(float(ratio), noise, between_s, int(of_mixed.sum()), mixed_ratio)


def _is_mixed(instance: Instance, batch: Batch) -> bool:
    """Whether the contexts of a step's decoding sequences differ: see `Steps`."""
    seqs = filter(None, map(instance.get, batch.work))
    contexts = [seq.length for seq in seqs if seq.num_tokens]
    return bool(contexts) and max(contexts) >= _MIXED * statistics.mean(contexts)
