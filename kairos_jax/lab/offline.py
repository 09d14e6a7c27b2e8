"""Serves the cells of a sweep on live engines: in this process, open loop, in real time, and
without a network or a server.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import models
import schedulers
from kairos_jax.config import ServerConfig
from kairos_jax.engine import engine, profile_file, profiling
from kairos_jax.engine.build import build_engines
from kairos_jax.engine.devices import start_jax
from kairos_jax.engine.model import Model, open_model
from kairos_jax.kv import transport
from kairos_jax.lab import open_loop
from kairos_jax.lab.cells import (
    Cell,
    Layout,
    Result,
    Results,
    digest,
    result,
    sources_digest,
    workload_digest,
)
from kairos_jax.lab.curves import Timeline
from kairos_jax.lab.replay import fit_to_model
from kairos_jax.process.progress import Progress
from kairos_jax.routing import peer, router
from kairos_jax.rpc import kairos_pb2 as pb
from kairos_jax.worker import messages, worker
from schedulers.cost import CostModel
from schedulers.ledger.instance import Instance, Role
from schedulers.simulation.workload import Arrival, SloClass, assign_classes, rescale


@dataclass(frozen=True, slots=True)
class Setting:
    """What all cells of a live sweep share. config: with the largest batch cap of all."""

    config: ServerConfig
    arrivals: Sequence[Arrival]
    classes: tuple[SloClass, ...]
    seed: int
    profile: Path | None = None

    def fitted(self, max_batch: int, max_prompt: int | None, max_output: int | None) -> "Setting":
        """With a config for so large a batch, and lengths that its limits take."""
        config = self.config
        limits = pb.Model(max_context=config.max_context, max_tokens=config.max_tokens)
        return replace(
            self,
            config=replace(config, decode=replace(config.decode, max_batch=max_batch)),
            arrivals=fit_to_model(self.arrivals, limits, max_prompt, max_output),
        )

    def basis(self, device: str) -> str:
        """`Cell.basis`, on this kind of device."""
        folders = [Path(module.__path__[0]) for module in (models, schedulers)]
        served = [
            Path(str(m.__file__))
            for m in (engine, messages, open_loop, peer, profiling, router, transport, worker)
        ]
        given = profile_file.read(self.profile) if self.profile else None
        code = sources_digest(*folders), *(path.read_bytes() for path in served)
        # The cell says which policies there are, and how many instances.
        config = _configured(
            self.config, Cell(Layout(1, 1), ("", ""), self.config.decode.max_batch, 0.0, 0.0)
        )
        work = workload_digest(self.arrivals), self.classes, self.seed
        return digest("live", config, work, device, given, code)


def devices_for(config: ServerConfig, layouts: Collection[Layout], cpu_devices: int) -> list[Any]:
    """Starts JAX with devices for the largest of the layouts. Raises UsageError."""
    needed = max(_laid_out(config, layout).num_devices for layout in layouts)
    return start_jax(needed, cpu_devices)


def run_live(
    setting: Setting, devices: Sequence[Any], progress: Progress, cells: Sequence[Cell]
) -> Results:
    """Serves cells one by one; engines are built once for each layout.

    Raises:
        UsageError, ModelNotAvailable: it cannot be served so. open_loop.InstanceDied: it broke.
    """
    for layout, group in itertools.groupby(cells, lambda cell: cell.layout):
        fleet = _Fleet.build(setting, layout, devices, progress)
        for cell in group:
            yield _serve(setting, fleet, cell, progress)
        del fleet  # or the next one's weights and pools would be there beside these


@dataclass(frozen=True, slots=True)
class _Fleet:
    model: Model
    engines: Sequence[engine.JaxEngine]
    cost: CostModel

    @classmethod
    def build(
        cls, setting: Setting, layout: Layout, devices: Sequence[Any], progress: Progress
    ) -> "_Fleet":
        config = _laid_out(setting.config, layout)
        model = open_model(config)
        engines = build_engines(config, model, devices[: config.num_devices], progress)
        measured = profiling.load_or_measure(setting.profile, config, model, engines, progress)
        return cls(model, engines, CostModel.from_profile(measured))


def _serve(setting: Setting, fleet: _Fleet, cell: Cell, progress: Progress) -> Result:
    timelines = []

    def prepare(instances: Sequence[Instance]) -> None:
        for instance in instances:
            if instance.role is not Role.PREFILL:
                # The engine was compiled for the largest cap of the sweep.
                instance.limits = replace(instance.limits, max_batch=cell.max_batch)
        timelines.append(Timeline(instances))

    config, vocab_size = _configured(setting.config, cell), fleet.model.checkpoint.config.vocab_size
    live = open_loop.Live(config, fleet.engines, fleet.cost, vocab_size, prepare)
    arrivals = rescale(setting.arrivals, cell.rate)
    which = assign_classes(len(arrivals), setting.classes, setting.seed)
    slos = [setting.classes[index].slo for index in which.tolist()]
    outcomes, start = open_loop.serve(live, arrivals, slos, setting.seed, progress)
    (timeline,) = timelines
    return result(cell, outcomes, timeline.columns(start))


def _laid_out(config: ServerConfig, layout: Layout) -> ServerConfig:
    colocated = bool(layout.colocated)
    return replace(
        config,
        colocated=colocated,
        fluid=layout.fluid,
        prefill=replace(config.prefill, instances=layout.colocated or layout.num_prefill),
        decode=replace(config.decode, instances=layout.num_decode or 1),
    )


def _configured(config: ServerConfig, cell: Cell) -> ServerConfig:
    first, second = cell.policies
    config = _laid_out(config, cell.layout)
    return replace(
        config,
        prefill=replace(config.prefill, policy=first, pack=cell.pack),
        decode=replace(config.decode, policy=second, max_batch=cell.max_batch),
    )
