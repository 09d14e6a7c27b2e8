"""What a live fleet does while the load shifts: roles that flow beside fixed layouts of as many.

  python benchmarks/shifting.py [--layouts=2:1fluid,2:1,1:2] [--phase_s=20] [--output=json]
  python benchmarks/shifting.py --model=default --phase_s=60

A router and its workers are processes of this host, on loopback. The load has three phases of equal
length: prompts take most of the time in the first and the third, answers in the second. Its rates
follow from step times that are measured first: in each phase, the job with the most to do needs
--pressure of two instances' time. All layouts get the same greedy requests at the same times.

For each layout: the percent of requests that keep both SLOs, in all and by phase of their arrival;
requests that failed; tokens that are others than in the first layout; decisions of the workers, and
how many come out otherwise when they are replayed from the journals. Then, for each instance and
phase: the steps with prompts and with answers, and the tokens of both. Where roles flow, also the
timelines of a request that stayed where its prompt was computed, and of one that was handed over.

Every process ends with this one.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import figures
import journals
import processes
from absl import app, flags

from kairos_jax.engine import profile_file
from kairos_jax.lab.cells import Layout
from kairos_jax.lab.flags import parse_list
from kairos_jax.lab.replay import Record, replay
from schedulers.cost import CostModel
from schedulers.ledger.request import Slo
from schedulers.policies.colocated import policies_of
from schedulers.simulation.attainment import summarize
from schedulers.simulation.workload import Arrival, synthetic

_MODEL = flags.DEFINE_enum("model", "tiny", ["tiny", "default"], "A random one, or SmolLM2-135M.")
_LAYOUTS = flags.DEFINE_string("layouts", "2:1fluid,2:1,1:2", "P:D or P:Dfluid, as `kairos sweep`.")
_PHASE_S = flags.DEFINE_float("phase_s", 20.0, "Seconds of each of the three phases.", 0.1)
_PRESSURE = flags.DEFINE_float("pressure", 0.6, "Load of two instances, as predicted.", 0.0)
_PROFILE = flags.DEFINE_string("profile", None, "Step times; default: they are measured first.")
_JOURNALS = flags.DEFINE_string("journals", None, "Folder in which the journals are kept.")
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "How to print the result.")

PHASES = ("prompts", "answers", "prompts again")
# SLOs, in multiples of what a prompt takes alone, and of a decode step that is full.
_TTFT, _TPOT = 10.0, 2.0
_START_S, _END_S = 300.0, 60.0
_ENV = {"JAX_PLATFORMS": "cpu"}


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """A model and what serves it. long, short: tokens of the prompts or answers that a phase is
    about, and of the others. kv_tokens, max_batch: of an instance that decodes.
    """

    config: str
    model: str
    max_chunk: int
    max_context: int
    kv_tokens: int
    max_batch: int
    long: int
    short: int

    @property
    def arguments(self) -> list[str]:
        """Flags of all processes. Those that only prefill have as much KV as the others."""
        return [
            f"--config.max_context={self.max_context}",
            f"--config.max_tokens={self.max_context - 1}",
            "--config.max_requests=4096",
            f"--config.prefill.max_chunk={self.max_chunk}",
            f"--config.prefill.kv_tokens={self.kv_tokens}",
            f"--config.prefill.parked_tokens={4 * self.kv_tokens}",
            f"--config.decode.kv_tokens={self.kv_tokens}",
            f"--config.decode.max_batch={self.max_batch}",
        ]


SETUPS = {
    "tiny": Setup(processes.CONFIG, processes.MODEL, 64, 1024, 4096, 16, 400, 24),
    "default": Setup("smollm2_135m_cpu", "smollm2-135m-instruct", 256, 2048, 16384, 32, 512, 32),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """arrivals: of all phases. rates: requests per second of each."""

    arrivals: list[Arrival]
    rates: tuple[float, ...]
    slo: Slo


def load_of(setup: Setup, cost: CostModel, phase_s: float, pressure: float) -> Load:
    """The load whose busy job needs `pressure` of two instances in each phase, as predicted."""
    prompt_s = float(cost.prompt_s(setup.long, 0, setup.max_chunk))
    held = setup.short + setup.long
    batch = min(setup.max_batch, setup.kv_tokens // held)
    step_s = cost.decode_s([setup.short + setup.long // 2] * batch)
    prompts = 2 * pressure / prompt_s
    answers = 2 * pressure * batch / (setup.long * step_s)
    arrivals: list[Arrival] = []
    rates = prompts, answers, prompts
    for phase, rate in enumerate(rates):
        lengths = (setup.short, setup.long) if phase == 1 else (setup.long, setup.short)
        count = max(round(rate * phase_s), 1)
        for each in synthetic(
            count,
            rate,
            phase,
            prompt_median=lengths[0],
            prompt_sigma=0.3,
            max_prompt=setup.max_context // 2,
            output_median=lengths[1],
            output_sigma=0.3,
            max_output=setup.max_context // 2,
        ):
            at = phase * phase_s + each.at
            arrivals.append(dataclasses.replace(each, at=at))
    arrivals.sort(key=lambda each: each.at)
    return Load(arrivals, rates, Slo(_TTFT * prompt_s, _TPOT * step_s))


def measure(setup: Setup, path: Path) -> None:
    """Writes the step times of an instance that does both jobs. All layouts are scheduled by it."""
    command = [sys.executable, "-m", "kairos_jax.profile", f"--output={path}"]
    of_config = (f"--config={setup.config}", f"--model={setup.model}", "--config.fluid=true")
    done = subprocess.run(
        [*command, *of_config, *setup.arguments],
        cwd=processes.ROOT,
        env=os.environ | _ENV,
        capture_output=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.decode())


@contextlib.contextmanager
def fleet(setup: Setup, layout: Layout, profile: Path, folder: Path) -> Iterator[processes.Process]:
    """The router of a fleet that ends with the block; then all journals are whole, in `folder`."""
    started: list[processes.Process] = []

    def start(binary: str, *arguments: str) -> processes.Process:
        flows = f"--config.fluid={layout.fluid}"
        process = processes.Process(
            *(binary, "--end_with_stdin", flows, *setup.arguments, *arguments),
            env=os.environ | _ENV,
            config=setup.config,
            model=setup.model,
        )
        started.append(process)
        return process

    def worker(role: str, index: int) -> processes.Process:
        name = f"{role}-{index}"
        file = folder / f"{name}.jsonl"
        return start(role, f"--name={name}", f"--profile={profile}", f"--journal={file}")

    try:
        workers = {}
        for role, count in (("prefill", layout.num_prefill), ("decode", layout.num_decode)):
            # The first fills the cache of compiled steps for the others.
            workers[role] = [worker(role, index).ready(_START_S) for index in range(count)]
        targets = [f"--{role}={','.join(e.address for e in of)}" for role, of in workers.items()]
        yield start("router", *targets).ready(_START_S)
        for process in reversed(started):
            process.send(signal.SIGTERM)
            process.wait(_END_S)
    finally:
        for process in started:
            process.end()


def serve(address: str, load: Load) -> tuple[list[Record], float]:
    """Sends the load. Returns its records, and when it began on the clock of this host."""
    begun: list[float] = []
    records = asyncio.run(
        replay(address, load.arrivals, load.slo, on_ended=lambda _: begun.append(time.monotonic()))
    )
    return records, begun[0]


def attainment(records: Sequence[Record], phase_s: float) -> dict[str, Any]:
    """Of all requests, and of those that arrived in each phase."""
    outcomes = [record.outcome for record in records]
    phase_of = [min(int(each.arrival / phase_s), len(PHASES) - 1) for each in outcomes]
    by_phase = {
        name: summarize([o for o, at in zip(outcomes, phase_of, strict=True) if at == index])
        for index, name in enumerate(PHASES)
    }
    whole = summarize(outcomes)
    names = ("e2e_attainment", "ttft_attainment", "tpot_attainment", "num_failed")
    kept = {name: whole[name] for name in (*names, "decode_tokens_per_s", "latency_max_s")}
    return kept | {"e2e_by_phase": {name: of["e2e_attainment"] for name, of in by_phase.items()}}


def num_differing(records: Sequence[Record], expected: Sequence[Record]) -> int:
    """Tokens that are missing, too many, or others than expected."""
    return sum(
        one != other
        for record, first in zip(records, expected, strict=True)
        for one, other in itertools.zip_longest(record.token_ids, first.token_ids)
    )


def num_missing(records: Sequence[Record]) -> int:
    """Tokens that requests asked for and did not get."""
    return sum(each.outcome.num_asked - len(each.token_ids) for each in records)


def run(layout: Layout, setup: Setup, load: Load, profile: Path, folder: Path) -> dict[str, Any]:
    """What came of one layout. Its records are under "records"."""
    phase_s = _PHASE_S.value
    folder.mkdir(parents=True)
    with fleet(setup, layout, profile, folder) as router:
        records, begun_at = serve(router.address, load)
    journal = journals.read(folder)
    cost = CostModel.from_profile(profile_file.read(profile))
    policies = policies_of(journal, cost, "kairos_plus", "kairos_plus", math.inf)
    work, decisions, differing = journals.account(journal, policies, begun_at, phase_s, len(PHASES))
    return {
        "layout": str(layout),
        **attainment(records, phase_s),
        "tokens_missing": num_missing(records),
        "decisions": decisions,
        "decided_otherwise": differing,
        "work": {id: [dataclasses.asdict(each) for each in of] for id, of in work.items()},
        "timelines": journals.timelines(journal, policies) if layout.fluid else {},
        "records": records,
    }


def told(row: Mapping[str, Any]) -> str:
    """What the instances of one layout did, and the timelines."""
    fields = [each.name.replace("_", " ") for each in dataclasses.fields(journals.Work)]
    did = [
        (id, PHASES[phase], *(str(value) for value in work.values()))
        for id, of in row["work"].items()
        for phase, work in enumerate(of)
    ]
    parts = [f"{row['layout']}\n" + figures.table(("instance", "phase", *fields), did)]
    for name, lines in row["timelines"].items():
        parts.append("\n".join((f"A request that {name}:", *lines)))
    return "\n\n".join(parts)


def compared(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row a layout."""
    counts = ("num_failed", "tokens_missing", "tokens_differing", "decisions", "decided_otherwise")
    head = ("layout", "both", *PHASES, "TTFT", "TPOT", "tokens/s")
    cells = []
    for row in rows:
        kept = [row["e2e_attainment"], *row["e2e_by_phase"].values()]
        kept += [row["ttft_attainment"], row["tpot_attainment"], row["decode_tokens_per_s"]]
        shown = ["-" if value is None else f"{value:.1f}" for value in kept]
        cells.append((row["layout"], *shown, *(str(row[name]) for name in counts)))
    return figures.table((*head, *(name.replace("_", " ") for name in counts)), cells)


