r"""Runs one workload at many loads under many policies, and shows what each achieves.

kairos sweep --simulated --profile=llama3_8b_h100_roofline --trace=synthetic \
    --rates=20,32,40 --layouts=2:1,3xcolocated --ttft=1 --tpot=0.025 --output=out/sweep
kairos sweep --trace=synthetic --rates=2,3 --num_requests=100 --max_prompt=256

With --simulated step times come from a profile; without, the cells are served one after another by
live engines in this process, in real time, with --config or a config for the devices that are here.
The first pair of policies is the baseline. A cell that
has ended is kept in the output folder, and not run again.
"""

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from kairos_jax.engine import profile_file
from kairos_jax.lab.cells import (
    Cell,
    Layout,
    Result,
    grid,
    on_basis,
    parse_policies,
    run_cells,
    scenario_of,
    simulate_cells,
    simulation_basis,
)
from kairos_jax.lab.flags import (
    NUM_SYNTHETIC,
    parse_list,
    slo_text,
    to_number,
    workload,
    workload_text,
)
from kairos_jax.lab.report.table import write_table
from kairos_jax.process import command, early
from kairos_jax.process.command import UsageError
from kairos_jax.process.outputs import folder_to_write
from kairos_jax.process.progress import bars
from schedulers.cost import CostModel
from schedulers.simulation.scenario import Scenario
from schedulers.simulation.workload import Arrival, SloClass, check_slo, parse_classes, poisson

PAIRS = "fcfs+continuous,kairos+kairos,kairos_plus+kairos_plus"


def define_flags(values: flags.FlagValues) -> None:
    """Not at import: other binaries have flags of the same names."""
    alias, boolean, enum, number, integer, string = (
        partial(define, flag_values=values)
        for define in (
            flags.DEFINE_alias,
            flags.DEFINE_boolean,
            flags.DEFINE_enum,
            flags.DEFINE_float,
            flags.DEFINE_integer,
            flags.DEFINE_string,
        )
    )
    boolean("simulated", False, "Simulate instead of serving on live engines.")
    string("profile", None, "Step times: a file, or the name of a packaged profile.")
    string("trace", None, "'synthetic', or the file of an Azure or Mooncake trace.")
    enum("arrivals", "trace", ["trace", "poisson"], "Arrival times.")
    integer("num_requests", 0, f"0: all, {NUM_SYNTHETIC} for synthetic.", 0)
    string("rates", None, "Requests a second: R,R,...")
    string("policies", PAIRS, "PREFILL+DECODE,...; the first is the baseline.")
    string("layouts", None, "Instances: P:D, P:Dfluid, colocated or Nxcolocated, and more.")
    string("max_batches", None, "Sequences of a decode step, at most: N,N,...")
    string("packs", None, "Base costs that prompts may add to a step: 0,inf,...")
    alias("max_batch", "max_batches")
    alias("pack", "packs")
    number("ttft", None, "SLO: seconds to the first token.")
    number("tpot", None, "SLO: seconds per token after the first.")
    string("classes", None, "SHARE:TTFT:TPOT,... instead of one SLO for all.")
    integer("chunk", 4096, "Simulated: prompt tokens of a prefill step, at most.", 1)
    integer("page_size", 16, "Simulated: tokens of a KV page.", 1)
    integer("max_prompt", None, "Live: longest prompt of the workload, tokens.", 1)
    integer("max_output", None, "Live: longest output of the workload, tokens.", 1)
    integer("seed", 0, "Seed of classes, Poisson and synthetic workloads.", 0)
    integer("workers", 0, "Simulated: processes; 0: one for each core.", 0)
    string("output", "out/sweep", "Folder for cells, table and report.")


_SIMULATED_ONLY = ("chunk", "page_size", "workers")
_LIVE_ONLY = ("max_prompt", "max_output")


def _positive(text: str) -> float:
    value = to_number(text)
    if not 0 < value < math.inf:
        raise ValueError(f"must be positive, got {text}")
    return value


def _whole(text: str) -> int:
    value = to_number(text)
    if not value >= 1 or value % 1:
        raise ValueError(f"must be a whole number of at least 1, got {text}")
    return int(value)


def _pack(text: str) -> float:
    value = to_number(text)
    if not value >= 0:
        raise ValueError(f"must be at least 0, got {text}")
    return value


def report(folder: Path, results: Sequence[Result], title: str, facts: dict[str, str]) -> None:
    """Writes the table and the page, and prints the essence."""
    from kairos_jax.lab.answer import answer
    from kairos_jax.lab.report import sweep
    from kairos_jax.lab.report.comparison import print_table

    written = write_table(folder, results)
    page = folder / "report.html"
    sweep.write_report(page, results, title, facts)
    console = Console()
    console.print(answer(results), highlight=False)
    for heading, lines in sweep.essence(results):
        console.rule(f"[bold]{heading}", align="left")
        print_table(lines, console)
    print("", *(f"Table: {path}" for path in written), f"Report: {page}", sep="\n")


def _given(values: Any, name: str) -> Any:
    value = values[name].value
    if value is None:
        raise UsageError(f"--{name} is missing")
    return value


def _refuse(values: Any, names: Sequence[str], words: str) -> None:
    """A flag that would do nothing is an error."""
    for name in names:
        if values[name].present:
            raise UsageError(f"--{name} {words}")


