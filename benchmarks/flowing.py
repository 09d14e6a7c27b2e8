"""What instances whose roles flow keep, beside fixed layouts of as many; and what routing costs.

  python benchmarks/flowing.py --trace=FILE --rates=36,40 [--ttft=1] [--tpot=0.025] [--output=json]
  python benchmarks/flowing.py --decisions

Each row is one simulated run. Attainment and throughput stand side by side, since a policy can
trade one for the other: percent of requests that keep TTFT and TPOT, the TTFT, the TPOT, the tenth
of the output lengths with the least of both; output tokens a second until the last request has
ended; the longest latency. "baseline" is fcfs and continuous batching in the first layout.

--decisions: microseconds of a core in which a router chooses where a prompt is computed, and where
a sequence goes on, with 3 and with 100 instances.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
from absl import app, flags

from kairos_jax.engine import profile_file
from kairos_jax.lab.cells import Layout
from kairos_jax.lab.flags import parse_list, to_number, workload
from kairos_jax.routing.fleet import Fleet
from kairos_jax.routing.peer import Peer
from kairos_jax.worker.messages import Submit
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies.routing import Summary
from schedulers.simulation.scenario import Scenario, simulate
from schedulers.simulation.workload import SloClass, rescale

_TRACE = flags.DEFINE_string("trace", "synthetic", "As of `kairos simulate`.")
_RATES = flags.DEFINE_string("rates", "32,40", "Requests per second.")
_LAYOUTS = flags.DEFINE_string(
    "layouts", "2:1fluid,2:1,1:2,3xcolocated", "As of `kairos sweep`; the baseline has the first."
)
_REQUESTS = flags.DEFINE_integer("requests", 0, "How many, from the start; 0: all.", 0)
_TTFT = flags.DEFINE_float("ttft", 1.0, "SLO: seconds to the first token.")
_TPOT = flags.DEFINE_float("tpot", 0.025, "SLO: seconds per token after the first.")
_PROFILE = flags.DEFINE_string("profile", "llama3_8b_h100_roofline", "As of `kairos simulate`.")
_NOISE = flags.DEFINE_float("noise", 0.0, "Standard deviation of the logarithm of step times.")
_BASELINE = flags.DEFINE_boolean("baseline", True, "Also fcfs with continuous batching.")
_DECISIONS = flags.DEFINE_boolean("decisions", False, "Measure what routing costs instead.")
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "How to print the result.")

COLUMNS = ("e2e", "ttft", "tpot", "worst_tenth", "tokens_per_s", "latency_max_s")


def runs() -> Iterator[dict]:
    """A row a rate, layout and pair of policies."""
    cost = CostModel.from_profile(profile_file.read(_PROFILE.value))
    arrivals = workload(_TRACE.value, _REQUESTS.value, 0)
    layouts = parse_list("layouts", _LAYOUTS.value, Layout.parse)
    classes = (SloClass(1.0, Slo(_TTFT.value, _TPOT.value)),)
    for rate in parse_list("rates", _RATES.value, to_number):
        at_rate = rescale(arrivals, rate)
        for layout in layouts:
            scenario = Scenario(
                cost,
                classes,
                layout.num_prefill,
                layout.num_decode,
                layout.colocated,
                layout.fluid,
                noise=_NOISE.value,
            )
            yield {"rate": rate, "layout": scenario.layout, **figures(simulate(scenario, at_rate))}
            if _BASELINE.value and layout is layouts[0]:
                plain = replace(
                    scenario, fluid=False, prefill_policy="fcfs", decode_policy="continuous"
                )
                found = figures(simulate(plain, at_rate))
                yield {"rate": rate, "layout": f"baseline, {plain.layout}", **found}


def figures(summary: dict) -> dict[str, float | None]:
    """The columns of a row."""
    tenths = [tenth for tenth in summary["e2e_by_output_decile"] if tenth is not None]
    return {
        "e2e": summary["e2e_attainment"],
        "ttft": summary["ttft_attainment"],
        "tpot": summary["tpot_attainment"],
        "worst_tenth": min(tenths, default=None),
        "tokens_per_s": summary["decode_tokens_per_s"],
        "latency_max_s": summary["latency_max_s"],
    }


def fleet(count: int, cost: CostModel, prompts: int = 20) -> Fleet:
    """A router's view of so many instances, of which a third receive, with `prompts` waiting on
    each.
    """
    made, random = Fleet(cost, clock=lambda: 0.0), np.random.default_rng(0)
    for index in range(count):
        due = np.sort(random.uniform(0, 1, prompts))
        ahead_s = np.cumsum(random.uniform(0.01, 0.1, prompts))
        receives = index % 3 == 2
        summary = Summary(
            f"worker-{index}",
            Role.BOTH,
            random.uniform(0, 0.1),
            due.tolist(),
            ahead_s.tolist(),
            pace=1.0,
            load=random.uniform(0.5, 1) if receives else max(random.uniform(-1, 0.5), 0.0),
            room=random.uniform(0, 400_000),
            flows=True,
            receives=receives,
        )
        made.join(Peer(summary.id, Role.BOTH, lambda message: None, cost, summary))
    return made


def decision_us(decide: Callable[[], object], seconds: float = 1.0) -> tuple[float, float]:
    """Median and 90th percentile of what a decision costs, in microseconds of a core."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 10 or time.perf_counter() - begin < seconds:
        start = time.thread_time()
        decide()
        times.append(1e6 * (time.thread_time() - start))
    return statistics.median(times), statistics.quantiles(times, n=10)[-1]


def decisions(seconds: float = 1.0) -> Iterator[dict]:
    """A row a decision and number of instances."""
    cost = CostModel.from_profile(profile_file.read(_PROFILE.value))
    slo = Slo(1.0, 0.025)
    submit = Submit(Request("a", 0.0, range(1000), 1000, slo))
    for count in (3, 100):
        workers = fleet(count, cost)
        peers = workers.taking(prefill=True)
        for name, decide in (
            ("prompt", partial(workers.choose_prefill, peers, submit)),
            ("sequence", partial(workers.place, peers[0], 1000, slo, late=False)),
        ):
            median, high = decision_us(decide, seconds)
            yield {"decision": name, "instances": count, "median_us": median, "p90_us": high}


def main(argv: list[str]) -> None:
    """Prints a row as soon as it is there."""
    rows = []
    for row in decisions() if _DECISIONS.value else runs():
        rows.append(row)
        if _OUTPUT.value == "text":
            if len(rows) == 1:
                print("  ".join(f"{name:>13}" for name in row))
            cells = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
            print("  ".join(f"{cell:>13}" for cell in cells), flush=True)
    if _OUTPUT.value == "json":
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    app.run(main)
