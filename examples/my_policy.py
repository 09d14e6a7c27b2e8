"""A prefill policy of one's own, and how it does in the simulator beside others.

  .venv/bin/python examples/my_policy.py

Shortest prompt first starves long prompts under load. Here a prompt gains on those that came later:
each second of waiting counts as much as 400 tokens less to compute. Prints a table in about ten
seconds: the share of requests that keep both SLOs, and the 99th percentile of TTFT. A policy is a
function of the ledger, so the live server runs the same object: see "A policy" in WORKSPACE.md.
"""

import numpy as np

from kairos_jax.engine import profile_file
from schedulers.cost import CostModel
from schedulers.ledger.request import Seq, Slo
from schedulers.ledger.rows import Rows
from schedulers.policies import prefill
from schedulers.simulation.scenario import Scenario, simulate
from schedulers.simulation.workload import SloClass, rescale, synthetic

# Tokens a second.
_PATIENCE = 400.0


def patient(cost: CostModel, pack: float = 0.0) -> prefill.Ordered:
    """Shortest remaining prompt first, with credit for waiting."""

    def key(waiting: Rows[Seq]) -> np.ndarray:
        """Of all waiting prompts at once, one number each; the least goes first."""
        return (waiting.length - waiting.computed) + _PATIENCE * waiting.arrival

    return prefill.Ordered(cost, key, pack)


def main() -> None:
    prefill.POLICIES["patient"] = patient
    cost = CostModel.from_profile(profile_file.read("llama3_8b_h100_roofline"))
    arrivals = rescale(synthetic(2000, 1.0, seed=0), rate=20.0)
    print("policy       both SLOs kept, %   TTFT p99, s")
    for name in ("fcfs", "sjf", "patient", "kairos_plus"):
        scenario = Scenario(
            cost, (SloClass(1.0, Slo(ttft=1.0, tpot=0.05)),), num_decode=2, prefill_policy=name
        )
        result = simulate(scenario, arrivals)
        print(f"{name:12} {result['e2e_attainment']:17.1f} {result['ttft_s']['p99']:13.1f}")


if __name__ == "__main__":
    main()
