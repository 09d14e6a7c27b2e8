"""The pace of a machine while it served, and whether the rows of a comparison have the same.

Pace is measured over predicted step time. The predictions of one profile are the same for all rows,
so their paces differ where the machine was faster or slower.
"""

import statistics
import urllib.request
from collections.abc import Callable, Sequence

from prometheus_client.parser import text_string_to_metric_families

from kairos_jax.lab.report.comparison import Run

# Rows whose paces differ by more than this part do not compare.
LIMIT = 0.1

_TIMEOUT_S = 10.0
_MEASURED = "kairos_worker_step_seconds_sum"
_PREDICTED = "kairos_worker_step_predicted_seconds_total"


def read_pace(address: str) -> float:
    """The pace of all steps of a server so far. address: host:port of its HTTP API.

    Raises OSError if it cannot be reached, and ValueError if it has run no steps.
    """
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=_TIMEOUT_S) as answer:
        return pace_of(answer.read().decode())


def pace_of(metrics: str) -> float:
    """The pace of all steps in a page of Prometheus metrics. Raises ValueError: there are none."""
    seconds = {_MEASURED: 0.0, _PREDICTED: 0.0}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name in seconds:
                seconds[sample.name] += sample.value
    if not seconds[_PREDICTED]:
        raise ValueError("the metrics tell of no steps")
    return seconds[_MEASURED] / seconds[_PREDICTED]


def differing(paces: Sequence[float]) -> list[int]:
    """The rows whose pace differs from the others by more than LIMIT; none if all are alike."""
    if _spread(paces) <= LIMIT:
        return []
    middle = statistics.median(paces)
    distance = [abs(pace / middle - 1) for pace in paces]
    far = [row for row, each in enumerate(distance) if each > LIMIT]
    return far or [distance.index(max(distance))]


def level(runs: Sequence[Run], again: Callable[[int], Run], say: Callable[[str], object]) -> list:
    """Runs the rows whose pace differs once more, and keeps what is nearer to the other rows.

    again: runs one row. say: is told why.
    """
    kept = list(runs)
    for row in differing([run.pace for run in runs]):
        old = runs[row]
        say(f"{old.label} is run again: its pace, {old.pace:.2f}, differs from the other rows'")
        middle = statistics.median(run.pace for run in runs if run is not old)
        kept[row] = min(old, again(row), key=lambda run: abs(run.pace - middle))
    return kept


def pace_text(runs: Sequence[Run]) -> str:
    """The pace of each row, and whether the rows compare."""
    paces = f"Pace (measured over predicted step time): {paces_text(runs)}."
    return " ".join([paces, *pace_warnings(runs)])


def paces_text(runs: Sequence[Run]) -> str:
    """The pace of each row."""
    return ", ".join(f"{run.label} {run.pace:.2f}" for run in runs)


def pace_warnings(runs: Sequence[Run]) -> list[str]:
    """That the rows do not compare, if they do not."""
    spread = _spread([run.pace for run in runs])
    if spread <= LIMIT:
        return []
    return [f"The rows do not compare: the machine's pace differed by {spread:.0%}."]


def _spread(paces: Sequence[float]) -> float:
    return max(paces) / min(paces) - 1
