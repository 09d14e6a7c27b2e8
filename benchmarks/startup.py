"""How long `python -m kairos_jax.serve` takes until its health is SERVING, caches cold and warm.

  python benchmarks/startup.py [--config=FILE] [--rounds=3] [--warm=3] [--output=json]

Each round has a cache folder of its own: one cold start, which compiles every shape and measures
the step times, then `--warm` starts that find both there. The model's files are fetched before, and
are not part of it. The operating system's file cache is as warm as earlier runs have left it.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from absl import app, flags
from figures import say, short, spread, table, where
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kairos_jax.process import hub

_CONFIG = flags.DEFINE_string("config", "configs/smollm2_135m_cpu.py", "Config to start.")
_MODEL = flags.DEFINE_string("model", hub.DEFAULT_MODEL, "Path or name of a model.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Cold starts.", 1)
_WARM = flags.DEFINE_integer("warm", 3, "Warm starts after each of them.", 1)
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "How to print the result.")

_SERVING = health_pb2.HealthCheckResponse.SERVING
_TIMEOUT_S = 900.0
_STOP_TIMEOUT_S = 40.0


class NotStarted(Exception):
    """A server ended before it was ready."""


def start(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, float]:
    """Starts a server, ends it, and says when it listened and was ready, in seconds from its start,
    and how many programs it has compiled or read.

    Raises:
        NotStarted: it ended before.
    """
    command = [sys.executable, "-m", "kairos_jax.serve", "--port=0", *arguments]
    begin = time.monotonic()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            address = _said(process, "starting").rsplit("gRPC on ", 1)[1].strip()
            listening_s = time.monotonic() - begin
            _until_serving(address)
            ready_s = time.monotonic() - begin
            programs = re.search(r"(\d+) programs", _said(process, "ready"))
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
    return {
        "listening_s": listening_s,
        "ready_s": ready_s,
        "programs": int(programs[1]) if programs else 0,
    }


def _said(process: subprocess.Popen, start: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return line
    raise NotStarted(f"the server ended with code {process.wait()} before it said {start!r}")


def _until_serving(address: str) -> None:
    """The server itself says when, so that no poll adds to it."""
    with grpc.insecure_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch  # type: ignore[attr-defined]
        for status in watch(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S):
            if status.status == _SERVING:
                return
    raise NotStarted("the server ended its health stream before it was ready")


def measure() -> dict[str, Any]:
    """Spreads of all starts, by the state of their caches."""
    model = hub.resolve_model(_MODEL.value)
    arguments = [f"--config={_CONFIG.value}", f"--model={model}"]
    starts: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    result = where()
    for _ in range(_ROUNDS.value):
        with tempfile.TemporaryDirectory() as cache:
            for index in range(1 + _WARM.value):
                state = "warm" if index else "cold"
                took = start(arguments, os.environ | {"XDG_CACHE_HOME": cache})
                starts[state].append(took)
                say(f"{state}: ready after {took['ready_s']:.1f} s")
    result |= {"config": Path(_CONFIG.value).stem, "model": _MODEL.value}
    for state, of_state in starts.items():
        result[state] = {key: spread(each[key] for each in of_state) for key in of_state[0]}
    return result


def main(argv: list[str]) -> None:
    """Prints the result."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no server is left behind
    result = measure()
    if _OUTPUT.value == "json":
        print(json.dumps(result, indent=1))
        return
    print(f"{result['config']}, {result['cpu']}, {result['cores']} cores, seconds")
    states = ("cold", "warm")
    keys = ("listening_s", "ready_s", "programs")
    cells = [[state, *(short(result[state][key]) for key in keys)] for state in states]
    print(table(["caches", "listening", "ready", "compiled programs"], cells))


if __name__ == "__main__":
    app.run(main)
