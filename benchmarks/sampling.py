"""How long one step's sampling takes, on the devices that JAX finds.

  python benchmarks/sampling.py [--vocab=49152] [--rows=1,16,64] [--rounds=9]

Milliseconds, median: greedy, at a temperature, with top-p, with top-k and top-p, and greedy with
log-probabilities. Logits are random; a step of the model is not in it.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from models import sampling

KINDS = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "top-k and top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "log-probabilities": {"logprobs": 1},
}


def inputs(rows: int, **how) -> sampling.SamplingInput:
    """All rows sample in the same way, from random seeds."""
    off = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "logprobs": 0}
    integers = {"top_k", "logprobs"}
    filled = {
        name: np.full(rows, value, np.int32 if name in integers else np.float32)
        for name, value in (off | how).items()
    }
    seeds = np.random.default_rng(0).integers(0, 2**32, (rows, 2), np.uint32)
    return sampling.SamplingInput(**filled, seed=seeds, position=np.arange(rows, dtype=np.int32))


def main() -> None:
    """Prints a row for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rows", default="1,16,64")
    parser.add_argument("--rounds", type=int, default=9)
    values = parser.parse_args()
    sample = jax.jit(sampling.sample)
    print("rows", *(f"{name:>17}" for name in KINDS))
    for rows in map(int, values.rows.split(",")):
        logits = np.random.default_rng(rows).normal(0, 3, (rows, values.vocab))
        logits = jax.device_put(logits.astype(np.float32))
        finite, cells = np.ones(rows, bool), []
        for how in KINDS.values():
            given, times = jax.device_put((inputs(rows, **how), finite)), []
            for _ in range(values.rounds + 1):  # the first compiles
                begun = time.perf_counter()
                sample(logits, *given).block_until_ready()
                times.append(1000 * (time.perf_counter() - begun))
            cells.append(statistics.median(times[1:]))
        print(f"{rows:4}", *(f"{cell:17.2f}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
