r"""Holds the simulator against live engines: one workload at several loads, served and simulated.

  kairos agreement --config=smollm2_135m_cpu_colocated \
      --output=out/agreement

Step times are measured first. The knee is the highest rate at which a simulated kairos_plus attains
90 % end to end, and the loads are multiples of it. Each is served in real time, open loop, by live
engines in this process, and every decision is asked for again; then the same arrivals are simulated
with the same profile, limits and policies. Machines drift, and above the knee attainment is steep
in the step time: so they are simulated once as the profile has it, and ten times with all steps
longer by what the live ones came to in sum, and as noisy as those. Nothing else should run on the
machine at that time.

The contexts of the workload must be of different lengths: the form by which the profile says that
steps read contexts shows only in mixed batches. The table has a ratio for these steps alone.

Exit codes: 0; 1 if an instance died, or a decision came out otherwise.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from kairos_jax.config import ServerConfig
from kairos_jax.engine import configure, profile_file, profiling
from kairos_jax.engine.build import build_engines
from kairos_jax.engine.devices import start_jax
from kairos_jax.engine.model import open_model
from kairos_jax.lab.flags import parse_list, workload_text
from kairos_jax.lab.open_loop import InstanceDied, Live, serve
from kairos_jax.lab.replay import fit_to_model
from kairos_jax.lab.simulated import (
    KINDS,
    attained,
    drifted_by,
    find_knee,
    layout_of,
    scenario_of,
    simulated,
)
from kairos_jax.lab.step_ratios import Steps, measure_steps
from kairos_jax.process import launch
from kairos_jax.process.command import UsageError
from kairos_jax.process.outputs import folder_to_write
from kairos_jax.process.progress import Progress, bars
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.worker.build import build_policy
from schedulers.cost import CostModel
from schedulers.ledger.instance import Instance
from schedulers.ledger.journal import Journal, Record, check, to_lines
from schedulers.simulation.workload import Arrival, rescale, synthetic

# Requests of the workload, at most; and requests with which the knee is found.
_NUM_REQUESTS, _NUM_KNEE = 5000, 500
# Simulations with noise: they tell how much chance there is in an attainment.
_NUM_CHANCES = 10
# One request in a hundred must have a context so many times the median.
_SPREAD = 3.0


@dataclass(frozen=True, slots=True)
class Agreement:
    """What came of one load. live, simulated: attainments, percent, by KINDS. drifted: simulated
    with steps that take `steps.ratio` times as long, which the policies are not told, and are as
    noisy as they were; means of some such runs. chance: their standard deviation, in points.
    decisions: that were recorded, and came out equal when asked for again.
    """

    load: float
    rate: float
    num_requests: int
    live: dict[str, float]
    simulated: dict[str, float]
    drifted: dict[str, float]
    chance: dict[str, float]
    decisions: int
    steps: Steps

    def largest(self, simulated: dict[str, float]) -> float:
        """Simulated less live, in points, of the kind that differs most."""
        return max((simulated[kind] - self.live[kind] for kind in KINDS), key=abs)


def compare(
    live: Live, arrivals: Sequence[Arrival], load: float, rate: float, progress: Progress
) -> tuple[Agreement, list[Record]]:
    """Serves the arrivals and simulates them. Returns the journal of the live run too.

    Raises InstanceDied; ValueError if a recorded decision comes out otherwise.
    """
    journal, policies = Journal(time.monotonic), {}

    def record(instances: Sequence[Instance]) -> None:
        for instance in instances:
            instance.journal = journal.recorder(instance)
            policies[instance.id] = build_policy(live.config, instance.role, live.cost)

    slos = [live.config.default_slo] * len(arrivals)
    served = serve(replace(live, prepare=record), arrivals, slos, 0, progress)
    records = list(journal.take())
    steps, scenario = measure_steps(records), scenario_of(live.config, live.cost)
    late = replace(drifted_by(scenario, steps.ratio), noise=steps.noise)
    noisy = [simulated(replace(late, seed=seed), arrivals) for seed in range(_NUM_CHANCES)]
    return Agreement(
        load,
        rate,
        len(arrivals),
        attained(served.outcomes),
        simulated(scenario, arrivals),
        {kind: statistics.mean(each[kind] for each in noisy) for kind in KINDS},
        {kind: statistics.pstdev(each[kind] for each in noisy) for kind in KINDS},
        check(records, policies),
        steps,
    ), records


def print_table(rows: Sequence[Agreement], console: Console) -> None:
    """A line a load. Attainments are live, simulated, and simulated with the drift and noise of the
    live steps; ± is the chance in the latter. mixed: the ratio of steps with mixed contexts.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    attained = [f"{name}\nlive   sim drift" for name in ("TTFT", "TPOT", "end to end")]
    headers = ("load", "rate", "requests", *attained, "±", "decisions", "steps\nratio", "mixed")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.load:g}",
            f"{row.rate:.2f}",
            str(row.num_requests),
            *(
                f"{row.live[kind]:.1f} {row.simulated[kind]:5.1f} {row.drifted[kind]:5.1f}"
                for kind in KINDS
            ),
            f"{row.chance['e2e']:.1f}",
            str(row.decisions),
            f"{row.steps.ratio:.3f}",
            "-" if row.steps.mixed_ratio is None else f"{row.steps.mixed_ratio:.3f}",
        )
    console.print(table)


