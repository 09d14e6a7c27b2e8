"""What a simulated run consists of, and the run: the simulator's command line, sweeps, advice and
tests all put their runs together here.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from schedulers.cost import CostModel
from schedulers.ledger.instance import Instance, Limits, Policy, Role
from schedulers.ledger.request import Request, Seq
from schedulers.policies import decode, flowing, prefill, routing
from schedulers.policies.colocated import policy_for
from schedulers.simulation.attainment import Outcome, summarize
from schedulers.simulation.bound import most_on_time
from schedulers.simulation.simulator import Fleet, Simulation
from schedulers.simulation.workload import Arrival, SloClass, assign_classes

# Streams of random numbers that are drawn from one seed.
_CLASSES, _NOISE = 1, 2


@dataclass(frozen=True, slots=True)
class Scenario:
    """A server and its SLOs.

    cost: what steps and transfers really take, and the KV that each instance holds. classes: SLOs
    of the requests and their shares. colocated: instances that do both jobs, in the place of
    prefill and decode ones. fluid: roles flow; num_prefill and num_decode say where instances
    begin. max_batch: sequences a decode step; chunk: prompt tokens a prefill
    step; pack: base costs of a prefill step that other prompts may add (`policies.prefill`).
    prefix_cache: whether prompts that begin alike (`Arrival.blocks`) share pages.
    parked_tokens: KV that waits outside of each prefill instance's pool, in host memory, at most.
    learn_outputs: whether policies may learn from finished requests how long outputs will be.
    noise: standard deviation of the logarithm of each step's time, whose mean stays. bias: the
    policies take every time for (1 + bias) times what it is. limits: of the instances of each role;
    without them, as the workload needs, max_batch, chunk and page_size say, and the KV allows.
    """

    cost: CostModel
    classes: tuple[SloClass, ...]
    num_prefill: int = 1
    num_decode: int = 1
    colocated: int = 0
    fluid: bool = False
    prefill_policy: str = "kairos_plus"
    decode_policy: str = "kairos_plus"
    max_batch: int = 256
    chunk: int = 4096
    page_size: int = 16
    pack: float = math.inf
    prefix_cache: bool = False
    parked_tokens: float = math.inf
    learn_outputs: bool = True
    noise: float = 0.0
    bias: float = 0.0
    seed: int = 0
    limits: Mapping[Role, Limits] | None = None

    def __post_init__(self):
        for name, policies in (
            ("prefill_policy", prefill.POLICIES),
            ("decode_policy", decode.POLICIES),
        ):
            policy = getattr(self, name)
            if policy not in policies:
                raise ValueError(f"{name} must be one of {', '.join(policies)}, got {policy!r}")
        least = dict.fromkeys(("num_prefill", "num_decode"), 0 if self.colocated else 1)
        least |= {"colocated": 0, "max_batch": 1, "chunk": 1, "page_size": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.fluid and self.colocated:
            raise ValueError("fluid does not go with colocated: it needs instances that decode")
        if not self.parked_tokens >= 1:
            raise ValueError(f"parked_tokens must be at least 1, got {self.parked_tokens}")
        if not self.pack >= 0:
            raise ValueError(f"pack must be at least 0, got {self.pack}")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"noise must be finite and at least 0, got {self.noise}")
        if not (math.isfinite(self.bias) and self.bias > -1):
            raise ValueError(f"bias must be finite and above -1, got {self.bias}")

    @property
    def layout(self) -> str:
        if self.colocated:
            return f"{self.colocated} colocated"
        fluid = " (fluid)" if self.fluid else ""
        return f"{self.num_prefill} prefill + {self.num_decode} decode{fluid}"


def simulate(scenario: Scenario, arrivals: Sequence[Arrival]) -> dict[str, Any]:
    """Runs the workload to its end. Returns what `summarize` does, and `ttft_bound`.

    Raises ValueError if a request is too long for the KV that an instance holds.
    """
    return report(scenario, arrivals, build(scenario, arrivals).run())


def report(
    scenario: Scenario, arrivals: Sequence[Arrival], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """What `simulate` returns, of a run that has ended."""
    return summarize(outcomes) | {"ttft_bound": ttft_bound(scenario, arrivals)}


def build(scenario: Scenario, arrivals: Sequence[Arrival]) -> Simulation:
    """The run, about to begin. Raises as `simulate`. Requests are named "0", "1" and so on."""
    longest_output = max((a.num_output for a in arrivals), default=1)
    limits = scenario.limits or dict.fromkeys(Role, _limits(scenario, arrivals, longest_output))
    max_context = min(each.max_context for each in limits.values())
    page_size = limits[Role.BOTH if scenario.colocated else Role.PREFILL].page_size
    believed = scenario.cost.scaled(1 + scenario.bias)
    classes = _classes_of(scenario, len(arrivals))
    requests = [
        Request(
            str(index),
            arrival.at,
            range(arrival.num_prompt),
            # The same for all, or policies could tell from it how long the output is.
            min(longest_output, max_context - arrival.num_prompt),
            scenario.classes[which].slo,
            serial=index,
            page_keys=arrival.page_keys(page_size) if scenario.prefix_cache else (),
        )
        for index, (arrival, which) in enumerate(zip(arrivals, classes, strict=True))
    ]

    def outlines(
        instances: Sequence[Instance], now: float, without: Collection[str] = ()
    ) -> list[routing.Summary]:
        demotes = scenario.prefill_policy in prefill.DEMOTING
        demotes_late = scenario.decode_policy in decode.DEMOTING
        return [
            routing.outline(instance, believed, now, demotes, demotes_late, scenario.fluid, without)
            for instance in instances
        ]

    def route_prefill(request: Request, instances: Sequence[Instance], now: float) -> int:
        cached = [instance.pool.cached(request) for instance in instances]
        route = flowing.route_prompt if scenario.fluid else routing.route_prefill
        return route(request, outlines(instances, now), believed, now, cached)

    def route_decode(seq: Seq, instances: Sequence[Instance], now: float) -> int:
        slo = seq.request.slo
        return routing.route_decode(seq.length, slo, outlines(instances, now), believed, now)

    def place(
        seq: Seq, instances: Sequence[Instance], home: int, now: float, unplaced: Collection[str]
    ) -> flowing.Placement:
        request, summaries = seq.request, outlines(instances, now, unplaced)
        late = now > request.deadline
        return flowing.place(seq.length, request.slo, late, summaries, home, believed, now)

    def recall(instances: Sequence[Instance], to: int, now: float) -> tuple[int, Sequence[str]]:
        summaries = outlines(instances, now)
        source, ids = routing.recall(summaries, to) or (to, ())
        late = (instances[source].waiting[id].request for id in ids)
        return source, [each.id for each in routing.fitting(late, summaries[to].spare)]

    return Simulation(
        requests,
        [arrival.num_output for arrival in arrivals],
        _fleet(scenario, believed, limits),
        scenario.cost,
        route_prefill,
        route_decode,
        place,
        recall,
        noise=scenario.noise,
        seed=_seed(scenario.seed, _NOISE),
    )


def ttft_bound(scenario: Scenario, arrivals: Sequence[Arrival]) -> float | None:
    """The highest TTFT attainment, in percent, that any policy could reach if it knew all arrivals.

    None where it is not known exactly: several prefill instances or colocated ones, prompts that
    share a step or pages, TTFTs that differ, times that are not known beforehand.
    """
    ttfts = {each.slo.ttft for each in scenario.classes}
    known = not (scenario.colocated or scenario.pack or scenario.noise or scenario.limits)
    known = known and not (scenario.prefix_cache and any(arrival.blocks for arrival in arrivals))
    if not arrivals or not known or scenario.num_prefill != 1 or len(ttfts) != 1:
        return None
    release = [arrival.at for arrival in arrivals]
    seconds = _prompt_s(scenario, np.array([arrival.num_prompt for arrival in arrivals]))
    return 100.0 * most_on_time(release, seconds, ttfts.pop()) / len(arrivals)


def _prompt_s(scenario: Scenario, num_prompt: np.ndarray) -> np.ndarray:
    """Seconds [R] that each prompt takes, chunk by chunk: the last one may be padded."""
    seconds = np.zeros(num_prompt.shape)
    for computed in range(0, int(num_prompt.max()), scenario.chunk):
        count = np.clip(num_prompt - computed, 0, scenario.chunk)
        seconds += np.where(count > 0, scenario.cost.prefill_s(count, computed), 0.0)
    return seconds


def _limits(scenario: Scenario, arrivals: Sequence[Arrival], longest_output: int) -> Limits:
    """Instances take requests as long as the workload's, if their KV does."""
    page_size = scenario.page_size
    num_pages = scenario.cost.kv_capacity_tokens // page_size
    longest_prompt = max((a.num_prompt for a in arrivals), default=1)
    max_context = min(longest_prompt + longest_output, num_pages * page_size)
    for index, arrival in enumerate(arrivals):
        if arrival.num_prompt + arrival.num_output > max_context:
            raise ValueError(
                f"request {index} has {arrival.num_prompt} + {arrival.num_output} tokens, but an "
                f"instance holds the KV of {num_pages * page_size} (the profile's "
                "kv_capacity_tokens, in whole pages)"
            )
    return Limits(
        scenario.max_batch,
        scenario.chunk,
        max_context,
        page_size,
        num_pages,
        max(scenario.parked_tokens, max_context),
    )


