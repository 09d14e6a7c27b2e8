"""What copies of KV take of the step loop: the calls that bring pages out of a pool, and back.

  python benchmarks/copies.py [--tokens=1000000] [--blocks=1,4] [--output=json]

A worker's own code makes the copies, as many between two steps as are predicted to take 2 ms on an
H100 that runs Llama 3.1 8B. The engine has as many arrays as that model, in the layout of GPUs; in
place of the compiled copies there are programs that take the same arrays and copy nothing. Told are
the time of all, and of those between two steps. With --blocks=1 a call copies one block, of four
pages, as all did once; with --unbounded nothing comes between them.
"""

import dataclasses
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from figures import say, short, table, where
from roofline import RandomCheckpoint

from kairos_jax.engine.engine import JaxEngine, num_blocks
from kairos_jax.engine.functions import BLOCK_PAGES, Shapes
from kairos_jax.lab.shapes import SHAPES
from kairos_jax.worker.copies import Copies, Copy
from models.sharding import Rules, make_mesh
from schedulers.ledger.instance import Limits, Role

_PAGE = 64  # tokens
# 34 MB, which are read and written twice, at 3.35 TB/s.
_BLOCK_S = 4e-5

_TOKENS = flags.DEFINE_integer("tokens", 1_000_000, "How many tokens' KV is copied.", 1)
_BLOCKS = flags.DEFINE_list("blocks", ["1", "4"], "Blocks that one call copies.")
_UNBOUNDED = flags.DEFINE_bool("unbounded", False, "Whether all is copied between two steps.")
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "How to print the result.")


def build() -> JaxEngine:
    """An engine whose page moves move nothing."""
    limits = Limits(1, 16, 64, page_size=1, num_pages=64)
    shape = dataclasses.replace(SHAPES["tiny"], num_layers=32)
    blocks = tuple(map(int, _BLOCKS.value))
    shapes = Shapes(Role.DECODE, (), blocks)
    mesh, rules = make_mesh(jax.devices()[:1]), Rules()
    params = RandomCheckpoint(shape).load(mesh, rules, "float32")
    engine = JaxEngine(shape, params, mesh, rules, limits, shapes, kernels="gpu")
    block = engine.block

    def read(pool: Any, pages: Any) -> tuple[jax.Array, ...]:
        count = pages.shape[0] // BLOCK_PAGES
        return tuple(jnp.zeros(block.shape, block.dtype) for _ in range(count))

    engine._functions._read = jax.jit(read)
    engine._functions._write = jax.jit(lambda pool, pages, blocks: pool, donate_argnums=0)
    engine.warm_up()
    engine.copy_s = 0.0 if _UNBOUNDED.value else _BLOCK_S
    return engine


def measure(engine: JaxEngine, out: bool) -> dict[str, Any]:
    """Seconds of the step loop, and milliseconds between two steps."""
    total = num_blocks(-(-_TOKENS.value // _PAGE))
    pages = [page % engine.limits.num_pages for page in range(total * BLOCK_PAGES)]
    (block,) = engine.read_pages(pages[:BLOCK_PAGES])

    def move(first: int, past: int, last: bool) -> None:
        some = pages[first * BLOCK_PAGES : past * BLOCK_PAGES]
        if out:
            engine.read_pages(some)
        else:
            engine.write_pages(some, [block] * (past - first))

    copies, pauses = Copies(lambda: engine.copy_s, time.perf_counter), []
    copies.add("all", Copy(move, lambda: None, total, True))
    while copies.waiting:
        begun = time.perf_counter()
        copies.make()
        pauses.append(1e3 * (time.perf_counter() - begun))
        engine.wait()  # as a step would come between
        copies.step_begun(0.01)
    low, high = np.quantile(pauses, [0.1, 0.9])
    spread = {"median": float(np.median(pauses)), "low": float(low), "high": float(high)}
    return {
        "way": "out" if out else "in",
        "tokens": _TOKENS.value,
        "seconds": sum(pauses) / 1e3,
        "ms": spread,
        "longest_ms": max(pauses),
    }


def main(argv: list[str]) -> None:
    """Prints the result."""
    del argv
    say("compile")
    engine = build()
    result = where() | {"blocks": list(engine.shapes.blocks), "copies": []}
    for out in (True, False):
        result["copies"].append(measure(engine, out))
    if _OUTPUT.value == "json":
        print(json.dumps(result, indent=1))
        return
    rows = [
        [
            r["way"],
            str(r["tokens"]),
            f"{r['seconds']:.2f}",
            short(r["ms"]),
            f"{r['longest_ms']:.2f}",
        ]
        for r in result["copies"]
    ]
    heads = ("way", "tokens", "s in all", "ms between two steps (10 % to 90 %)", "longest")
    print(table(heads, rows))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    app.run(main)
