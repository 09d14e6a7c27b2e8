"""What the host adds to a step: a worker's loop over an engine whose device takes no time.

  python benchmarks/host_step.py [--sizes=64:1024,256:8192] [--device] [--output=json]

The loop is the worker's own, with its ledger, policies and threads, and so is what the engine makes
of the ledger's work. In place of the compiled step there is one that has ended at once; with
--device, one that takes the time of an H100's, give or take 2 %. Each size is a batch of sequences
and the length of their contexts. Told is the time from the tokens of one step to those of the next,
in milliseconds; with --device, the time in which the device has nothing to do between two steps.
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

from kairos_jax.engine.calls import Call, Step
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
_DEVICE = flags.DEFINE_bool("device", False, "Whether steps take time.")
_STEPS = flags.DEFINE_integer("steps", 300, "Steps of each size that count.", 10)
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "How to print the result.")


class Samples:
    """The same token for all, there at a time of `time.perf_counter`."""

    def __init__(self, sequences: int, at: float):
        self._packed, self._at = np.zeros((sequences, 42), np.int32), at

    def copy_to_host_async(self) -> None:
        """As of an array."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        # A sleep is late by up to a tenth of a millisecond.
        while (left := self._at - time.perf_counter()) > 0:
            time.sleep(left - 2e-4 if left > 3e-4 else 0)
        return self._packed


class Device:
    """Runs steps one after the other. idle_s: for how long it had none, before each."""

    def __init__(self, step_s: float):
        self.step_s, self.idle_s = step_s, []
        self._free_at = 0.0
        self._random = np.random.default_rng(0)

    def run(self, call: Call) -> Samples | None:
        """Dispatches a `Step`; what fills lanes takes no time."""
        if not isinstance(call, Step):
            return None
        now = time.perf_counter()
        begun = max(now, self._free_at)
        self.idle_s.append(begun - self._free_at)
        self._free_at = begun + self.step_s * self._random.normal(1.0, 0.02)
        return Samples(len(call.sequences), self._free_at)


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
    device = Device(_COST.decode_s(batch * [context]) if _DEVICE.value else 0.0)
    engine.dispatch = device.run
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
    gaps = device.idle_s[20:-20] if _DEVICE.value else np.diff(told_at[20:])
    low, high = np.quantile(gaps, [0.1, 0.9])
    figure = {"median": float(np.median(gaps)), "low": float(low), "high": float(high)}
    told = {"batch": batch, "context": context, "ahead": worker.ran.num_ahead / steps}
    return told | {"ms": {k: 1e3 * v for k, v in figure.items()}}


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
    rows = [
        [str(r["batch"]), str(r["context"]), f"{r['ahead']:.0%}", short(r["ms"])]
        for r in result["steps"]
    ]
    print(table(("batch", "context", "ahead", "ms between steps (10 % to 90 %)"), rows))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    app.run(main)
