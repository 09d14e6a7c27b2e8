"""What happens when a process of a cluster is killed, hangs or drains, and what is left after.

  python benchmarks/faults.py [--soak=10000] [--output=json]

A router, two prefill and two decode workers with a tiny model, on loopback. Each fault is done to
one of them in the midst of requests; every token is compared with that of an undisturbed run. Half
of the requests are greedy and half sampled by a seed.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import app, flags

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import asyncio

import processes
import scenarios
import soak

_SOAK = flags.DEFINE_integer("soak", 10_000, "Requests of the soak; 0: none.", 0)
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "How to print the result.")

_COLUMNS = {
    "fault": "fault",
    "hit": "requests hit",
    "detection_s": "detection s",
    "recovery_s": "recovery s",
    "freed_s": "freed s",
    "tokens_lost": "tokens lost",
    "pages_leaked": "pages leaked",
    "note": "note",
}


def table(rows: list[dict[str, str]]) -> str:
    """In columns as wide as their widest cell."""
    wide = {key: max(len(row[key]) for row in rows) for key in rows[0]}
    return "\n".join("  ".join(f"{row[key]:{wide[key]}}" for key in wide).rstrip() for row in rows)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def text(rows: list[scenarios.Row], soaked: soak.Soak | None) -> str:
    """Both tables."""
    cells = [{key: _cell(getattr(row, key)) for key in _COLUMNS} for row in rows]
    parts = [table([_COLUMNS, *cells])]
    if soaked:
        parts.append(
            f"{soaked.num_requests} requests in {soaked.took_s:.0f} s, {soaked.num_cancelled} "
            f"cancelled, {soaked.num_killed} workers killed; {soaked.tokens_wrong} tokens lost, "
            f"{sum(soaked.failed.values())} calls failed {dict(soaked.failed) or ''}"
        )
        names = list(soaked.figures["decode"][0])
        head = {"process": "process"} | {name: name for name in names}
        figures = [
            {"process": f"{process}, {when}"} | {name: _cell(of.get(name)) for name in names}
            for process, noted in soaked.figures.items()
            for when, of in zip(("before", "half", "after"), noted, strict=True)
        ]
        parts.append(table([head, *figures]))
    return "\n\n".join(parts)


def main(argv: list[str]) -> None:
    """Runs every fault, and the soak."""
    rows, soaked = [], None
    with (
        tempfile.TemporaryDirectory() as cache,
        processes.cluster(
            Path(cache), 2, 2, *scenarios.ARGUMENTS, of_workers=scenarios.OF_WORKERS
        ) as cluster,
    ):
        for scenario in scenarios.SCENARIOS:
            rows.append(asyncio.run(scenarios.run(cluster, scenario)))
            print(f"done: {rows[-1].fault}", file=sys.stderr, flush=True)
        if _SOAK.value:
            soaked = asyncio.run(soak.soak(cluster, _SOAK.value))
    if _OUTPUT.value == "json":
        found = {"faults": [dataclasses.asdict(row) for row in rows]}
        print(json.dumps(found | ({"soak": dataclasses.asdict(soaked)} if soaked else {})))
    else:
        print(text(rows, soaked))


if __name__ == "__main__":
    app.run(main)
