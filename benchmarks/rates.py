"""Serves one workload at rising rates, until well past the rate that vLLM can hold."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from figures import say, spread, turns

from schedulers.simulation.attainment import Outcome, summarize
from schedulers.simulation.workload import Arrival

Replay = Callable[[Sequence[Arrival]], list[Outcome]]
"""Sends a workload to a server, open loop, and returns when all of it has ended."""

# The knee is the first rate with less end-to-end attainment, in percent; what is measured ends at
# so many times that rate.
_KNEE, _BEYOND = 50.0, 1.5
_PEER = "vllm"
_QUANTILES = ("p50", "p90", "p99")


def serve(
    servers: Mapping[str, Replay],
    workload: Callable[[float], Sequence[Arrival]],
    given: Sequence[float],
    step: float,
    rounds: int,
) -> dict[str, Any]:
    """A row for each of the `given` rates (requests a second); where none are, for rates `step`
    apart up to 1.5 times the knee of the server "vllm".
    """
    rows, knee = [], None
    for rate in given or itertools.count(step, step):
        if not given and knee and rate > _BEYOND * knee + step / 2:
            break
        rows.append(_row(servers, workload(rate), rate, rounds))
        if knee is None and _PEER in servers:
            attained = rows[-1][_PEER]["e2e_attainment"]["median"]
            knee = rate if attained < _KNEE else None
    found: dict[str, Any] = {"knee_rps": knee, "rates": rows}
    if knee:
        row = next(row for row in rows if row["rate"] == knee)
        goodput = {name: row[name]["goodput_rps"]["median"] for name in servers}
        found["goodput_at_knee_of_vllm"] = {
            name: round(each / goodput[_PEER], 2) if goodput[_PEER] else None
            for name, each in goodput.items()
        }
    return found


def _row(
    servers: Mapping[str, Replay], arrivals: Sequence[Arrival], rate: float, rounds: int
) -> dict[str, Any]:
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    for name in turns(list(servers), rounds):
        figures[name].append(_figures(servers[name](arrivals)))
        say(f"{name}: {rate:g}/s, e2e {figures[name][-1]['e2e_attainment']:.1f} %")
    row: dict[str, Any] = {
        "rate": rate,
        "requests": len(arrivals),
        "mean_prompt": round(statistics.mean(a.num_prompt for a in arrivals), 1),
        "mean_output": round(statistics.mean(a.num_output for a in arrivals), 1),
    }
    for name, of_peer in figures.items():
        row[name] = {key: spread(each[key] for each in of_peer) for key in of_peer[0]}
    return row


def _figures(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    summary = summarize(outcomes)
    kept = ("num_failed", "ttft_attainment", "tpot_attainment", "e2e_attainment", "goodput_rps")
    tokens, duration_s = sum(o.num_output for o in outcomes), summary["duration_s"]
    return {
        **{key: summary[key] for key in kept},
        "tokens_per_s": tokens / duration_s if duration_s else 0.0,
        **{f"ttft_{q}_s": summary["ttft_s"][q] for q in _QUANTILES},
        **{f"tpot_{q}_s": summary["tpot_s"][q] for q in _QUANTILES},
    }
