"""Decode and prefill steps beside what the device at hand allows, measured in the same run.

  python benchmarks/roofline.py --config=FILE [--model_shape=llama3_8b] [--output=json]

Ceilings: memory bandwidth (the best of a copy, a sum and a product with a vector) and the peak of a
product of two large matrices, in float32 and bfloat16. Then the engine's own steps, with random
weights made on the device, beside what `kairos plan` says of a chip with those ceilings: the limit,
which is the longer of its operations at that peak and its bytes at that bandwidth, and the
prediction, at the shares of both that are assumed of chips that are not here. The config says
dtype, kernels and the size of pages (--config.KEY=VALUE); how many tokens there is room for follows
from what is asked.

Each step is timed twice: as a worker runs it (`engine`: arrays made on the host, the compiled step,
tokens read back), and as the same compiled calls one after the other without a wait (`device`). The
difference is what the engine adds. Products in float32 are those that JAX makes by default.
"""

import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from figures import say, short, spread, table, where
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from kairos_jax.config import ServerConfig
from kairos_jax.config.chips import Chip
from kairos_jax.engine.build import build_engine, choose_kernels, load_weights
from kairos_jax.engine.configure import device_bytes
from kairos_jax.engine.devices import start_jax
from kairos_jax.engine.engine import JaxEngine
from kairos_jax.engine.model import Model
from kairos_jax.lab.planning import Needs, Prediction, Shares
from kairos_jax.lab.shapes import SHAPES
from kairos_jax.process import launch
from kairos_jax.process.hub import resolve_model
from kairos_jax.process.progress import bars
from models.checkpoint import open_checkpoint
from models.config import ModelConfig
from models.params import abstract_params
from models.sharding import Rules
from schedulers.ledger.instance import Role
from schedulers.ledger.request import Request, Seq, Slo

# What each round of a measurement lasts at least.
_ROUND_S = 0.2


@dataclass(frozen=True)
class RandomCheckpoint:
    """Weights of no model, in the sizes of one."""

    config: ModelConfig
    path: Path = Path("random")

    def load(self, mesh: Mesh, rules: Rules, dtype: DTypeLike) -> dict[str, jax.Array]:
        """See `models.checkpoint.Checkpoint`."""
        return {
            path: _uniform(leaf.shape, leaf.dtype, leaf.sharding)
            for path, leaf in abstract_params(self.config, dtype, mesh, rules).items()
        }


def _uniform(shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding) -> jax.Array:
    """Made on the device, by a program for each shape: one for all takes long to compile."""
    return _made_by(shape, dtype, sharding)(jax.random.key(0))


@functools.cache
def _made_by(
    shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding
) -> Callable[[jax.Array], jax.Array]:
    def make(key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -0.05, 0.05)

    return jax.jit(make, out_shardings=sharding)


def measure(config: ServerConfig) -> dict[str, Any]:
    """The ceilings, and a row for each step."""
    values = flags.FLAGS
    decodes = [(int(b), int(c)) for c in values.contexts for b in values.batches]
    prefills = [int(tokens) for tokens in values.prompts]
    config = _sized(config, decodes, prefills)
    devices = start_jax(config.num_devices, values.cpu_devices)
    result = where() | {
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "model_shape": values.model_shape or config.model,
        "dtype": config.dtype,
        "kernels": choose_kernels(config, devices),
        "page_size": config.page_size,
    }
    say("ceilings")
    mib, size = (256, 2048) if devices[0].platform == "cpu" else (4096, 8192)
    result["ceilings"] = limits = ceilings(values.mib or mib, values.matmul or size)
    say("weights")
    named = values.model_shape
    shape = SHAPES[named] if named else open_checkpoint(resolve_model(config.model)).config
    model = Model(RandomCheckpoint(shape), None)
    with bars() as progress:
        params = load_weights(config, model, "random", devices, progress)
    engine = build_engine(config, model, Role.BOTH, devices, params)
    ahead = prediction(engine, config, limits)
    result["assumed"] = str(ahead.shares)
    result["decode"] = [decode(engine, *point, ahead) for point in decodes]
    result["prefill"] = [prefill(engine, tokens, ahead) for tokens in prefills]
    return result