def _fleet(scenario: Scenario, cost: CostModel, limits: Mapping[Role, Limits]) -> Fleet:
    """cost: what the policies believe."""

    def instances(begins: Role, count: int) -> list[tuple[Instance, Policy]]:
        role = Role.BOTH if scenario.fluid else begins
        receives = scenario.fluid and begins is Role.DECODE
        policies = scenario.prefill_policy, scenario.decode_policy
        policy = policy_for(role, cost, *policies, scenario.pack)
        ids = [f"{begins.value}{index}" for index in range(count)]
        learn = scenario.learn_outputs
        return [(Instance(id, role, limits[role], learn, receives), policy) for id in ids]

    if scenario.colocated:
        return Fleet(instances(Role.BOTH, scenario.colocated), ())
    return Fleet(
        instances(Role.PREFILL, scenario.num_prefill), instances(Role.DECODE, scenario.num_decode)
    )


def _classes_of(scenario: Scenario, count: int) -> list[int]:
    if len(scenario.classes) == 1:
        return [0] * count
    seed = _seed(scenario.seed, _CLASSES)
    return assign_classes(count, scenario.classes, seed).tolist()


def _seed(seed: int, stream: int) -> int:
    """Of one stream of several: from the same seed they would go along with each other."""
    return int(np.random.SeedSequence((seed, stream)).generate_state(1)[0])
