"""The cells of a sweep: what determines each, where its result is kept, and how they are run."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import schedulers
from kairos_jax.lab.curves import Timeline, cdf
from kairos_jax.lab.pool import pool
from kairos_jax.process.command import UsageError
from schedulers.policies import decode, prefill
from schedulers.simulation.attainment import Outcome, summarize
from schedulers.simulation.scenario import Scenario, build
from schedulers.simulation.workload import Arrival, rescale

_FORMAT = 1  # of a cell's file: another number, and none is taken for a result


@dataclass(frozen=True, slots=True)
class Layout:
    """Instances of a server: some for prefill and some for decode, or colocated ones. fluid: roles
    flow, and the numbers say where instances begin.
    """

    num_prefill: int = 0
    num_decode: int = 0
    colocated: int = 0
    fluid: bool = False

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """From "P:D", "P:Dfluid", "colocated" or "Nxcolocated", or as it is written. Raises
        ValueError.
        """
        for form in (
            r"([1-9]\d*) prefill \+ ([1-9]\d*) decode( \(fluid\))?",
            r"([1-9]\d*):([1-9]\d*)(fluid)?",
        ):
            if written := re.fullmatch(form, text):
                return cls(int(written[1]), int(written[2]), fluid=bool(written[3]))
        if written := re.fullmatch(r"([1-9]\d*) colocated", text):
            return cls(colocated=int(written[1]))
        if written := re.fullmatch(r"(?:([1-9]\d*)x)?colocated", text):
            return cls(colocated=int(written[1] or 1))
        raise ValueError(f"a layout must be P:D, P:Dfluid, colocated or Nxcolocated, got {text!r}")

    @property
    def instances(self) -> int:
        """Their number."""
        return self.num_prefill + self.num_decode + self.colocated

    @property
    def fixed(self) -> "Layout":
        """The same instances, whose roles do not flow."""
        return replace(self, fluid=False)

    def __str__(self) -> str:
        """Such as "2 prefill + 1 decode": its name in all that is written, as of `Scenario`."""
        if self.colocated:
            return f"{self.colocated} colocated"
        fluid = " (fluid)" if self.fluid else ""
        return f"{self.num_prefill} prefill + {self.num_decode} decode{fluid}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep.

    rate: requests a second. max_batch: sequences of a decode step, at most. pack: base costs of a
    prefill step that other prompts may add to it. basis: a digest of all that determines the result
    beside these.
    """

    layout: Layout
    policies: tuple[str, str]
    max_batch: int
    pack: float
    rate: float
    basis: str = ""

    @property
    def name(self) -> str:
        """The same wherever everything that determines the result is."""
        return digest(_FORMAT, self)


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a cell. summary: of `summarize`; ttft_s, tpot_s: pairs of values (s) and percent
    of requests; timeline: the columns of `Timeline`.
    """

    cell: Cell
    summary: dict[str, Any]
    ttft_s: tuple[list[float], list[float]]
    tpot_s: tuple[list[float], list[float]]
    timeline: dict[str, list[Any]]


Results = Generator[Result, None, None]


def grid(
    layouts: Sequence[Layout],
    policies: Sequence[tuple[str, str]],
    max_batches: Sequence[int],
    packs: Sequence[float],
    rates: Sequence[float],
) -> list[Cell]:
    """Every combination, as yet without a basis."""
    return [
        Cell(*values) for values in itertools.product(layouts, policies, max_batches, packs, rates)
    ]


def on_basis(cells: Sequence[Cell], basis: str) -> list[Cell]:
    return [replace(cell, basis=basis) for cell in cells]


def parse_policies(text: str) -> tuple[str, str]:
    """From "PREFILL+DECODE". Raises ValueError."""
    first, plus, second = text.partition("+")
    if not plus:
        raise ValueError(f"must be PREFILL+DECODE, got {text!r}")
    for role, name, known in (
        ("prefill", first, prefill.POLICIES),
        ("decode", second, decode.POLICIES),
    ):
        if name not in known:
            raise ValueError(f"the {role} policy must be one of {', '.join(known)}, got {name!r}")
    return first, second


def digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def workload_digest(arrivals: Sequence[Arrival]) -> str:
    table = np.array([(each.at, each.num_prompt, each.num_output) for each in arrivals])
    return hashlib.sha256(table.tobytes()).hexdigest()


def sources_digest(*folders: str | Path) -> str:
    """Of all Python files there: another policy makes another result."""
    paths = sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
    return digest(*(path.read_bytes() for path in paths))


def simulation_basis(scenario: Scenario, arrivals: Sequence[Arrival]) -> str:
    """`Cell.basis` of cells that differ from this scenario in nothing but what a cell says."""
    code = sources_digest(*schedulers.__path__)
    return digest("simulated", scenario, workload_digest(arrivals), code)


def simulate_cell(scenario: Scenario, arrivals: Sequence[Arrival], cell: Cell) -> Result:
    """Simulates a cell of the scenario. Raises UsageError if a request is too long for it."""
    scenario = scenario_of(scenario, cell)
    try:
        simulation = build(scenario, rescale(arrivals, cell.rate))
    except ValueError as error:
        raise UsageError(str(error)) from error
    pairs = (*simulation.fleet.prefill, *simulation.fleet.decode)
    timeline = Timeline([instance for instance, _ in pairs])
    return result(cell, simulation.run(), timeline.columns())


def scenario_of(scenario: Scenario, cell: Cell) -> Scenario:
    """The scenario with what the cell says. Raises ValueError."""
    first, second = cell.policies
    return replace(
        scenario,
        **asdict(cell.layout),
        prefill_policy=first,
        decode_policy=second,
        max_batch=cell.max_batch,
        pack=cell.pack,
    )


def result(cell: Cell, outcomes: Sequence[Outcome], timeline: dict[str, list[Any]]) -> Result:
    ttft_s, tpot_s = (_rounded(cdf(outcomes, name)) for name in ("ttft_s", "tpot_s"))
    return Result(cell, summarize(outcomes), ttft_s, tpot_s, timeline)


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    run: Callable[[Sequence[Cell]], Results],
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Result]:
    """The results of all cells, in their order.

    Args:
        folder: each result is kept there as soon as there is one; what is there is not run again.
        run: gives the results of some cells, in any order.
        progress: called with the cells done, and their number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {cell: kept for cell in cells if (kept := _load(folder, cell))}
    progress(len(found), len(cells))
    with contextlib.closing(run([cell for cell in cells if cell not in found])) as results:
        for each in results:
            _keep(folder, each)
            found[each.cell] = each
            progress(len(found), len(cells))
    return [found[cell] for cell in cells]


