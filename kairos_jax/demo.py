"""Serves one workload under three pairs of policies, and shows what the scheduler changes.

  kairos demo --config=smollm2_135m_cpu --output=out/demo

Each pair gets a fresh server process and the same requests at the same times, over gRPC. The rate
is chosen from the measured profile so that the baseline is under pressure. The pairs are served one
after another, so the machine may be slower for one of them. A row whose pace differs from the other
rows by more than a tenth is run again once. If the rows still differ, the demo says so. It also
names each part of the measured profile that fits poorly.
"""

import asyncio
import contextlib
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from absl import flags
from rich.console import Console

from kairos_jax.config import ServerConfig
from kairos_jax.engine.profiling import fit_line
from kairos_jax.lab.pace import level, pace_text, pace_warnings, paces_text, read_pace
from kairos_jax.lab.replay import fit_to_model, replay
from kairos_jax.lab.report.comparison import Run, print_table, write_report
from kairos_jax.lab.simulated import devices_text, layout_of
from kairos_jax.process import early, launch
from kairos_jax.process.outputs import folder_to_write
from kairos_jax.process.progress import bars
from kairos_jax.rpc import kairos_pb2 as pb
from schedulers import fitting
from schedulers.cost import CostModel
from schedulers.simulation.workload import Arrival, synthetic

PAIRS = (("fcfs", "continuous"), ("kairos", "kairos"), ("kairos_plus", "kairos_plus"))
_STOP_TIMEOUT_S = 40.0
# Its server's log would stand amid its own tables.
_QUIET = ("--log_level=warning",)


Pair = tuple[str, str]
"""A prefill policy and a decode policy."""


class Addresses(NamedTuple):
    """Where a server listens, each as host:port."""

    http: str
    grpc: str


class ProcessFailed(Exception):
    """A process that the demo started has failed; the message says which and how."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests, and the rate (a second) that they arrive at."""

    arrivals: Sequence[Arrival]
    rate: float

    def __str__(self) -> str:
        def lengths(values: list[int]) -> str:
            return f"{sum(values) / len(values):.0f} tokens in the mean, {max(values)} at most"

        prompts = lengths([arrival.num_prompt for arrival in self.arrivals])
        outputs = lengths([arrival.num_output for arrival in self.arrivals])
        count = len(self.arrivals)
        return f"{count} requests at {self.rate:.2f}/s; prompts {prompts}; outputs {outputs}"


def capacity(
    cost: CostModel, arrivals: Sequence[Arrival], config: ServerConfig, shared: bool
) -> float:
    """Requests a second that all instances finish when busy without a pause.

    shared: they run on the same cores, so that their times add up. Otherwise the slower role
    decides.
    """
    max_batch = config.decode.max_batch
    count = len(arrivals)
    prefill_s = sum(cost.prefill_s(arrival.num_prompt) for arrival in arrivals) / count
    outputs = sum(arrival.num_output for arrival in arrivals) / count
    context = sum(arrival.num_prompt + arrival.num_output / 2 for arrival in arrivals) / count
    decode_s = outputs * cost.decode_s([round(context)] * max_batch) / max_batch
    if shared:
        return 1 / (prefill_s + decode_s)
    if config.colocated:
        return config.prefill.instances / (prefill_s + decode_s)
    return min(config.prefill.instances / prefill_s, config.decode.instances / decode_s)


def choose_workload(config: ServerConfig, profile: dict) -> Workload:
    """A synthetic long tail at --pressure times the capacity, for --duration_s seconds."""
    model = pb.Model(max_context=config.max_context, max_tokens=config.max_tokens)
    values = flags.FLAGS

    def arrivals(num_requests: int, rate: float) -> list[Arrival]:
        made = synthetic(num_requests, rate, values.seed)
        return fit_to_model(made, model, values.max_prompt, values.max_output)

    typical = arrivals(2000, 1.0)
    cost = CostModel.from_profile(profile)
    shared = profile["platform"] == "cpu"
    full = capacity(cost, typical, config, shared)
    rate = values.pressure * full
    return Workload(arrivals(max(round(rate * values.duration_s), 2), rate), rate)


