"""Holds the simulator against live engines: one workload at several loads, served and simulated.

  python -m kairos_jax.agreement --config=configs/smollm2_135m_cpu_colocated.py \
      --output=out/agreement

Step times are measured first. The knee is the highest rate at which a simulated kairos_plus attains
90 % end to end, and the loads are multiples of it. Each is served in real time, open loop, by live
engines in this process, and every decision is asked for again; then the same arrivals are simulated
with the same profile, limits and policies. Machines drift, and above the knee attainment is steep
in the step time: so they are simulated once as the profile has it, and once more with all steps
longer by what the live ones came to in sum. Nothing else should run on the machine meanwhile.

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

import numpy as np
from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from kairos_jax.config import ServerConfig
from kairos_jax.engine import profile_file, profiling
from kairos_jax.engine.build import build_engines
from kairos_jax.engine.devices import start_jax
from kairos_jax.engine.model import open_model
from kairos_jax.lab.flags import parse_list, slo_text, workload_text
from kairos_jax.lab.open_loop import InstanceDied, Live, serve
from kairos_jax.lab.replay import fit_to_model
from kairos_jax.process import launch
from kairos_jax.process.command import UsageError
from kairos_jax.process.progress import Progress, bars
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.worker.build import build_policy
from schedulers.cost import CostModel
from schedulers.ledger.instance import Instance, Role
from schedulers.ledger.journal import Journal, Ledgers, Record, check, to_lines
from schedulers.simulation.attainment import Outcome, summarize
from schedulers.simulation.scenario import Scenario, build
from schedulers.simulation.workload import Arrival, SloClass, rescale, synthetic

KNEE_PERCENT = 90.0
KINDS: tuple[str, ...] = ("ttft", "tpot", "e2e")
# Requests that the workload has, at most, and those that the knee is found with.
_NUM_REQUESTS, _NUM_KNEE = 5000, 500
_KNEE_PRECISION = 0.01
# Simulations that tell how much chance there is in an attainment.
_NUM_CHANCES = 10


@dataclass(frozen=True, slots=True)
class Steps:
    """How live steps compare with what the profile says of them.

    ratio: time that they took to time predicted, of all in sum. noise: standard deviation of the
    logarithm of the same of each. between_s: median time from the end of one to the next's begin.
    """

    ratio: float
    noise: float
    between_s: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """What came of one load. live, simulated: attainments, percent, by KINDS. drifted: simulated
    with steps that take `steps.ratio` times as long, which the policies are not told. chance:
    standard deviation of simulated attainments, in points, if steps are as noisy as they were.
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


def scenario_of(config: ServerConfig, cost: CostModel) -> Scenario:
    """What the config describes, to be simulated."""
    first, second, colocated = config.prefill, config.decode, config.colocated
    return Scenario(
        cost,
        (SloClass(1.0, config.default_slo),),
        num_prefill=0 if colocated else first.instances,
        num_decode=0 if colocated else second.instances,
        colocated=first.instances if colocated else 0,
        prefill_policy=first.policy,
        decode_policy=second.policy,
        pack=first.pack,
        limits={role: config.limits(role) for role in Role},
    )


def find_knee(scenario: Scenario, arrivals: Sequence[Arrival]) -> float:
    """The highest rate, in requests a second, at which KNEE_PERCENT attain both SLOs.

    Raises UsageError if there is none.
    """
    scenario = replace(scenario, prefill_policy="kairos_plus", decode_policy="kairos_plus")

    def holds(rate: float) -> bool:
        return _attained(_simulate(scenario, rescale(arrivals, rate)))["e2e"] >= KNEE_PERCENT

    # Prompts alone would keep all instances busy.
    prompts_s = sum(scenario.cost.prefill_s(arrival.num_prompt) for arrival in arrivals)
    most = (scenario.colocated or scenario.num_prefill) * len(arrivals) / prompts_s
    low, high = most / 100, most
    if not holds(low):
        raise UsageError(
            f"the SLO ({slo_text(scenario.classes)}) is too tight for these step times: "
            f"at {low:.2g} requests/s fewer than {KNEE_PERCENT:g} % attain it"
        )
    while high > (1 + _KNEE_PRECISION) * low:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


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
    noisy = [
        _attained(_simulate(replace(scenario, noise=steps.noise, seed=seed), arrivals))
        for seed in range(_NUM_CHANCES)
    ]
    return Agreement(
        load,
        rate,
        len(arrivals),
        _attained(served.outcomes),
        _attained(_simulate(scenario, arrivals)),
        _attained(_simulate(drifted_by(scenario, steps.ratio), arrivals)),
        {kind: statistics.pstdev(each[kind] for each in noisy) for kind in KINDS},
        check(records, policies),
        steps,
    ), records


