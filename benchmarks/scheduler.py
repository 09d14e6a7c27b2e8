"""What one scheduling decision costs, as the queue grows.

  python benchmarks/scheduler.py [--output=json]

Every policy decides on a ledger with 256 running sequences (one that only prefills: none, or one
begun) and 100 to 100,000 waiting ones, of which a half are hopeless. Medians and 90th percentiles
of fresh decisions, in microseconds; the cost model is that of an 8B model on an H100 by roofline.
"""

import json
import statistics
import time
from collections.abc import Callable

import numpy as np
from absl import app, flags

from schedulers.cost import CostModel, StepCost, TransferCost
from schedulers.ledger.instance import Batch, Instance, Limits, Policy, Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies import decode, prefill

COST = CostModel(
    StepCost(5e-3, per_token_s=32e-6, per_pair_s=1.32e-9),
    StepCost(7e-3, per_seq_s=20e-6, per_context_token_s=55e-9),
    TransferCost(2e-3, 5.2e-6),
    400_000,
)
NOW = 1000.0
RUNNING = 256
QUEUES = (100, 1_000, 10_000, 100_000)

_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "How to print the result.")


def _limits() -> Limits:
    return Limits(
        max_batch=1024, max_chunk=4096, max_context=16_384, page_size=16, num_pages=25_000
    )


def _lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    return np.clip(rng.lognormal(6.6, 1.0, count), 1, 14_000).astype(int)


def prefill_ledger(num_waiting: int) -> Instance:
    """Prompts due from one second ago until one second from now."""
    rng = np.random.default_rng(0)
    instance = Instance("p", Role.PREFILL, _limits())
    for index, length in enumerate(_lengths(num_waiting, rng).tolist()):
        arrival = NOW - rng.uniform(0, 2)
        instance.add(Request(str(index), arrival, range(length), 1000, Slo(1.0, 0.025)))
    return instance


def decode_ledger(num_waiting: int) -> Instance:
    """Sequences at random places of outputs of 200 tokens in the mean, and such as have just been
    handed over, half of them too late.
    """
    rng = np.random.default_rng(0)
    instance = Instance("d", Role.DECODE, _limits())
    for index in range(RUNNING):
        count = int(rng.integers(1, 400))
        slack = rng.normal(0.05, 0.05)
        request = Request(
            f"r{index}", NOW - 10 - count * 0.025, range(1000), 1000, Slo(10.0, 0.025)
        )
        instance.add(request, count, NOW + slack - count * 0.025)
    ids = tuple(instance.waiting)
    instance.begin(Batch(fetch=ids), NOW)
    for id in ids:
        instance.fetched(id)
    instance.begin(Batch(dict.fromkeys(ids, 1), predicted_s=0.02), NOW - 0.02)
    instance.end(Batch(dict.fromkeys(ids, 1), predicted_s=0.02), NOW)
    for index, length in enumerate(_lengths(num_waiting, rng).tolist()):
        ttft = 1.0 if index % 2 else 0.1
        instance.add(Request(str(index), NOW - 0.5, range(length), 1000, Slo(ttft, 0.025)), 1, NOW)
    return instance


def decision_us(policy: Policy, instance: Instance, seconds: float = 1.0) -> tuple[float, float]:
    """Median and 90th percentile of what a decision costs, in microseconds. No two are made at the
    same time, so that nothing of one can serve the next.
    """
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 10 or (time.perf_counter() - begin < seconds and len(times) < 500):
        now = NOW + 1e-6 * len(times) + 0.5
        start = time.perf_counter()
        policy(instance, now)
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times), statistics.quantiles(times, n=10)[-1]


def measure() -> list[dict]:
    """A row a policy and queue."""
    jobs: list[tuple[str, str, Callable[..., Policy], Callable[[int], Instance]]] = [
        *(("prefill", name, make, prefill_ledger) for name, make in prefill.POLICIES.items()),
        *(("decode", name, make, decode_ledger) for name, make in decode.POLICIES.items()),
    ]
    rows = []
    for num_waiting in QUEUES:
        ledgers = {make: make(num_waiting) for make in (prefill_ledger, decode_ledger)}
        for role, name, make, ledger in jobs:
            median, high = decision_us(make(COST), ledgers[ledger])
            rows.append(
                {"role": role, "policy": name, "waiting": num_waiting}
                | {"median_us": round(median, 1), "p90_us": round(high, 1)}
            )
    return rows


def main(argv: list[str]) -> None:
    """Prints the table."""
    rows = measure()
    if _OUTPUT.value == "json":
        print(json.dumps(rows, indent=1))
        return
    print("microseconds a decision, median (90th percentile)")
    print(f"{'':24}" + "".join(f"{count:>20,}" for count in QUEUES))
    for role, name in dict.fromkeys((row["role"], row["policy"]) for row in rows):
        cells = [row for row in rows if (row["role"], row["policy"]) == (role, name)]
        values = [f"{row['median_us']:.0f} ({row['p90_us']:.0f})" for row in cells]
        print(f"{role + ' ' + name:24}" + "".join(f"{value:>20}" for value in values))


if __name__ == "__main__":
    app.run(main)
