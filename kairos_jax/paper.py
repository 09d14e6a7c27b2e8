"""Holds the paper's four claims against simulations of a recorded trace.

kairos paper --trace=AzureLLMInferenceTrace_conv.csv --output=out/paper

Kairos (arXiv 2605.02329) reports gains "up to" so much over FCFS prefill and continuous batching.
Here that baseline is swept over its batch cap, with and without packing of prompts, and for each
claim every load is compared with whichever of them is best at it. kairos_plus is also looked at on
the same instances with roles that flow, against the baseline on fixed ones. An 8B model on an H100
by roofline is always looked at; --profile adds one of measured step times, for which SLOs and rates
are derived.
"""

import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from kairos_jax.engine import profile_file
from kairos_jax.lab.advise import guess
from kairos_jax.lab.answer import answer
from kairos_jax.lab.cells import (
    Cell,
    Layout,
    Result,
    grid,
    on_basis,
    run_cells,
    scenario_of,
    simulate_cells,
    simulation_basis,
)
from kairos_jax.lab.claims import HELD, compare, markdown
from kairos_jax.lab.flags import slo_text, workload, workload_text
from kairos_jax.lab.report.table import write_table
from kairos_jax.process import command, early
from kairos_jax.process.command import UsageError
from kairos_jax.process.outputs import folder_to_write
from kairos_jax.process.progress import Progress, bars
from schedulers.cost import CostModel
from schedulers.ledger.request import Slo
from schedulers.simulation.scenario import Scenario
from schedulers.simulation.workload import Arrival, SloClass, fit_lengths

ROOFLINE = "llama3_8b_h100_roofline"
BASELINE = ("fcfs", "continuous")
OURS = (("kairos", "kairos"), ("kairos_plus", "kairos_plus"))
_CAPS = (32, 64, 128, 256, 512)
_PACKS = (0.0, math.inf)
_RATES = (20.0, 28.0, 32.0, 36.0, 40.0, 44.0, 48.0, 52.0)
# Of the highest rate at which the baseline holds; those above go by it as far as _RATES do.
_KNEES = (0.7, 0.85, 1.0, 1.15, 1.3, 1.45, 1.6, 1.8)
# A small machine's batches are small: a request takes many more steps to simulate.
_NUM_MEASURED = 1500
_NUM_KNEE = 1000  # requests that are enough to find it within its resolution
_RESOLUTION = 0.03


@dataclass(frozen=True, slots=True)
class Study:
    """One server, and the loads that it is put under. caps: batch caps of the baseline; others have
    that of 256, or the largest. notes: how it was chosen. The last of OURS is also put on the same
    instances with roles that flow.
    """

    name: str
    scenario: Scenario
    layout: Layout
    arrivals: Sequence[Arrival]
    caps: tuple[int, ...]
    rates: tuple[float, ...]
    notes: Mapping[str, str]

    @property
    def cells(self) -> list[Cell]:
        cap = 256 if 256 in self.caps else max(self.caps)
        layouts, packs, rates = [self.layout], _PACKS, self.rates
        baseline = grid(layouts, [BASELINE], self.caps, packs, rates)
        ours = grid(layouts, OURS, [cap], packs, rates)
        if not self.layout.colocated and not self.layout.fluid:
            flows = replace(self.layout, fluid=True)
            ours += grid([flows], OURS[-1:], [cap], packs, rates)
        return on_basis(baseline + ours, simulation_basis(self.scenario, self.arrivals))


def roofline_study(profile: Mapping[str, Any], layout: Layout, arrivals: list[Arrival]) -> Study:
    """Llama 3 8B on an H100, TTFT 1 s and TPOT 25 ms."""
    cost = CostModel.from_profile(profile)
    scenario = Scenario(cost, (SloClass(1.0, Slo(1.0, 0.025)),))
    return Study("roofline", scenario, layout, arrivals, _CAPS, _RATES, {})