@contextlib.contextmanager
def server(arguments: Sequence[str], console: Console) -> Iterator[Addresses]:
    """A server process on free ports; yields its addresses once it is ready, and ends it after.

    Raises:
        ProcessFailed: it ended before it was ready.
    """
    command = [sys.executable, "-m", "kairos_jax.serve", "--port=0", *_QUIET, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield _addresses(process, console)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()


def _addresses(process: subprocess.Popen, console: Console) -> Addresses:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready"):
            console.print(f"  {line.strip()}", style="dim", highlight=False)
            found = re.search(r"HTTP on (\S+), gRPC on (\S+)$", line.strip())
            assert found, line
            return Addresses(*found.groups())
    raise ProcessFailed(f"the server ended with code {process.wait()} before it was ready")


def measure(arguments: Sequence[str], output: Path) -> dict:
    """The profile, measured by a process of its own, which leaves the compilation cache warm."""
    command = [sys.executable, "-m", "kairos_jax.profile", *arguments, f"--output={output}"]
    process = subprocess.run(command, stdout=subprocess.DEVNULL)
    if process.returncode:
        raise ProcessFailed(f"profiling ended with code {process.returncode}")
    return json.loads(output.read_text())


def replay_pairs(
    pairs: Sequence[Pair], replay: Callable[[Pair], Run], say: Callable[[str], object]
) -> list[Run]:
    """A row for each pair, at one pace as far as a second run brings it about.

    replay: serves the workload under a pair. say: is told of second runs.
    """
    runs = [replay(pair) for pair in pairs]
    return level(runs, lambda row: replay(pairs[row]), say)


def replay_pair(pair: Pair, arguments: Sequence[str], config: ServerConfig, load: Workload) -> Run:
    """Serves the workload under one pair of policies."""
    label = " + ".join(pair)
    console = Console()
    console.rule(f"[bold]{label}", align="left")
    policies = [f"--config.prefill.policy={pair[0]}", f"--config.decode.policy={pair[1]}"]
    with server([*arguments, *policies], console) as addresses:
        with bars() as progress:
            show = functools.partial(progress, f"replay under {label}", total=len(load.arrivals))
            slo, seed = config.default_slo, flags.FLAGS.seed
            records = asyncio.run(
                replay(addresses.grpc, load.arrivals, slo, seed=seed, on_ended=show)
            )
        for error in sorted({record.error for record in records if record.error}):
            console.print(f"  failed requests: {error}", style="red")
        if not any(record.outcome.done for record in records):
            raise ProcessFailed(f"the server under {label} answered nothing")
        try:
            pace = read_pace(addresses.http)
        except (OSError, ValueError) as error:
            raise ProcessFailed(f"the server under {label} tells no pace: {error}") from error
    return Run(label, [record.outcome for record in records], pace)


def _facts(config: ServerConfig, profile: dict, load: Workload) -> dict[str, str]:
    return {
        "Model": f"{profile['model']}, {config.dtype}",
        "Layout": str(layout_of(config)),
        "Devices": f"{profile['device']}, {devices_text(config)}",
        "Workload": f"{load}; greedy, end of sequence ignored",
        "Step times": f"{profile['source']} {profile['date']}; {fit_line(profile)}",
        "Versions": ", ".join(f"{name} {v}" for name, v in profile["versions"].items()),
        "Batch cap": f"{config.decode.max_batch} sequences, for every policy",
    }


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    early.interrupt_on_signals()
    output = folder_to_write("output", flags.FLAGS.output)
    if not launch.has_config():
        made = output / "config.py"
        made.unlink(missing_ok=True)
        launch.make_config(made)
    config = launch.read_config()
    # What was said of the config goes on to the processes, the overrides after the file.
    said = {name: flags.FLAGS[name] for name in sorted(flags.FLAGS) if name.startswith(_PASSED)}
    passed = [flag.serialize() for flag in said.values() if flag.present]
    console = Console()
    try:
        console.rule("[bold]step-time profile", align="left")
        profile = measure(passed, output / "profile.json")
        load = choose_workload(config, profile)
        console.print(f"  {fit_line(profile)}", f"  workload: {load}", sep="\n", highlight=False)
        for warning in fitting.warnings(profile):
            console.print(f"  {warning}", style="yellow", highlight=False)
        arguments = [*passed, f"--profile={output / 'profile.json'}"]
        run = functools.partial(replay_pair, arguments=arguments, config=config, load=load)
        runs = replay_pairs(PAIRS, run, lambda text: console.print(f"  {text}", highlight=False))
    except ProcessFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.rule("[bold]the same requests under each pair of policies", align="left")
    print_table(runs)
    print(f"\n{pace_text(runs)}")
    summaries = {run.label: run.summary | {"pace": run.pace} for run in runs}
    (output / "summary.json").write_text(json.dumps(summaries, indent=1) + "\n")
    report = output / "report.html"
    facts = _facts(config, profile, load) | {"Pace": paces_text(runs)}
    warnings = [*fitting.warnings(profile), *pace_warnings(runs)]
    write_report(report, runs, "kairos_jax demo", facts, warnings)
    print(
        f"\nReport: {report}\n"
        "Talk to a server yourself:\n"
        "  make serve\n"
        "  .venv/bin/kairos client --chat --temperature=0 "
        '--prompt="What is the capital of France?"'
    )
    return 0


_PASSED = ("config", "model", "cpu_devices")


def define_flags() -> None:
    """Not at import: other binaries have flags of the same names."""
    launch.define_config_flag()
    flags.DEFINE_string("output", "out/demo", "Directory for the report, profile and summary.")
    flags.DEFINE_float("pressure", 1.1, "Rate, as a multiple of the estimated capacity.", 0.01)
    flags.DEFINE_float("duration_s", 60.0, "Seconds from the first arrival to the last.", 1.0)
    flags.DEFINE_integer("max_prompt", 1024, "Longest prompt of the workload, tokens.", 1)
    flags.DEFINE_integer("max_output", 128, "Longest output of the workload, tokens.", 1)
    flags.DEFINE_integer("seed", 0, "Seed of the workload.")


if __name__ == "__main__":
    define_flags()
    launch.run(main)
