r"""Simulates a workload under scheduling policies, with step times from a profile.

kairos simulate --profile=llama3_8b_h100_roofline --trace=synthetic --rate=30 \
    --num_prefill=2 --num_decode=1 --ttft=1 --tpot=0.025
kairos simulate --advise --devices=8 --profile=llama3_8b_h100_roofline \
    --trace=synthetic --ttft=1 --tpot=0.025

The policies and the ledger are those of the live server. Times are seconds, lengths tokens.
"""

import contextlib
import json
import math
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, TextIO

from absl import flags

from kairos_jax.engine import profile_file
from kairos_jax.lab.flags import NUM_SYNTHETIC, workload
from kairos_jax.lab.report.simulation import advice_text, run_text
from kairos_jax.observe.explain import explain
from kairos_jax.observe.perfetto import trace_events
from kairos_jax.process import command, early
from kairos_jax.process.command import UsageError
from kairos_jax.process.outputs import file_to_write
from kairos_jax.process.progress import bars, waiting
from schedulers.cost import CostModel
from schedulers.ledger.instance import Policy
from schedulers.ledger.journal import Journal, to_lines
from schedulers.policies import decode, prefill
from schedulers.simulation.scenario import Scenario, build, report
from schedulers.simulation.simulator import Simulation
from schedulers.simulation.workload import (
    Arrival,
    SloClass,
    check_slo,
    parse_classes,
    poisson,
    rescale,
)

_NUM_SYNTHETIC_ADVISE = 50_000
_RUN_ONLY = (
    *("rate", "num_prefill", "num_decode", "colocated", "fluid"),
    *("journal", "explain", "perfetto"),
)


def define_flags(values: flags.FlagValues) -> None:
    """Not at import: other binaries have flags of the same names."""
    boolean, enum, integer, number, string = (
        partial(define, flag_values=values)
        for define in (
            flags.DEFINE_boolean,
            flags.DEFINE_enum,
            flags.DEFINE_integer,
            flags.DEFINE_float,
            flags.DEFINE_string,
        )
    )
    string("profile", None, "Step times: a profile's file, or the name of a packaged one.")
    string("trace", None, "'synthetic', or the file of an Azure or Mooncake trace.")
    number("rate", None, "Requests per second; default: the trace's own, 1 for synthetic.")
    enum("arrivals", "trace", ["trace", "poisson"], "Arrival times: the trace's, or Poisson.")
    integer(
        "num_requests", 0, f"How many, from the start; 0: all, {NUM_SYNTHETIC} for synthetic.", 0
    )
    integer("num_prefill", 1, "Prefill instances.")
    integer("num_decode", 1, "Decode instances.")
    integer("colocated", 0, "Instances that do both, instead of those.")
    boolean("fluid", False, "Roles flow: the numbers of instances say where they begin.")
    number("ttft", None, "SLO: seconds to the first token.")
    number("tpot", None, "SLO: seconds per token after the first.")
    string("classes", None, "SHARE:TTFT:TPOT,... instead of one SLO for all.")
    string("prefill_policy", "kairos_plus", f"One of {', '.join(prefill.POLICIES)}.")
    string("decode_policy", "kairos_plus", f"One of {', '.join(decode.POLICIES)}.")
    integer("max_batch", 256, "Sequences of a decode step, at most.")
    integer("chunk", 4096, "Prompt tokens of a prefill step, at most.")
    integer("page_size", 16, "Tokens of a KV page.")
    number(
        "parked_tokens",
        None,
        "Tokens whose KV may wait in a prefill host's memory; default: no limit.",
    )
    boolean("learn_outputs", True, "Learn from finished requests how long outputs will be.")
    boolean("prefix_cache", False, "Prompts that begin alike, by the trace, share pages.")
    number(
        "pack",
        None,
        "Base costs of a prefill step that other prompts may add to it; default: no limit.",
    )
    number("noise", 0.0, "Standard deviation of the logarithm of step times.")
    number("bias", 0.0, "Policies believe that steps take (1 + bias) times their real time.")
    integer("seed", 0, "Seed of noise, classes, Poisson and synthetic workloads.")
    boolean("advise", False, "Compare all layouts of --devices: the highest rate that each holds.")
    integer("devices", 8, "With --advise: devices of all instances.", 2)
    number("chip_hour", None, "With --advise: price of a device per hour, to report costs.", 0.0)
    string("journal", None, "File for every decision, in JSON lines.")
    string("explain", None, "Print why this request waited: its number in the trace, from 0.")
    string("perfetto", None, "File for a trace of the run, for ui.perfetto.dev.")
    enum("output", None, ["json"], "json: one JSON object instead of a table.")


