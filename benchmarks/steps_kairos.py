"""Our side of benchmarks/vs_vllm.py: one colocated worker, asked by JSON lines.

The worker is the one that serves, with its threads, ledger, policies and events; what asks it here
takes the place of the router. The lines are those of benchmarks/steps_vllm.py.
"""

import contextlib
import itertools
import json
import os
import queue
import sys
import time
from typing import Any

import jax
from absl import flags

from kairos_jax.engine import profiling
from kairos_jax.engine.build import build_engines
from kairos_jax.engine.devices import start_jax
from kairos_jax.engine.model import open_model
from kairos_jax.kv.transport import LocalTransport
from kairos_jax.process import command, launch
from kairos_jax.process.progress import bars
from kairos_jax.worker.build import build_workers
from kairos_jax.worker.messages import Cancel, Died, Event, Stepped, Submit
from kairos_jax.worker.worker import Worker
from models.sampling import SamplingParams
from schedulers.cost import CostModel
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Request, Slo

# So late that no policy takes a sequence for hopeless, or holds one back for another.
_LOOSE = Slo(3600.0, 60.0)
_STOP_TIMEOUT_S = 5.0
# The end of a step that nobody waits for is no event.
_POLL_S = 0.005


def main(argv: list[str]) -> int:
    """Starts the worker, says so, and answers until stdin ends. Returns the exit code."""
    # What else is printed must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    config = launch.read_config()
    if config.roles != (Role.BOTH,):
        raise command.UsageError(
            f"one colocated instance is needed, the config has {config.layout}"
        )
    devices = start_jax(config.num_devices, flags.FLAGS.cpu_devices)
    with bars() as progress:
        model = open_model(config)
        engines = build_engines(config, model, devices, progress)
        measured = profiling.load_or_measure(None, config, model, engines, progress)
    events: queue.Queue[Event] = queue.Queue()
    cost = CostModel.from_profile(measured)
    (worker,) = build_workers(config, engines, cost, LocalTransport(), events.put)
    worker.start()
    facts = {"jax": jax.__version__, "vocab_size": model.checkpoint.config.vocab_size}
    facts |= {"compiled": sum(engine.num_compiled for engine in engines)}
    print(json.dumps(facts), file=answers)
    ids = itertools.count()
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(_run(worker, events, ids, config.max_context, **asked)), file=answers)
    worker.stop(_STOP_TIMEOUT_S)
    return 0


def _run(
    worker: Worker,
    events: queue.Queue[Event],
    ids: itertools.count,
    max_context: int,
    prompts: list[list[int]],
    full_steps: int,
) -> dict[str, Any]:
    begin = time.monotonic()
    requests = [
        Request(
            str(next(ids)),
            begin,
            prompt,
            max_context - len(prompt),
            _LOOSE,
            sampling=SamplingParams(),
        )
        for prompt in prompts
    ]
    first: dict[str, int] = {}
    at, counts, full = [], [], 0
    for request in requests:
        worker.post(Submit(request))
    while full < full_steps:
        match events.get():
            case Stepped(outputs):
                at.append(time.monotonic() - begin)
                counts.append(len(outputs))
                full += counts[-1] == len(prompts)
                for output in outputs:
                    first.setdefault(output.id, output.token.id)
            case Died(_, error):
                raise error
    for request in requests:
        worker.post(Cancel(request.id))
    _until_idle(worker, events)
    return {"at": at, "counts": counts, "first": [first[request.id] for request in requests]}


def _until_idle(worker: Worker, events: queue.Queue[Event]) -> None:
    """Returns when no step is under way, and nothing is left of what was cancelled."""
    while worker.instance.running or worker.instance.waiting or worker.num_under_way:
        with contextlib.suppress(queue.Empty):
            if isinstance(event := events.get(timeout=_POLL_S), Died):
                raise event.error
    while not events.empty():
        events.get()


if __name__ == "__main__":
    launch.define_config_flag()
    launch.run(main)