def compare_loads(
    live: Live,
    workload: Sequence[Arrival],
    loads: Sequence[float],
    duration_s: float,
    folder: Path,
    progress: Progress,
) -> tuple[float, list[Agreement]]:
    """Serves and simulates the first requests of a workload at each load, as many as come in
    `duration_s`; keeps the journals. Returns the knee too, in requests a second.

    Raises UsageError as `find_knee`, the others as `compare`.
    """
    knee = find_knee(scenario_of(live.config, live.cost), workload[:_NUM_KNEE])
    rows = []
    for load in loads:

        def show(stage: str, done: int, total: int, load: float = load) -> None:
            progress(f"{stage} at load {load:g}", done, total)

        rate = load * knee
        count = min(max(round(rate * duration_s), 2), len(workload))
        row, records = compare(live, rescale(workload[:count], rate), load, rate, show)
        with (folder / f"journal-{load:g}.jsonl").open("w") as file:
            file.writelines(to_lines(records))
        rows.append(row)
    return knee, rows


def make_workload(config: ServerConfig, values: Any) -> list[Arrival]:
    """What the flags say. Raises UsageError: contexts so alike that mixed batches are rare."""
    limits = pb.Model(max_context=config.max_context, max_tokens=config.max_tokens)
    made = synthetic(_NUM_REQUESTS, 1.0, values.seed, prompt_sigma=values.prompt_sigma)
    arrivals = fit_to_model(made, limits, values.max_prompt, values.max_output)
    middle, longest = _contexts(arrivals)
    if longest < _SPREAD * middle:
        raise UsageError(
            f"the contexts of the workload are too alike: median {middle:.0f} tokens, 99th "
            f"percentile {longest:.0f}; it must be {_SPREAD:g} times the median: raise "
            "--prompt_sigma or --max_prompt"
        )
    return arrivals


def _contexts(arrivals: Sequence[Arrival]) -> tuple[float, float]:
    """Median and 99th percentile of the requests' tokens, prompt and output together."""
    contexts = [arrival.num_prompt + arrival.num_output for arrival in arrivals]
    middle, longest = np.percentile(contexts, (50, 99)).tolist()
    return middle, longest


def _load(text: str) -> float:
    """Raises ValueError."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"must be positive, got {text}")
    return value


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    values, config = flags.FLAGS, configure.read_config()
    loads = parse_list("loads", values.loads, _load)
    workload = make_workload(config, values)
    folder = folder_to_write("output", values.output)
    devices = start_jax(config.num_devices, values.cpu_devices)
    with bars() as progress:
        model = open_model(config)
        engines = build_engines(config, model, devices, progress)
        if values.profile:
            measured = profile_file.read(values.profile)
        else:
            measured = profiling.measure(engines, config, config.model, progress)
            profiling.write(measured, folder / "profile.json")
        cost = CostModel.from_profile(measured)
        live = Live(config, engines, cost, model.checkpoint.config.vocab_size)
        try:
            knee, rows = compare_loads(live, workload, loads, values.duration_s, folder, progress)
        except (InstanceDied, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    report = {
        "model": config.model,
        "layout": str(layout_of(config)),
        "policies": [config.prefill.policy, config.decode.policy],
        "slo": asdict(config.slo),
        "workload": workload_text(workload, "synthetic"),
        "contexts": dict(zip(("median", "p99"), _contexts(workload), strict=True)),
        "step_times": profiling.fit_line(measured),
        "form": cost.decode.form,
        "knee_rps": knee,
        "loads": [asdict(row) for row in rows],
    }
    (folder / "agreement.json").write_text(json.dumps(report, indent=1) + "\n")
    console = Console()
    console.width = max(console.width, 110)
    console.print(f"{layout_of(config)}, knee at {knee:.2f} requests/s", highlight=False)
    console.print(f"step times: {profiling.fit_line(measured)}", highlight=False)
    print_table(rows, console)
    plain = max((row.largest(row.simulated) for row in rows), key=abs)
    drifted = max((row.largest(row.drifted) for row in rows), key=abs)
    print(
        f"largest difference: {plain:+.1f} points; "
        f"with drift and noise of the steps: {drifted:+.1f}\n"
        f"Report: {folder / 'agreement.json'}"
    )
    return 0


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    launch.define_config_flag()
    flags.DEFINE_string("profile", None, "Step-time profile; default: step times are measured.")
    flags.DEFINE_string("output", "out/agreement", "Folder for report, profile and journals.")
    flags.DEFINE_string("loads", "0.5,0.8,1,1.15,1.3", "Multiples of the knee: L,L,...")
    flags.DEFINE_float("duration_s", 60.0, "Seconds from first arrival to last, a load.", 1.0)
    flags.DEFINE_integer("max_prompt", 1024, "Longest prompt of the workload, tokens.", 1)
    flags.DEFINE_integer("max_output", 128, "Longest output of the workload, tokens.", 1)
    flags.DEFINE_float("prompt_sigma", 1.0, "Spread of prompts: deviation of their logarithm.", 0.0)
    flags.DEFINE_integer("seed", 0, "Seed of the workload.")


if __name__ == "__main__":
    define_flags()
    launch.run(main)