def _classes(values: Any, ttft: float | None, tpot: float | None) -> tuple[SloClass, ...]:
    """ttft, tpot: what holds where nothing is said."""
    try:
        if values.classes is not None:
            return parse_classes(values.classes)
        ttft = ttft if values.ttft is None else values.ttft
        tpot = tpot if values.tpot is None else values.tpot
        if ttft is None or tpot is None:
            raise UsageError(f"--{'ttft' if ttft is None else 'tpot'} is missing")
        return (SloClass(1.0, check_slo(ttft, tpot)),)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _workload(values: Any) -> list[Arrival]:
    arrivals = workload(_given(values, "trace"), values.num_requests, values.seed)
    if values.arrivals == "poisson":
        # Each cell rescales them to its rate.
        return poisson(arrivals, 1.0, values.seed)
    return arrivals


def _grid(values: Any, layouts: str, max_batches: str, packs: str) -> list[Cell]:
    """All cells, as yet without a basis; with defaults for what is not said."""
    return grid(
        parse_list("layouts", values.layouts or layouts, Layout.parse),
        parse_list("policies", values.policies, parse_policies),
        parse_list("max_batches", values.max_batches or max_batches, _whole),
        parse_list("packs", values.packs or packs, _pack),
        parse_list("rates", _given(values, "rates"), _positive),
    )


def simulated(values: Any) -> tuple[list[Result], dict[str, str]]:
    """All results, and what the reader must know. Raises UsageError."""
    _refuse(values, _LIVE_ONLY, "does not go with --simulated")
    profile = profile_file.read(_given(values, "profile"))
    cells = _grid(values, "1:1", "256", "0")
    arrivals, classes = _workload(values), _classes(values, None, None)
    try:
        scenario = Scenario(
            CostModel.from_profile(profile),
            classes,
            chunk=values.chunk,
            page_size=values.page_size,
            seed=values.seed,
        )
        for cell in cells:
            scenario_of(scenario, cell)
    except ValueError as error:
        raise UsageError(str(error)) from error
    cells = on_basis(cells, simulation_basis(scenario, arrivals))
    run = simulate_cells(scenario, arrivals, values.workers or None)
    with bars() as progress:
        show = partial(progress, "simulate cells")
        results = run_cells(cells, Path(values.output) / "cells", run, show)
    return results, {
        "SLO": slo_text(classes),
        "Step times": f"{profile.get('name', values.profile)} ({profile.get('source', 'unknown')})",
        "Workload": workload_text(arrivals, values.trace),
        "Run": "simulated",
    }


def live(values: Any) -> tuple[list[Result], dict[str, str]]:
    """All results, and what the reader must know. Raises UsageError."""
    from kairos_jax.lab import offline
    from kairos_jax.lab.simulated import devices_text, layout_of
    from kairos_jax.process import launch

    _refuse(values, _SIMULATED_ONLY, "needs --simulated")
    if not launch.has_config():
        made = Path(values.output) / "config.py"
        made.unlink(missing_ok=True)
        launch.make_config(made)
    config = launch.read_config()
    cells = _grid(
        values, str(layout_of(config)), str(config.decode.max_batch), str(config.prefill.pack)
    )
    classes = _classes(values, config.slo.ttft, config.slo.tpot)
    path = Path(values.profile) if values.profile else None
    setting = offline.Setting(config, _workload(values), classes, values.seed, path)
    setting = setting.fitted(
        max(cell.max_batch for cell in cells), values.max_prompt, values.max_output
    )
    layouts = {cell.layout for cell in cells}
    devices = offline.devices_for(setting.config, layouts, values.cpu_devices)
    cells = on_basis(cells, setting.basis(devices[0].device_kind))
    with bars() as progress:
        run = partial(offline.run_live, setting, devices, progress)
        show = partial(progress, "serve cells")
        results = run_cells(cells, Path(values.output) / "cells", run, show)
    return results, {
        "SLO": slo_text(classes),
        "Model": f"{config.model}, {config.dtype}",
        "Devices": f"{devices[0].device_kind}, {devices_text(config)}",
        "Workload": workload_text(setting.arrivals, values.trace)
        + "; greedy, end of sequence ignored",
        "Run": "live engines, open loop, in one process",
    }


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    early.interrupt_on_signals()
    values = flags.FLAGS
    folder = folder_to_write("output", values.output)
    folder_to_write("output", folder / "cells")
    try:
        results, facts = (simulated if values.simulated else live)(values)
    except KeyboardInterrupt:
        print(f"stopped: what has ended is kept in {folder}", file=sys.stderr)
        return 130
    report(folder, results, "kairos_jax sweep", facts)
    return 0


def _is_simulated(argv: Sequence[str]) -> bool:
    """Read before all other flags: some are there only on live engines, and those need JAX."""
    peek = flags.FlagValues()
    flags.DEFINE_boolean("simulated", False, "", flag_values=peek)
    try:
        peek(argv, known_only=True)
    except flags.Error:
        return True  # which the full parse then tells of
    return bool(peek["simulated"].value)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    if _is_simulated(sys.argv):
        command.run(main)
    else:
        from kairos_jax.process import launch

        launch.define_config_flag()
        launch.run(main)
