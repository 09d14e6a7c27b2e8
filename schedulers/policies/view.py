"""How the sequences of a decode instance stand to their SLOs, all at once."""

import math

import numpy as np

from schedulers.cost import CostModel
from schedulers.ledger.instance import Instance
from schedulers.ledger.rows import Column
from schedulers.policies.room import prefix

# Slack is spread over what an output is as likely to outlast as not: of a long tail (a lognormal
# of sigma 0.86) the median is this part of the mean.
_MEDIAN = 0.7
# Where steps of all are this much shorter than a TPOT, one that is behind can still catch up: down
# to a period of the second share of its TPOT.
_SPARE, _CATCH_UP = 1.1, 0.4


class View:
    """All sequences of an instance that has some, running ones first, judged at a time [S].

    left: output tokens still expected. slack: seconds until its next token is due. own: seconds
    that each adds to a step. period: seconds in which it must step once. base_s: seconds of a step
    without its sequences. feasible: it can keep its SLO.
    """

    def __init__(self, cost: CostModel, instance: Instance, now: float, least: float):
        running, waiting = instance.running, instance.waiting
        cells = running.cells
        if waiting:
            cells = np.concatenate([cells, waiting.cells], axis=1)
        self.cost, self.cells, self.pace = cost, cells, instance.pace
        self.length, tpot, count = cells[Column.LENGTH], cells[Column.TPOT], cells[Column.COUNT]
        # What is left is not known to less than a quarter of what there is.
        self.left = np.maximum(cells[Column.EXPECTED] - count, 0.25 * count)
        self.slack = cells[Column.DUE] - now
        self.period = tpot + (self.slack - tpot) / np.maximum(_MEDIAN * self.left, 1.0)
        decode = cost.decode
        self.own = decode.decoded_s + decode.decoded_context_s * self.length
        if instance.pace != 1.0:
            self.own = instance.pace * self.own
        self.base_s = instance.pace * cost.decode_base_s
        in_time = cells[Column.FIRST_AT] <= cells[Column.DEADLINE]
        counts = in_time & (tpot >= self.base_s)
        least = min(least, self._catch_up(counts & (self.period >= _CATCH_UP * tpot)))
        self.feasible = counts & (self.period >= least * tpot)

    def _catch_up(self, some: np.ndarray) -> float:
        """The shortest period, as a share of TPOT, that is kept if all of `some` step each time."""
        if not some.any():
            return math.inf
        step_s = self.base_s + float(self.own[some].sum())
        return max(_SPARE * step_s / float(self.cells[Column.TPOT][some].min()), _CATCH_UP)

    def serve(self, target: float, newcomers: float) -> tuple[np.ndarray, np.ndarray]:
        """Which feasible ones to serve: those of least remaining work, while the load is at most
        `target`, or `newcomers` for one whose KV is elsewhere, one at least; and the others. The
        load is the share of time that it takes to step each once in its period, and the base of a
        step once in the shortest of those.
        """
        (rows,) = self.feasible.nonzero()
        if not rows.size:
            return rows, rows
        work = self.own[rows] * self.left[rows]
        rows = rows[work.argsort(kind="stable")]
        load = self._load(rows)
        if np.maximum.reduce(load) <= min(target, newcomers):
            return rows, rows[:0]
        held_off = (load > newcomers) & (self.cells[Column.CAPACITY][rows] == 0)
        held_off[0] = False
        if np.logical_or.reduce(held_off):
            passed, rows = rows[held_off], rows[~held_off]
            load = self._load(rows)
        else:
            passed = rows[:0]
        count = max(prefix(load <= target), 1)
        return rows[:count], np.concatenate([passed, rows[count:]])

    def steps_s(self, order: np.ndarray) -> np.ndarray:
        """Seconds of a step of the first, the first two, the first three ... of `order`."""
        lengths = self.length[order]
        longest = 0.0 if self.cost.decode.form == "ragged" else np.maximum.accumulate(lengths)
        count = np.arange(1.0, order.size + 1)
        return self.pace * self.cost.decode_step_s(count, np.add.accumulate(lengths), longest)

    def by(self, column: int, rows: np.ndarray) -> np.ndarray:
        """`rows` in the order of a column."""
        return rows[self.cells[column][rows].argsort(kind="stable")] if rows.size > 1 else rows

    def _load(self, order: np.ndarray) -> np.ndarray:
        """The load of the first, the first two, the first three ... of `order`."""
        decode, period = self.cost.decode, self.period[order]
        least = np.minimum.accumulate(np.minimum(period, self.cells[Column.TPOT][order]))
        base = self.pace * decode.base_s / least
        if decode.form == "ragged":
            own = self.own[order]
            load = base + np.add.accumulate(own / period)
            if not decode.buckets:
                return load
            own_s = np.add.accumulate(own)
        else:
            # Each pays for the longest of the sequences that it steps beside.
            longest = np.maximum.accumulate(self.length[order])
            per_row = self.pace * (decode.decoded_s + decode.decoded_context_s * longest)
            load = base + per_row * (1 / period).cumsum()
            own_s = per_row * np.arange(1, order.size + 1)
        # All pay for the padding of the batch.
        bare_s = self.pace * decode.base_s + own_s
        return load * (self.steps_s(order) / np.maximum(bare_s, 1e-12))
