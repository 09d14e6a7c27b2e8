"""What the benchmarks share: turns, medians with their spread, where they were taken, tables."""

import datetime
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

_CPUINFO = Path("/proc/cpuinfo")


def spread(values: Iterable[float | None]) -> dict[str, float | None]:
    """Median, lowest and highest of those that are there; None for each where none is."""
    there = [value for value in values if value is not None]
    if not there:
        return {"median": None, "low": None, "high": None}
    figures = statistics.median(there), min(there), max(there)
    return dict(zip(("median", "low", "high"), (_round(each) for each in figures), strict=True))


def turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Every name once a round, in an order that alternates."""
    for index in range(rounds):
        yield from reversed(names) if index % 2 else names


def say(what: str) -> None:
    """Tells how far a benchmark is, on stderr."""
    print(what, file=sys.stderr, flush=True)


def where() -> dict[str, Any]:
    """Machine, versions and date, and how busy the machine is before the benchmark begins."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("kairos_jax", "jax")},
    }


def short(figure: dict[str, float | None]) -> str:
    """A spread as "median (low to high)"."""
    if figure["median"] is None:
        return "-"
    return f"{figure['median']:.4g} ({figure['low']:.4g} to {figure['high']:.4g})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In columns as wide as their widest cell."""
    wide = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, wide, strict=True))
        for row in (head, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _cpu_name() -> str:
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