def scenario_of(values: Any) -> Scenario:
    """What the flags say of the server. Raises UsageError."""
    profile = profile_file.read(_given(values, "profile"))
    two = not values.colocated
    if not two:
        _refuse(values, ("num_prefill", "num_decode", "fluid"), "--{} does not go with --colocated")
    try:
        return Scenario(
            CostModel.from_profile(profile),
            classes_of(values),
            num_prefill=values.num_prefill if two else 0,
            num_decode=values.num_decode if two else 0,
            colocated=values.colocated,
            fluid=values.fluid,
            prefill_policy=values.prefill_policy,
            decode_policy=values.decode_policy,
            max_batch=values.max_batch,
            chunk=values.chunk,
            page_size=values.page_size,
            parked_tokens=math.inf if values.parked_tokens is None else values.parked_tokens,
            learn_outputs=values.learn_outputs,
            pack=math.inf if values.pack is None else values.pack,
            prefix_cache=values.prefix_cache,
            noise=values.noise,
            bias=values.bias,
            seed=values.seed,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def classes_of(values: Any) -> tuple[SloClass, ...]:
    """The SLOs that the flags give. Raises UsageError."""
    try:
        if values.classes is not None:
            return parse_classes(values.classes)
        return (SloClass(1.0, check_slo(_given(values, "ttft"), _given(values, "tpot"))),)
    except ValueError as error:
        raise UsageError(f"--classes: {error}" if values.classes else str(error)) from error


def workload_of(values: Any, num_synthetic: int = NUM_SYNTHETIC) -> list[Arrival]:
    """The requests that the flags ask for; so many synthetic ones, where that is not said. Raises
    UsageError.
    """
    trace, count = _given(values, "trace"), values.num_requests
    if trace == "synthetic":
        count = count or num_synthetic
    arrivals, rate = workload(trace, count, values.seed), values.rate
    try:
        if values.arrivals == "poisson":
            own = _rate(arrivals) or 1.0
            return poisson(arrivals, own if rate is None else rate, values.seed)
        return arrivals if rate is None else rescale(arrivals, rate)
    except ValueError as error:
        raise UsageError(str(error)) from error


def simulated(values: Any) -> dict[str, Any]:
    """Runs what the flags describe; returns what --output=json prints. Raises UsageError."""
    _refuse(values, ("devices", "chip_hour"), "--{} goes with --advise")
    scenario, arrivals = scenario_of(values), workload_of(values)
    try:
        simulation = build(scenario, arrivals)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if values.explain and values.explain not in map(str, range(len(arrivals))):
        raise UsageError(f"--explain={values.explain}: requests are 0 to {len(arrivals) - 1}")
    wanted = values.journal or values.perfetto or values.explain
    journal = _journal(simulation) if wanted else None
    with _file_to_write(values, "journal") as lines, _file_to_write(values, "perfetto") as trace:
        begin = time.perf_counter()
        with waiting("simulate"):
            answer = report(scenario, arrivals, simulation.run())
        answer["wall_s"] = time.perf_counter() - begin
        records = list(journal.take()) if journal else []
        if lines:
            lines.writelines(to_lines(records))
        if trace:
            json.dump(trace_events(records), trace)
    if values.explain:
        answer["explained"] = explain(records, _policies(simulation), values.explain)
    settings = _settings(values) | {"rate": _rate(arrivals), "layout": scenario.layout}
    return answer | {"settings": settings}


def _journal(simulation: Simulation) -> Journal:
    """Of all that the simulation, which has not begun, will decide."""
    journal = Journal(lambda: simulation.now)
    for instance, _ in (*simulation.fleet.prefill, *simulation.fleet.decode):
        instance.journal = journal.recorder(instance)
    return journal


def _policies(simulation: Simulation) -> dict[str, Policy]:
    """By instance id."""
    pairs = (*simulation.fleet.prefill, *simulation.fleet.decode)
    return {instance.id: policy for instance, policy in pairs}


@contextlib.contextmanager
def _file_to_write(values: Any, flag: str) -> Iterator[TextIO | None]:
    """The file that a flag names, if it does; opened first, so that no run is in vain. Raises
    UsageError.
    """
    path = values[flag].value
    if path is None:
        yield None
        return
    file_to_write(flag, path)
    try:
        with open(path, "w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise UsageError(f"--{flag}={path}: {error.strerror or error}") from error


def advised(values: Any) -> dict[str, Any]:
    """Compares layouts; returns what --output=json prints. Raises UsageError."""
    # Processes: not worth the wait for a single run.
    from kairos_jax.lab.advise import LOAD_S, RESOLUTION, TARGET, advise

    _refuse(values, _RUN_ONLY, "--{} does not go with --advise")
    scenario = scenario_of(values)
    arrivals = workload_of(values, _NUM_SYNTHETIC_ADVISE)
    load_s = math.inf if values.num_requests else LOAD_S
    try:
        build(scenario, rescale(arrivals, 1.0))  # what cannot be simulated is told of at once
    except ValueError as error:
        raise UsageError(str(error)) from error
    begin = time.perf_counter()
    with bars() as progress:
        show = partial(progress, "simulate")
        answer = advise(
            scenario, arrivals, values.devices, show, load_s=load_s, of_instance=_sizes(values)
        )
    if values.chip_hour is not None:
        tokens = statistics.fmean(each.num_output for each in arrivals)
        for each in answer["ranking"]:
            a_second = values.chip_hour * values.devices / 3600
            cost = 1e6 * a_second / (each["rate"] * tokens) if each["rate"] else None
            each["cost_of_million_tokens"] = cost
    return {
        **answer,
        "target_attainment": TARGET,
        "resolution": RESOLUTION,
        "num_requests": max(each["num_requests"] for each in answer["ranking"]),
        "wall_s": time.perf_counter() - begin,
        "settings": _settings(values),
    }


def _sizes(values: Any) -> tuple[int, int]:
    """Devices of a prefill and of a decode instance, where the profile says. Raises UsageError."""
    said = profile_file.read(values.profile).get("devices", {})
    sizes = said.get("prefill", 1), said.get("decode", 1)
    if any(type(size) is not int or size < 1 for size in sizes):
        raise UsageError(f"profile {values.profile}: devices must be whole numbers, got {said}")
    if values.devices < sum(sizes):
        raise UsageError(
            f"--devices must be at least {sum(sizes)}: by the profile, a prefill instance takes "
            f"{sizes[0]} and a decode instance {sizes[1]}, got {values.devices}"
        )
    return sizes


def _rate(arrivals: list[Arrival]) -> float | None:
    """Requests a second; None where all come at once."""
    duration_s = arrivals[-1].at - arrivals[0].at
    return len(arrivals) / duration_s if duration_s > 0 else None


def _settings(values: Any) -> dict[str, Any]:
    """The flags of this binary, so that a result says what it is of."""
    names = flags.FlagValues()
    define_flags(names)
    return {name: values[name].value for name in names if name not in ("output", "help")}


def _given(values: Any, name: str) -> Any:
    if values[name].value is None:
        raise UsageError(f"--{name} is missing")
    return values[name].value


def _refuse(values: Any, names: tuple[str, ...], words: str) -> None:
    """A flag that would do nothing is an error."""
    for name in names:
        if values[name].present:
            raise UsageError(words.format(name))


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    early.interrupt_on_signals()
    values = flags.FLAGS
    answer = advised(values) if values.advise else simulated(values)
    if values.output == "json":
        print(json.dumps(answer, allow_nan=False))
    else:
        print((advice_text if values.advise else run_text)(answer))
    return 0


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    command.run(main)
