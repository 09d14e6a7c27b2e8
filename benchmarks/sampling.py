"""How long the sampling of one step takes, on the devices that JAX finds.

  python benchmarks/sampling.py [--vocab=49152] [--rows=1,16,64] [--rounds=9] [--output=json]

Milliseconds: greedy, at a temperature, with top-p, with top-k and top-p, and greedy with
log-probabilities. Logits are random; a step of the model is not in it.
"""

import json
import time

import jax
import numpy as np
from absl import app, flags
from figures import say, short, spread, table, where

from models import sampling

_VOCAB = flags.DEFINE_integer("vocab", 49152, "Tokens of the vocabulary.", 1)
_ROWS = flags.DEFINE_list("rows", ["1", "16", "64"], "Sequences of each step.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Steps of each kind that count.", 1)
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "How to print the result.")

KINDS = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "top-k, top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "log-probabilities": {"logprobs": 1},
}


def inputs(rows: int, **how: float) -> sampling.SamplingInput:
    """All rows sample in the same way, from random seeds."""
    off = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "logprobs": 0}
    filled = {
        name: np.full(rows, value, np.int32 if name in ("top_k", "logprobs") else np.float32)
        for name, value in (off | how).items()
    }
    seeds = np.random.default_rng(0).integers(0, 2**32, (rows, 2), np.uint32)
    return sampling.SamplingInput(**filled, seed=seeds, position=np.arange(rows, dtype=np.int32))


def measure(rows: int, vocab: int, rounds: int) -> dict:
    """Milliseconds of a step of so many rows, by kind."""
    random, sample, found = np.random.default_rng(rows), jax.jit(sampling.sample), {}
    logits = jax.device_put(random.normal(0, 3, (rows, vocab)).astype(np.float32))
    for kind, how in KINDS.items():
        given, times = jax.device_put((inputs(rows, **how), np.ones(rows, bool))), []
        for _ in range(rounds + 1):
            begun = time.perf_counter()
            sample(logits, *given).block_until_ready()
            times.append(1000 * (time.perf_counter() - begun))
        found[kind] = spread(times[1:])  # the first compiles
    return {"rows": rows, "ms": found}


def main(argv: list[str]) -> None:
    """Prints the result."""
    del argv
    result = where() | {"vocab": _VOCAB.value, "steps": []}
    for rows in map(int, _ROWS.value):
        say(f"{rows} rows")
        result["steps"].append(measure(rows, _VOCAB.value, _ROUNDS.value))
    if _OUTPUT.value == "json":
        print(json.dumps(result, indent=1))
        return
    cells = [[str(r["rows"]), *map(short, r["ms"].values())] for r in result["steps"]]
    print(table(("rows", *(f"{kind}, ms" for kind in KINDS)), cells))


if __name__ == "__main__":
    app.run(main)
