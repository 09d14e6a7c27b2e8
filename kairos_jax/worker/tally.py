"""How values are spread: counted where they come about, in a fifth of a microsecond each, so that a
step loop can afford it; what is made of them is made when somebody asks.
"""

from bisect import bisect_left
from collections.abc import Sequence

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_RATIOS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.5, 2.0, 4.0)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Tally:
    """How many values lie between any two neighbours of `bounds`, and their sum.

    counts: of values up to the first bound, up to the second, ..., above the last. One thread adds;
    others may look, and see at most one value too few in one of the two.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def __len__(self) -> int:
        """How many values there were."""
        return sum(self.counts)


class Steps:
    """The steps of one instance. seconds: measured, from decision to tokens. predicted_s: what the
    cost model had said of them, in sum. ratio: measured / predicted. sequences: in a step.

    num_ahead: steps that were dispatched before the result of the one before was there. num_waited:
    decisions that had to wait for it. num_wasted: rows of steps that were computed for sequences
    that had ended by then.
    """

    def __init__(self) -> None:
        self.seconds, self.ratio = Tally(_SECONDS), Tally(_RATIOS)
        self.sequences = Tally(_SEQUENCES)
        self.predicted_s = 0.0
        self.num_ahead = self.num_waited = self.num_wasted = 0

    def add(self, took_s: float, predicted_s: float, num_sequences: int) -> None:
        """Counts a step."""
        self.seconds.add(took_s)
        self.sequences.add(num_sequences)
        self.predicted_s += predicted_s
        if predicted_s > 0:
            self.ratio.add(took_s / predicted_s)
