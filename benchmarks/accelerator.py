"""The first run on a GPU or TPU, in one command, without a network and without a model's files.

  python benchmarks/accelerator.py --config=llama3_8b:gpu1 [--output=out/accelerator.json]

In order of worth; a part that fails is told, and the others go on. What is known is written after
each part.

1. kernels: each that is for this platform against the reference, random ragged batches in bfloat16.
2. golden: the tiny models of tests/golden, token by token in float32, and how far in bfloat16.
3. steps: with random weights of the config's model, beside the device's ceilings (roofline.py).
4. trace: ten decode steps, and the kernels that took longest.
5. profile: step times as `kairos profile` measures them, beside those that `kairos plan` predicts.
6. serving: a workload at eight tenths of the rate that the simulator says the profile holds.
"""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import roofline
from absl import flags
from figures import say, table, where

from kairos_jax.config import ServerConfig
from kairos_jax.config.chips import CHIPS
from kairos_jax.engine import calls, lanes, profiling
from kairos_jax.engine.build import build_engines, choose_kernels
from kairos_jax.engine.devices import start_jax
from kairos_jax.engine.engine import JaxEngine
from kairos_jax.engine.functions import Shapes
from kairos_jax.engine.model import Model
from kairos_jax.lab.open_loop import Live, serve
from kairos_jax.lab.planning import Prediction, Shares, needs_of
from kairos_jax.lab.shapes import SHAPES, shape_of
from kairos_jax.lab.simulated import attained, find_knee, scenario_of
from kairos_jax.process import launch
from kairos_jax.process.progress import bars
from models.checkpoint import open_checkpoint
from models.config import ModelConfig
from models.kv_cache import StepInput
from models.ops import KERNELS
from models.sharding import Rules, make_mesh
from schedulers.cost import CostModel
from schedulers.ledger.instance import Limits, Role
from schedulers.ledger.request import Request, Seq, Slo
from schedulers.ledger.rows import Column
from schedulers.simulation.workload import fit_lengths, rescale, synthetic

