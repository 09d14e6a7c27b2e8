"""The simulated counterpart of what a config serves: its layout, attainments, and the rate that it
holds.
"""

from collections.abc import Sequence
from dataclasses import replace

from kairos_jax.config import ServerConfig
from kairos_jax.lab.cells import Layout
from kairos_jax.lab.flags import slo_text
from kairos_jax.process.command import UsageError
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role
from schedulers.simulation.attainment import Outcome, summarize
from schedulers.simulation.scenario import Scenario, build
from schedulers.simulation.workload import Arrival, SloClass, rescale

KINDS: tuple[str, ...] = ("ttft", "tpot", "e2e")
KNEE_PERCENT = 90.0
_KNEE_PRECISION = 0.01


def scenario_of(config: ServerConfig, cost: CostModel) -> Scenario:
    """What the config describes, to be simulated."""
    first, second, colocated = config.prefill, config.decode, config.colocated
    return Scenario(
        cost,
        (SloClass(1.0, config.default_slo),),
        num_prefill=0 if colocated else first.instances,
        num_decode=0 if colocated else second.instances,
        colocated=first.instances if colocated else 0,
        fluid=config.fluid,
        prefill_policy=first.policy,
        decode_policy=second.policy,
        pack=first.pack,
        limits={role: config.limits(role) for role in Role},
    )


def layout_of(config: ServerConfig) -> Layout:
    """Of the server that the config describes."""
    if config.colocated:
        return Layout(colocated=config.prefill.instances)
    return Layout(config.prefill.instances, config.decode.instances, fluid=config.fluid)


def devices_text(config: ServerConfig) -> str:
    """Such as "1 per prefill and 4 per decode instance"."""
    first, second = config.prefill.devices, config.decode.devices
    if config.colocated or first == second:
        return f"{first} per instance"
    return f"{first} per prefill and {second} per decode instance"


def drifted_by(scenario: Scenario, ratio: float) -> Scenario:
    """Every step takes `ratio` times as long; the policies believe what they did."""
    return replace(scenario, cost=scenario.cost.scaled(ratio), bias=1 / ratio - 1)


def simulated(scenario: Scenario, arrivals: Sequence[Arrival]) -> dict[str, float]:
    """The attainments of a run, percent, by KINDS."""
    return attained(build(scenario, arrivals).run())


def attained(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Attainments, percent, by KINDS."""
    summary = summarize(outcomes)
    return {kind: summary[f"{kind}_attainment"] for kind in KINDS}


def find_knee(scenario: Scenario, arrivals: Sequence[Arrival]) -> float:
    """The highest rate, in requests a second, at which KNEE_PERCENT attain both SLOs.

    Raises UsageError if there is none.
    """
    scenario = replace(scenario, prefill_policy="kairos_plus", decode_policy="kairos_plus")

    def holds(rate: float) -> bool:
        return simulated(scenario, rescale(arrivals, rate))["e2e"] >= KNEE_PERCENT

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