def main(argv: list[str]) -> None:
    """Tells of each layout as soon as it has run."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or its processes would go on
    setup, layouts = SETUPS[_MODEL.value], parse_list("layouts", _LAYOUTS.value, Layout.parse)
    where, as_text, rows = figures.where(), _OUTPUT.value == "text", []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(_JOURNALS.value or made).absolute()
        profile = Path(_PROFILE.value or Path(made) / "profile.json").absolute()
        if not _PROFILE.value:
            figures.say("measuring step times")
            measure(setup, profile)
        cost = CostModel.from_profile(profile_file.read(profile))
        load = load_of(setup, cost, _PHASE_S.value, _PRESSURE.value)
        slo, rates = load.slo, " / ".join(f"{rate:.3g}" for rate in load.rates)
        figures.say(
            f"{len(load.arrivals)} requests, {rates} a second; TTFT {slo.ttft:.3g} s, "
            f"TPOT {1e3 * slo.tpot:.3g} ms"
        )
        first: list[Record] = []
        for layout in layouts:
            row = run(layout, setup, load, profile, folder / str(layout).replace(" ", ""))
            records = row.pop("records")
            first = first or records
            rows.append(row | {"tokens_differing": num_differing(records, first)})
            if as_text:
                print(f"{told(row)}\n", flush=True)
    if as_text:
        print(compared(rows))
    else:
        of_load = {"rates": load.rates, "slo": dataclasses.asdict(slo)}
        print(json.dumps({**where, **of_load, "layouts": rows}))


if __name__ == "__main__":
    app.run(main)
