"""What the host adds to a step: a worker's loop over an engine whose device takes no time.

  python benchmarks/host_step.py [--sizes=64:1024,256:8192] [--output=json]

The loop is the worker's own, with its ledger, policies and threads, and so is what the engine makes
of the ledger's work. In place of the compiled step there is one that has ended at once. Each size
is a batch of sequences and the length of their contexts; told is the time from the tokens of one
step to those of the next, in milliseconds.
"""

import json
import threading
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags
from figures import say, short, table, where
from roofline import RandomCheckpoint

from kairos_jax.engine.engine import JaxEngine
from kairos_jax.engine.functions import Shapes
from kairos_jax.kv.transport import LocalTransport
from kairos_jax.lab.shapes import SHAPES
from kairos_jax.worker.messages import Event, Stepped, Submit
from kairos_jax.worker.worker import Worker
from models.sampling import SamplingParams
from models.sharding import Rules, make_mesh
from schedulers.cost import CostModel, StepCost, TransferCost
from schedulers.ledger.instance import Instance, Limits, Role
from schedulers.ledger.request import Request, Slo
from schedulers.policies.colocated import policy_for
from schedulers.policies.routing import outline

# An H100's steps, so that policies decide as they would there.
_STEP = StepCost(7e-3, 2e-5, 1e-9, 2e-5, 5e-8)
_COST = CostModel(_STEP, _STEP, TransferCost(2e-3, 5e-6), 10**7)

_SIZES = flags.DEFINE_list("sizes", ["64:1024", "256:8192"], "Sequences and context of each.")
_STEPS = flags.DEFINE_integer("steps", 300, "Steps of each size that count.", 10)
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "How to print the result.")


class Instant:
    """Samples that are there at once: the same token for all."""

    def __init__(self, sequences: int):
        self._packed = np.zeros((sequences, 42), np.int32)

    def copy_to_host_async(self) -> None:
        """As of an array."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return self._packed


def measure(batch: int, context: int) -> dict[str, Any]:
    """Milliseconds between steps of a whole batch."""
    page, steps = 64, _STEPS.value + 20
    length = context + steps + 1
    limits = Limits(
        max_batch=batch,
        max_chunk=batch * length,
        max_context=-(-length // page) * page,
        page_size=page,
        num_pages=batch * -(-length // page) + 1,
    )
    shape, mesh, rules = SHAPES["tiny"], make_mesh(jax.devices()[:1]), Rules()
    params = RandomCheckpoint(shape).load(mesh, rules, "float32")
    shapes = Shapes.for_role(Role.BOTH, limits)
    engine = JaxEngine(shape, params, mesh, rules, limits, shapes)
    engine.dispatch = lambda call: Instant(len(call.sequences))  # type: ignore[union-attr]
    ended, told_at = threading.Event(), []

    def emit(event: Event) -> None:
        if isinstance(event, Stepped) and len(event.outputs) == batch:
            told_at.append(time.perf_counter())
            if len(told_at) == steps:
                ended.set()

    policy = policy_for(Role.BOTH, _COST, "kairos_plus", "kairos_plus", float("inf"))
    worker = Worker(
        Instance("host", Role.BOTH, limits),
        policy,
        engine,
        LocalTransport(),
        emit,
        lambda instance, now: outline(instance, _COST, now),
    )
    how = SamplingParams()
    for index in range(batch):
        prompt = [1 + index % 7] * context
        request = Request(str(index), time.monotonic(), prompt, steps + 20, Slo(9, 9), sampling=how)
        worker.post(Submit(request))
    worker.start()
    assert ended.wait(300), "the batch did not come together"
    worker.stop()
    gaps = np.diff(told_at[20:])
    low, high = np.quantile(gaps, [0.1, 0.9])
    figure = {"median": float(np.median(gaps)), "low": float(low), "high": float(high)}
    return {"batch": batch, "context": context, "ms": {k: 1e3 * v for k, v in figure.items()}}


def main(argv: list[str]) -> None:
    """Prints the result."""
    del argv
    result = where() | {"steps": []}
    for size in _SIZES.value:
        say(size)
        batch, context = map(int, size.split(":"))
        result["steps"].append(measure(batch, context))
    if _OUTPUT.value == "json":
        print(json.dumps(result, indent=1))
        return
    rows = [[str(r["batch"]), str(r["context"]), short(r["ms"])] for r in result["steps"]]
    print(table(("batch", "context", "ms between steps (10 % to 90 %)"), rows))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    app.run(main)