def prediction(engine: JaxEngine, config: ServerConfig, ceilings: dict[str, Any]) -> Prediction:
    """What `kairos plan` says of the engine's steps, with the ceilings of a device in place of what
    a vendor states.
    """
    device, count = engine.mesh.devices.flat[0], engine.mesh.size
    peak = ceilings["matmul"][config.dtype]["median"] * 1e12
    bandwidth = ceilings["bandwidth"] * 1e9
    # What links add is not measured here.
    platform: Any = device.platform
    flops = {config.dtype: peak}
    chip = Chip("here", device.device_kind, platform, 0, bandwidth, flops, math.inf, count)
    weights, token = device_bytes(
        engine.config, config.dtype, count, engine.kernels, config.page_size, config.rules
    )
    needs = Needs(Role.BOTH, count, weights, 0, 0, token)
    return Prediction(engine.config, config, needs, chip, Shares())


def _sized(
    config: ServerConfig, decodes: Sequence[tuple[int, int]], prefills: Sequence[int]
) -> ServerConfig:
    """One instance with room for all points, and a pool in which no two sequences share a page."""
    page = config.page_size
    longest = max([context + 2 for _, context in decodes] + [tokens + 1 for tokens in prefills])
    pages = max(batch * -(-(context + 1) // page) for batch, context in decodes)
    max_batch = max(batch for batch, _ in decodes)
    kv_tokens = page * max(pages, -(-longest // page))
    return replace(
        config,
        colocated=True,
        max_context=longest,
        prefill=replace(config.prefill, instances=1, max_chunk=max(prefills)),
        decode=replace(config.decode, max_batch=max_batch, kv_tokens=kv_tokens),
    )


# What the device allows.


def ceilings(mib: int, size: int) -> dict[str, Any]:
    """GB/s of each way to read memory, the median of the best, and TFLOP/s of products."""
    num_bytes = mib << 20
    x = jnp.ones((num_bytes // 16384, 4096), jnp.float32)
    vector = jnp.ones(4096, jnp.float32)
    probes = {
        "copy": (jax.jit(lambda x: x + 1), (x,), 2 * num_bytes),
        "sum": (jax.jit(lambda x: x.sum(axis=1)), (x,), num_bytes),
        "vector": (jax.jit(lambda x, v: x @ v), (x, vector), num_bytes),
    }
    rates = {
        name: spread(moved / seconds / 1e9 for seconds in _times(lambda f=f, a=a: f(*a)))
        for name, (f, a, moved) in probes.items()
    }
    product = jax.jit(lambda a, b: a @ b)
    products = {}
    for dtype in ("float32", "bfloat16"):
        a = jnp.ones((size, size), dtype)
        seconds = _times(lambda a=a: product(a, a))
        products[dtype] = spread(2 * size**3 / each / 1e12 for each in seconds)
    best = max(rate["median"] or 0.0 for rate in rates.values())
    return {"memory": rates, "bandwidth": best, "matmul": products}


def _times(
    run: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready
) -> list[float]:
    """Seconds of a run in each round, when many are made in one go and waited for at the end."""
    wait(run())
    begin = time.perf_counter()
    wait(run())
    count = max(math.ceil(_ROUND_S / (time.perf_counter() - begin)), 1)
    times = []
    for _ in range(flags.FLAGS.rounds):
        begin = time.perf_counter()
        for _ in range(count - 1):
            run()
        wait(run())
        times.append((time.perf_counter() - begin) / count)
    return times


# What the engine makes of it.


def decode(engine: JaxEngine, batch: int, context: int, ahead: Prediction) -> dict[str, Any]:
    say(f"decode {batch} x {context}")
    work = [(sequence(engine, index, context, 1), 1) for index in range(batch)]
    limit_s, plan_s = ahead.decode_limit_s(batch, context), ahead.decode_s(batch, context)
    return {"batch": batch, "context": context} | _against(engine, work, limit_s, plan_s)


def prefill(engine: JaxEngine, tokens: int, ahead: Prediction) -> dict[str, Any]:
    say(f"prefill {tokens}")
    work = [(sequence(engine, 0, 0, tokens), tokens)]
    row = _against(engine, work, ahead.prefill_limit_s(tokens), ahead.prefill_s(tokens))
    tokens_per_s = round(1e3 * tokens / row["engine_ms"]["median"], 1)
    return {"tokens": tokens, "tokens_per_s": tokens_per_s} | row


def _against(
    engine: JaxEngine, work: Sequence[tuple[Seq, int]], limit_s: float, plan_s: float
) -> dict[str, Any]:
    """Times of a step, its shares of the limit, and what the engine adds to the device's time."""
    calls, run = [], engine.run
    engine.dispatch = lambda call: (calls.append(call), run(call))[1]
    engine.step(work)
    engine.dispatch = run

    def again() -> None:
        for call in calls:
            run(call)

    whole = spread(1e3 * each for each in _times(lambda: engine.step(work)))
    device = spread(1e3 * each for each in _times(again, lambda _: engine.wait()))
    assert whole["median"]
    assert device["median"]
    return {
        "limit_ms": round(1e3 * limit_s, 4),
        "plan_ms": round(1e3 * plan_s, 4),
        "engine_ms": whole,
        "device_ms": device,
        "engine_share": round(1e3 * limit_s / whole["median"], 3),
        "device_share": round(1e3 * limit_s / device["median"], 3),
        "engine_adds": round(1 - device["median"] / whole["median"], 3),
    }


def sequence(engine: JaxEngine, index: int, computed: int, tokens: int) -> Seq:
    slo, length = Slo(1.0, 1.0), computed + tokens
    seq = Seq(Request(str(index), 0.0, [1] * length, 1, slo), computed=computed)
    pages = engine.limits.pages_for(length)
    seq.pages = list(range(index * pages, (index + 1) * pages))
    return seq


def main(argv: list[str]) -> None:
    """Prints the result."""
    result = measure(launch.read_config())
    if flags.FLAGS.output == "json":
        print(json.dumps(result, indent=1))
        return
    names = ("device", "devices", "model_shape", "dtype", "kernels", "date", "load_average")
    print(", ".join(f"{name} {result[name]}" for name in names))
    ceilings = result["ceilings"]
    print("GB/s: " + ", ".join(f"{k} {short(v)}" for k, v in ceilings["memory"].items()))
    print("TFLOP/s: " + ", ".join(f"{k} {short(v)}" for k, v in ceilings["matmul"].items()))
    for part, sizes in (("decode", ("batch", "context")), ("prefill", ("tokens",))):
        cells = [
            [
                *(str(row[size]) for size in sizes),
                *(short(row[key]) for key in ("engine_ms", "device_ms")),
                *(f"{row[key]:.4g}" for key in ("limit_ms", "plan_ms")),
                *(f"{row[key]:.1%}" for key in ("engine_share", "device_share", "engine_adds")),
            ]
            for row in result[part]
        ]
        head = ("engine ms", "device ms", "limit ms", "plan ms", "of limit", "device's", "added")
        print(f"\n{part}\n" + table([*sizes, *head], cells))


def define_flags() -> None:
    """All flags, the config's among them."""
    launch.define_config_flag()
    flags.DEFINE_enum("model_shape", None, list(SHAPES), "Sizes, instead of the model's.")
    flags.DEFINE_list("batches", ["1", "16", "64"], "decode: sequences.")
    flags.DEFINE_list("contexts", ["200", "1024"], "decode: tokens of each.")
    flags.DEFINE_list("prompts", ["128", "512", "2048"], "prefill: tokens.")
    flags.DEFINE_integer("mib", 0, "Of each memory probe; 0: 256 on a CPU, else 4096.", 0)
    flags.DEFINE_integer("matmul", 0, "Size of the products; 0: 2048 on a CPU, else 8192.", 0)
    flags.DEFINE_integer("rounds", 5, "Measurements of each.", 1)
    flags.DEFINE_enum("output", "text", ["text", "json"], "How to print the result.")


if __name__ == "__main__":
    define_flags()
    launch.run(main)