def in_processes(
    run: Callable[[Cell], Result], cells: Sequence[Cell], workers: int | None = None
) -> Results:
    """Runs cells in processes, one for each core; when it is closed, they end at once."""
    if not cells:
        return
    with pool(min(workers or os.cpu_count() or 1, len(cells))) as executor:
        # High rates take longest: begun first, they leave no core idle at the end.
        order = sorted(cells, key=lambda cell: -cell.rate)
        for future in as_completed([executor.submit(run, cell) for cell in order]):
            yield future.result()


def in_turn(run: Callable[[Cell], Result], cells: Sequence[Cell]) -> Results:
    """Runs cells in this process."""
    yield from map(run, cells)


def simulate_cells(
    scenario: Scenario, arrivals: Sequence[Arrival], workers: int | None = None
) -> Callable[[Sequence[Cell]], Results]:
    """What `run_cells` runs cells of this scenario with."""
    run = partial(simulate_cell, scenario, arrivals)
    return partial(in_turn, run) if workers == 1 else partial(in_processes, run, workers=workers)


def _path(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.name}.json"


def _keep(folder: Path, kept: Result) -> None:
    """Writes it whole or not at all. What the cell is stands there for a person alone."""
    said = asdict(kept.cell) | {"layout": str(kept.cell.layout), "pack": str(kept.cell.pack)}
    path = _path(folder, kept.cell)
    partial_path = path.with_suffix(f".{os.getpid()}.partial")
    partial_path.write_text(json.dumps(asdict(kept) | {"cell": said}, allow_nan=False) + "\n")
    partial_path.replace(path)


def _load(folder: Path, cell: Cell) -> Result | None:
    try:
        values = json.loads(_path(folder, cell).read_text())
        return Result(**values | {"cell": cell})
    except (OSError, ValueError, TypeError):
        return None  # there is none, or what is there is none


def _rounded(curve: tuple[np.ndarray, np.ndarray]) -> tuple[list[float], list[float]]:
    """Six digits are finer than any plot."""
    values, percent = ([float(f"{v:.6g}") for v in each if math.isfinite(v)] for each in curve)
    return values, percent