def measured_study(
    profile: Mapping[str, Any],
    layout: Layout,
    arrivals: list[Arrival],
    folder: Path,
    progress: Progress,
) -> Study:
    """What suits the profile: 10 times the median prompt's prefill as TTFT, 2.5 times a lone
    sequence's step as TPOT, lengths and chunks as measured, rates around the baseline's knee.
    """
    cost, arrivals = CostModel.from_profile(profile), arrivals[:_NUM_MEASURED]
    samples = profile.get("samples", {}).get("prefill", [])
    chunk = max((tokens for tokens, *_ in samples), default=4096)
    notes = {}
    if samples:
        longest = max(tokens + computed for tokens, computed, _ in samples)
        arrivals = fit_lengths(arrivals, longest - longest // 4, longest // 4)
        notes["Lengths"] = f"shrunk to the {longest} tokens that the profile was measured with"
    prompt = round(statistics.median(each.num_prompt for each in arrivals))
    output = round(statistics.median(each.num_output for each in arrivals))
    slo = Slo(
        _digits(10 * cost.prompt_s(prompt, 0, chunk), 2),
        _digits(2.5 * cost.decode_s([prompt + output]), 2),
    )
    notes["SLO"] = (
        f"TTFT {slo.ttft:g} s, 10 times the prefill of the median prompt ({prompt} tokens); "
        f"TPOT {1000 * slo.tpot:g} ms, 2.5 times the step of one sequence"
    )
    caps = cost.decode.buckets[-len(_CAPS) :] or _CAPS
    scenario = Scenario(cost, (SloClass(1.0, slo),), chunk=chunk)
    knee = _knee(scenario, layout, caps[-1], arrivals, folder, progress)
    rates = tuple(_digits(share * knee, 3) for share in _KNEES)
    notes["Rates"] = f"0.7 to 1.8 times {knee:.3g}/s, where the baseline still holds {HELD:g} %"
    return Study("measured", scenario, layout, arrivals, caps, rates, notes)


def _knee(
    scenario: Scenario,
    layout: Layout,
    cap: int,
    arrivals: list[Arrival],
    folder: Path,
    progress: Progress,
) -> float:
    """The highest rate at which the baseline holds, by bisection."""
    arrivals = arrivals[:_NUM_KNEE]
    basis = simulation_basis(scenario, arrivals)
    run = simulate_cells(scenario, arrivals, workers=1)

    def holds(rate: float) -> bool:
        cell = Cell(layout, BASELINE, cap, math.inf, rate, basis)
        (result,) = run_cells([cell], folder, run)
        return result.summary["e2e_attainment"] >= HELD

    progress("find the baseline's knee", 0, 1)
    low = high = guess(scenario_of(scenario, Cell(layout, BASELINE, cap, math.inf, 1.0)), arrivals)
    while holds(high):
        low, high = high, 1.3 * high
    while not holds(low):
        low, high = low / 1.3, low
    while high - low > _RESOLUTION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    progress("find the baseline's knee", 1, 1)
    return low


def _digits(value: float, count: int) -> float:
    return float(f"{value:.{count}g}")


def run_study(
    study: Study,
    profile: Mapping[str, Any],
    source: str,
    folder: Path,
    progress: Progress,
    workers: int | None = None,
) -> dict[str, Any]:
    """Runs what is missing and writes the study's report. Returns its part of paper.json."""
    from kairos_jax.lab.report import sweep

    run = simulate_cells(study.scenario, study.arrivals, workers)
    show = partial(progress, f"simulate cells, {study.name}")
    results: list[Result] = run_cells(study.cells, folder / "cells", run, show)
    facts = {
        "SLO": slo_text(study.scenario.classes),
        "Step times": f"{profile.get('name', study.name)} ({profile.get('source', 'unknown')})",
        "Instances": ", ".join(dict.fromkeys(str(each.layout) for each in study.cells)),
        "Workload": workload_text(study.arrivals, source),
        "Baseline": f"caps {', '.join(map(str, study.caps))}, with and without packing of prompts",
        **study.notes,
    }
    own = folder / study.name
    own.mkdir(parents=True, exist_ok=True)
    write_table(own, results)
    title = f"The paper's four claims, {study.name}"
    sweep.write_report(own / "report.html", results, title, facts)
    comparisons = compare(results)
    tables = markdown(comparisons, len({each.cell.layout for each in results}) > 1)
    said = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return {
        "name": study.name,
        "facts": facts,
        "comparisons": [each.as_json() for each in comparisons],
        "markdown": f"## {title}\n\n{answer(results)}\n\n{said}\n\n{tables}",
    }


def _studies(
    values: Any, arrivals: list[Arrival], layout: Layout, folder: Path, progress: Progress
) -> Iterator[tuple[Study, dict[str, Any]]]:
    """Each study with its profile, made when it is its turn. Raises UsageError."""
    measured = profile_file.read(values.profile) if values.profile else None
    roofline = profile_file.read(ROOFLINE)
    yield roofline_study(roofline, layout, arrivals), roofline
    if measured:
        try:
            study = measured_study(measured, layout, arrivals, folder / "cells", progress)
        except ValueError as error:
            raise UsageError(f"profile {values.profile}: {error}") from error
        yield study, measured


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    early.interrupt_on_signals()
    values = flags.FLAGS
    folder = folder_to_write("output", values.output)
    folder_to_write("output", folder / "cells")
    arrivals = _arrivals(values)
    try:
        layout = Layout.parse(values.layout)
    except ValueError as error:
        raise UsageError(f"--layout: {error}") from error
    try:
        with bars() as progress:
            parts = [
                run_study(study, profile, values.trace, folder, progress, values.workers or None)
                for study, profile in _studies(values, arrivals, layout, folder, progress)
            ]
    except KeyboardInterrupt:
        print(f"stopped: what has ended is kept in {folder}", file=sys.stderr)
        return 130
    text = "\n".join(part.pop("markdown") for part in parts)
    (folder / "paper.md").write_text(text)
    (folder / "paper.json").write_text(json.dumps(parts, indent=1, allow_nan=False) + "\n")
    print(text)
    for part in parts:
        print(f"Report: {folder / part['name'] / 'report.html'}")
    return 0


def _arrivals(values: Any) -> list[Arrival]:
    trace = values.trace
    if trace is None:
        raise UsageError("--trace is missing: an Azure LLM CSV or a Mooncake JSONL")
    if trace != "synthetic" and not Path(trace).exists():
        raise UsageError(
            f"there is no trace {trace}: get AzureLLMInferenceTrace_conv.csv of the Azure public "
            "dataset, or give another Azure CSV or Mooncake JSONL (make paper TRACE=FILE)"
        )
    arrivals = workload(trace, 0, values.seed)
    return arrivals[: values.num_requests or None]


def define_flags(values: flags.FlagValues) -> None:
    """Not at import: other binaries have flags of the same names."""
    integer, string = (
        partial(define, flag_values=values)
        for define in (
            flags.DEFINE_integer,
            flags.DEFINE_string,
        )
    )
    string("trace", None, "File of an Azure or Mooncake trace, or 'synthetic'.")
    string("profile", None, "A measured profile to look at as well.")
    string("layout", "2:1", "Instances: P:D, P:Dfluid, colocated or Nxcolocated.")
    integer("num_requests", 6000, "The first of the trace; 0: all.", 0)
    integer("seed", 0, "Seed of a synthetic trace.", 0)
    integer("workers", 0, "Processes; 0: one for each core.", 0)
    string("output", "out/paper", "Folder for cells, tables and reports.")


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    command.run(main)