GOLDEN = Path(__file__).parents[1] / "tests/golden"
# Of an output of unit normal values, in bfloat16.
TOLERANCE = 0.03
# Heads, kv heads and head dim.
HEADS = {"llama3_8b": (32, 8, 128), "smollm2_135m": (9, 3, 64)}
# Tokens of each sequence.
STEPS = {
    "decode": [1] * 8,
    "chunks": [64, 100, 1, 7, 128, 33],
    "mixed": [1, 1, 200, 1, 1, 50, 1, 1],
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def names_for(config: ServerConfig, devices: Sequence[Any]) -> list[str]:
    """The kernels that are for these devices, those that the config gets first."""
    others = [name for name in KERNELS if name.startswith(devices[0].platform)]
    return list(dict.fromkeys([choose_kernels(config, devices), *others]))


# Correctness.


def check_kernels(names: Sequence[str]) -> list[dict[str, Any]]:
    """The largest error of each, of decode, of chunks, and of both beside each other."""
    rows = []
    for name in names:
        for heads, sizes in HEADS.items():
            for step, counts in STEPS.items():
                row = {"kernels": name, "heads": heads, "step": step}
                try:
                    row["error"] = round(_error(name, *sizes, counts), 5)
                    row["good"] = row["error"] < TOLERANCE
                except Exception as error:  # others may do
                    row |= {"good": False, "failed": _words(error)}
                rows.append(row)
    return rows


def _error(name: str, heads: int, kv: int, head: int, counts: Sequence[int]) -> float:
    rng, page, pages, sequences = np.random.default_rng(0), 64, 20, len(counts)
    config = ModelConfig("llama", 8, 8, 1, heads, kv, head, 8)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    before = rng.integers(0, page * pages - max(counts), sequences)
    before[:4] = (0, page - 1, page, 2 * page)
    limits = Limits(sequences, sum(counts), page * pages, page, sequences * pages)
    step = example(counts, before, rng.permutation(sequences * pages).reshape(-1, pages), limits)
    wire = normal(sequences * pages * page, kv, 2, head)
    q, k, v = (normal(step.tokens.shape[0], n, head) for n in (heads, kv, kv))

    def run(kernels: Any, dtype: Any) -> np.ndarray:
        layer = kernels.layout.zeros(config, sequences * pages, page, dtype)
        layer = kernels.layout.write(layer, jnp.arange(sequences * pages), wire.astype(dtype))
        out, _ = jax.jit(kernels.attention)(*(x.astype(dtype) for x in (q, k, v)), layer, step)
        return np.asarray(out, np.float32)

    exact = run(KERNELS["reference"], jnp.float32)
    got = run(KERNELS[name], jnp.float32 if name in ("cpu", "native") else jnp.bfloat16)
    real = sum(counts)
    return float(np.abs(got[:real] - exact[:real]).max())


def example(
    counts: Sequence[int], before: Sequence[int], pages: np.ndarray, limits: Limits
) -> StepInput:
    """A step of so many tokens of each sequence, after those before, and a little padding."""
    parts, holders = [], lanes.Holders(limits)
    holders.begin()
    for count, start, held in zip(counts, before, pages, strict=True):
        request = Request("", 0.0, [0] * int(start + count), 1, Slo(1.0, 1.0))
        seq = Seq(request, computed=int(start))
        seq.pages = held.tolist()
        lane = holders.lane(seq, int(start + count))
        parts.append(calls.Part(seq, int(start), count, False, lane))
    known = jnp.zeros(lanes.shape(limits), np.int32)
    for fill in holders.fills():
        known = lanes.fill(known, *fill)
    size = sum(counts) + 3, len(counts) + (max(counts) > 1)
    tokens, sequences = map(jnp.asarray, calls.step(parts, *size, limits))
    _, inputs, _ = lanes.unpack(known, tokens, sequences, limits)
    return inputs


def check_golden(names: Sequence[str], device: Any) -> list[dict[str, Any]]:
    """Tokens of each tiny model that are as they should be, up to the first that is not."""
    rows = []
    for name in names:
        for family in FAMILIES:
            for dtype in ("float32", "bfloat16"):
                row = {"kernels": name, "family": family, "dtype": dtype}
                try:
                    same, total = _same(name, family, dtype, device)
                    row |= {
                        "tokens": total,
                        "same": same,
                        "good": dtype != "float32" or same == total,
                    }
                except Exception as error:  # others may do
                    row |= {"good": False, "failed": _words(error)}
                rows.append(row)
    return rows


def _same(name: str, family: str, dtype: str, device: Any) -> tuple[int, int]:
    checkpoint = open_checkpoint(GOLDEN / family)
    limits = Limits(max_batch=1, max_chunk=64, max_context=256, page_size=64, num_pages=8)
    mesh, rules = make_mesh([device]), Rules()
    shapes = Shapes.for_role(Role.BOTH, limits, name)
    params = checkpoint.load(mesh, rules, dtype)
    engine = JaxEngine(checkpoint.config, params, mesh, rules, limits, shapes, dtype, name)
    same = total = 0
    for case in json.loads((GOLDEN / family / "golden.json").read_text())["cases"]:
        seq = Seq(Request("golden", 0.0, case["prompt"], len(case["output"]), Slo(1.0, 1.0)))
        seq.pages = list(range(limits.pages_for(len(case["prompt"]) + len(case["output"]))))
        tokens: list[int] = []
        while len(tokens) < len(case["output"]):
            count = min(seq.remaining, limits.max_chunk)
            made = engine.step([(seq, count)])
            seq.cells[Column.COMPUTED] += count
            if token := made.get("golden"):
                seq.cells[Column.LENGTH] += 1
                seq.tokens.append(token.id)
                tokens.append(token.id)
        pairs = list(zip(tokens, case["output"], strict=True))
        same += next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
        total += len(pairs)
    return same, total


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# Speed.


def check_steps(
    engines: Sequence[JaxEngine], devices: Sequence[Any], config: ServerConfig
) -> dict[str, Any]:
    """Ceilings, and decode and prefill beside them."""
    small = devices[0].platform == "cpu"
    ceilings = roofline.ceilings(*((64, 512) if small else (4096, 8192)))
    most = config.decode.max_batch
    contexts = sorted({min(tokens, config.max_context - 2) for tokens in (200, 1024)})
    points = [(b, c) for c in contexts for b in sorted({1, max(most // 4, 1), most})]
    prompts = sorted({min(tokens, config.prefill.max_chunk) for tokens in (128, 512, 2048)})
    first, last = (
        roofline.prediction(each, config, ceilings) for each in (engines[0], engines[-1])
    )
    return {
        "ceilings": ceilings,
        "decode": [roofline.decode(engines[-1], *point, last) for point in points],
        "prefill": [roofline.prefill(engines[0], tokens, first) for tokens in prompts],
    }


def check_trace(engine: JaxEngine, config: ServerConfig) -> list[dict[str, Any]]:
    """The kernels on which ten decode steps spent most, in microseconds a step."""
    batch, context = config.decode.max_batch, min(1024, config.max_context - 2)
    work = [(roofline.sequence(engine, index, context, 1), 1) for index in range(batch)]
    engine.step(work)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(10):
                engine.step(work)
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    spent: Counter[str] = Counter()
    for plane in data.planes:
        if plane.name.startswith("/device:"):
            for line in plane.lines:
                for event in line.events:
                    spent[event.name] += event.duration_ns
    return [{"kernel": name, "us": round(ns / 1e4, 1)} for name, ns in spent.most_common(20)]


def check_profile(
    engines: Sequence[JaxEngine], config: ServerConfig, progress: Any
) -> dict[str, Any]:
    """The measured profile, and what `kairos plan` says of the same steps."""
    profile = profiling.measure(engines, config, config.model, progress)
    told: dict[str, Any] = {"profile": profile}
    if config.chip:
        chip, cost = CHIPS[config.chip], CostModel.from_profile(profile)
        model = engines[0].config
        for role, steps in ((config.roles[0], "prefill"), (config.roles[-1], "decode")):
            ahead = Prediction(model, config, needs_of(config, model, role, chip), chip, Shares())
            told[steps] = (
                [(n, cost.prefill_s(n), ahead.prefill_s(n)) for n in (512, 2048)]
                if steps == "prefill"
                else [(b, cost.decode_s([1024] * b), ahead.decode_s(b, 1024)) for b in (1, 64)]
            )
    return told


def check_serving(
    engines: Sequence[JaxEngine],
    config: ServerConfig,
    cost: CostModel,
    seconds: float,
    progress: Any,
) -> dict[str, Any]:
    """Attainments, live beside simulated, at eight tenths of the knee."""
    scenario = scenario_of(config, cost)
    longest = config.max_context // 4
    made = fit_lengths(synthetic(20000, 1.0, 0), config.max_context - longest, longest)
    rate = 0.8 * find_knee(scenario, made[:500])
    arrivals = rescale(made[: max(round(rate * seconds), 2)], rate)
    live = Live(config, engines, cost, engines[0].config.vocab_size)
    served = serve(live, arrivals, [config.default_slo] * len(arrivals), 0, progress)
    return {"rate": rate, "num_requests": len(arrivals), "live": attained(served.outcomes)}


def main(argv: list[str]) -> int:
    """Returns the exit code: 1 if a part failed or a result is wrong."""
    values = flags.FLAGS
    config = launch.read_config()
    output = Path(values.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    devices = start_jax(config.num_devices, values.cpu_devices)
    platform = devices[0].platform
    told: dict[str, Any] = where() | {"platform": platform, "device": devices[0].device_kind}
    names, bad = names_for(config, devices[:1]), []

    def part(name: str, run: Callable[[], Any]) -> Any:
        begun = time.monotonic()
        say(name)
        try:
            result = run()
        except Exception as error:  # the others go on
            result = None
            told[name] = {"failed": _words(error)}
            bad.append(f"{name}: {_words(error)}")
        else:
            told[name] = result
        told[name + "_took_s"] = round(time.monotonic() - begun, 1)
        output.write_text(json.dumps(told, indent=1, default=str) + "\n")
        return result

    for name, rows in (
        ("kernels", part("kernels", lambda: check_kernels(names)) or []),
        ("golden", part("golden", lambda: check_golden(names, devices[0])) or []),
    ):
        wrong = [row for row in rows if not row["good"]]
        bad += [f"{name}: {json.dumps(row)}" for row in wrong]
        print(f"{name}: {len(rows) - len(wrong)} of {len(rows)} good", flush=True)
    shape = SHAPES[values.model_shape] if values.model_shape else shape_of(config.model)
    if shape is None:
        shape = open_checkpoint(config.model).config
    with bars() as progress:
        model = Model(roofline.RandomCheckpoint(shape), None)
        engines = part("compile", lambda: build_engines(config, model, devices, progress))
        if engines:
            told["compile"] = f"{sum(len(list(each.shapes)) for each in engines)} steps"
        if engines:
            steps = part("steps", lambda: check_steps(engines, devices, config))
            part("trace", lambda: check_trace(engines[-1], config))
            measured = part("profile", lambda: check_profile(engines, config, progress))
            if measured:
                cost = CostModel.from_profile(measured["profile"])
                seconds = values.seconds
                part("serving", lambda: check_serving(engines, config, cost, seconds, progress))
            if steps:
                show_steps(steps)
    for name in ("trace", "serving"):
        if name in told:
            print(f"\n{name}\n{json.dumps(told[name], indent=1, default=str)}")
    print(f"\n{output}", *bad, sep="\n")
    return int(bool(bad))


def show_steps(steps: dict[str, Any]) -> None:
    """As a table."""
    rows = [(f"decode {row['batch']} x {row['context']}", row) for row in steps["decode"]] + [
        (f"prefill {row['tokens']}", row) for row in steps["prefill"]
    ]
    cells = [
        [
            name,
            *(f"{row[key]['median']:.4g}" for key in ("engine_ms", "device_ms")),
            f"{row['limit_ms']:.4g}",
            f"{row['device_share']:.0%}",
        ]
        for name, row in rows
    ]
    print("\n" + table(["step", "engine ms", "device ms", "limit ms", "of limit"], cells))


def define_flags() -> None:
    """All flags, the config's among them."""
    launch.define_config_flag()
    flags.DEFINE_enum("model_shape", None, list(SHAPES), "Sizes, instead of the model's.")
    flags.DEFINE_float("seconds", 300.0, "Of serving.", 1.0)
    flags.DEFINE_integer("rounds", 5, "Measurements of each step.", 1)
    flags.DEFINE_string("output", "out/accelerator.json", "File for every figure.")


if __name__ == "__main__":
    define_flags()
    launch.run(main)