def measure_steps(records: Sequence[Record]) -> Steps:
    """Looks at all steps of a run that has at least one."""
    ledgers, began, ended = Ledgers(), {}, {}
    took, predicted, between = [], [], []
    for record in records:
        event = ledgers.read(record)
        id = event.instance.id
        if event.verb == "begin" and event.batch.work:
            began[id] = event.at
            if id in ended:
                between.append(event.at - ended[id])
        elif event.verb == "end":
            ended[id] = event.at
            took.append(event.at - began[id])
            predicted.append(event.batch.predicted_s)
        ledgers.apply(event)
    ratios = np.array(took) / np.array(predicted)
    between_s = float(np.median(between)) if between else 0.0
    return Steps(sum(took) / sum(predicted), float(np.log(ratios).std()), between_s)


def drifted_by(scenario: Scenario, ratio: float) -> Scenario:
    """Every step takes `ratio` times as long; the policies believe what they did."""
    return replace(scenario, cost=scenario.cost.scaled(ratio), bias=1 / ratio - 1)


def _simulate(scenario: Scenario, arrivals: Sequence[Arrival]) -> list[Outcome]:
    return build(scenario, arrivals).run()


def _attained(outcomes: Sequence[Outcome]) -> dict[str, float]:
    summary = summarize(outcomes)
    return {kind: summary[f"{kind}_attainment"] for kind in KINDS}


def print_table(rows: Sequence[Agreement], console: Console) -> None:
    """A line a load. Attainments are live, simulated, and simulated with the drift of the live
    steps; ± is the chance in the simulated ones.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    attained = [f"{name}\nlive   sim drift" for name in ("TTFT", "TPOT", "end to end")]
    headers = ("load", "rate", "requests", *attained, "±", "decisions", "steps\nratio")
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


def _load(text: str) -> float:
    """Raises ValueError."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"must be positive, got {text}")
    return value


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    values, config = flags.FLAGS, launch.read_config()
    loads, folder = parse_list("loads", values.loads, _load), Path(values.output)
    limits = pb.Model(max_context=config.max_context, max_tokens=config.max_tokens)
    workload = synthetic(_NUM_REQUESTS, 1.0, values.seed)
    workload = fit_to_model(workload, limits, values.max_prompt, values.max_output)
    folder.mkdir(parents=True, exist_ok=True)
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
        "layout": config.layout,
        "policies": [config.prefill.policy, config.decode.policy],
        "slo": asdict(config.slo),
        "workload": workload_text(workload, "synthetic"),
        "step_times": profiling.fit_line(measured),
        "knee_rps": knee,
        "loads": [asdict(row) for row in rows],
    }
    (folder / "agreement.json").write_text(json.dumps(report, indent=1) + "\n")
    console = Console()
    console.width = max(console.width, 100)
    console.print(f"{config.layout}, knee at {knee:.2f} requests/s", highlight=False)
    print_table(rows, console)
    plain = max((row.largest(row.simulated) for row in rows), key=abs)
    drifted = max((row.largest(row.drifted) for row in rows), key=abs)
    print(
        f"largest difference: {plain:+.1f} points; with the drift of the steps: {drifted:+.1f}\n"
        f"Report: {folder / 'agreement.json'}"
    )
    return 0


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    launch.define_config_flag()
    flags.DEFINE_string("profile", None, "Step times: a file; else they are measured.")
    flags.DEFINE_string("output", "out/agreement", "Folder for report, profile and journals.")
    flags.DEFINE_string("loads", "0.5,0.8,1,1.15,1.3", "Multiples of the knee: L,L,...")
    flags.DEFINE_float("duration_s", 60.0, "Seconds from first arrival to last, a load.", 1.0)
    flags.DEFINE_integer("max_prompt", 1024, "Longest prompt of the workload, tokens.", 1)
    flags.DEFINE_integer("max_output", 128, "Longest output of the workload, tokens.", 1)
    flags.DEFINE_integer("seed", 0, "Of the workload.")


if __name__ == "__main__":
    define_flags()
    launch.run(main)
