"""Compiles the programs of the packaged configs for their chips, which need not be here.

  python benchmarks/aot.py [--configs=llama3_8b:gpu1,...] [--output=out/aot/programs.json]
  python benchmarks/aot.py --configs=llama3_8b:v5e8 --cold

The compilers are installed once, in out/aot, beside this environment and not in it: libtpu for
TPUs, JAX's CUDA plugin for GPUs. Each config has a process of its own, two at a time. Every program
of every config is compiled and looked at (kairos_jax.lab.ahead): the largest steps and what moves
pages with all layers, the other sizes with two. A program that does what it should not is named,
and the exit code is 1, unless what it does is known.

With --cold nothing is looked at: all programs are compiled with all layers, as many at once as
there are cores, as a server does that starts for the first time, and the time of each role is told.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "out/aot"
# The one that takes longest first. gpu4 and gpu8 have instances with the programs of gpu1.
CONFIGS = ("llama3_8b:v6e8", "llama3_8b:v5e8", "llama3_8b:gpu1")
AT_ONCE = 2  # processes; XLA compiles mostly on one thread


def compiler(platform: str) -> Path:
    """The folder with a platform's compiler, for PYTHONPATH; installed if it is not there."""
    if platform == "tpu":
        asked = [each for each in metadata.requires("jax") or () if each.startswith("libtpu")]
        packages = [asked[0].partition(";")[0]]
    else:
        version = metadata.version("jax")
        packages = [f"{name}=={version}" for name in ("jax-cuda12-plugin", "jax-cuda12-pjrt")]
    folder = FOLDER / f"{platform}-{metadata.version('jax')}"
    if not (folder / "installed").exists():
        target = ["--no-deps", "--target", str(folder), *packages]
        install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", *target]
        subprocess.run(install, check=True)
        (folder / "installed").touch()
    return folder


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--output", default=str(FOLDER / "programs.json"))
    parser.add_argument("--only", default="", help="the config that this process compiles")
    parser.add_argument("--cold", action="store_true", help="time the compilation of a cold start")
    values = parser.parse_args()
    if values.only and values.cold:
        return start_cold(values.only)
    if values.only:
        return compile_all(values.only, Path(values.output))
    begun = time.monotonic()
    names = values.configs.split(",")
    folders = {platform: compiler(platform) for platform in {platform_of(name) for name in names}}
    if values.cold:
        return max(run_apart(name, folders[platform_of(name)], "--cold") for name in names)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        parts = list(pool.map(lambda name: compile_apart(name, folders[platform_of(name)]), names))
    if not all(parts):
        return 1
    rows = [row for part in parts for row in part]
    told = {
        "date": time.strftime("%Y-%m-%d"),
        "jax": metadata.version("jax"),
        "seconds": round(time.monotonic() - begun),
        "programs": rows,
    }
    Path(values.output).write_text(json.dumps(told, indent=1) + "\n")
    wrong = [each for each in rows if each["faults"]]
    print(f"{len(rows)} programs in {told['seconds']} s: {values.output}")
    for each in wrong:
        print(f"{each['config']} {each['role']} {each['name']}: {'; '.join(each['faults'])}")
    return int(bool(wrong))


def read(name: str) -> tuple:
    """A config, and its chip."""
    from kairos_jax.config import ServerConfig, files
    from kairos_jax.config.chips import CHIPS

    config = ServerConfig.from_dict(files.read_file(name))
    return config, CHIPS[config.chip]


def platform_of(name: str) -> str:
    """tpu or gpu, of a config."""
    return read(name)[1].platform


def run_apart(name: str, compilers: Path, *arguments: str) -> int:
    """Runs this file for a config in a process of its own. Prints what it says as a whole: another
    may run at the same time. Returns its exit code.
    """
    here = os.environ | {"PYTHONPATH": str(compilers), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, f"--only={name}", *arguments]
    done = subprocess.run(command, env=here, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    print(done.stdout.decode(), end="", flush=True)
    if done.returncode:
        print(f"{name}: the compilation ended with code {done.returncode}", flush=True)
    return done.returncode


def compile_apart(name: str, compilers: Path) -> list[dict]:
    """The rows of a config; none if its process fails."""
    part = FOLDER / f"{name.replace(':', '-')}.json"
    failed = run_apart(name, compilers, f"--output={part}")
    return [] if failed else json.loads(part.read_text())


def compile_all(name: str, output: Path) -> int:
    """The programs of a config."""
    from kairos_jax.lab import topology

    topology.prepare()
    from rich.console import Console

    from kairos_jax import plan
    from kairos_jax.lab.planning import needs_of

    config, chip = read(name)
    model = plan.model_of(config)
    needs = {role: needs_of(config, model, role, chip) for role in dict.fromkeys(config.roles)}
    built = plan.compiled(config, model, chip, needs)
    console = Console(width=140)
    console.print(f"{name} on {chip.title}", highlight=False)
    plan.show_memory(console, config, chip, list(needs.values()), known=True)
    plan.show_programs(console, [each for of_role in built.values() for each in of_role])
    rows = [row_of(name, needs[role], chip, each) for role in built for each in built[role]]
    output.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def start_cold(name: str) -> int:
    """Compiles what the servers of a config compile when they start."""
    from kairos_jax.lab import topology

    topology.prepare()
    from kairos_jax import plan
    from kairos_jax.engine.calls import Score
    from kairos_jax.lab import ahead
    from kairos_jax.lab.planning import kernels_of
    from kairos_jax.process.parallel import parallel

    config, chip = read(name)
    model = plan.model_of(config)
    for role in dict.fromkeys(config.roles):
        devices = topology.describe(chip, config.devices(role))
        kernels = kernels_of(config, chip)
        functions = ahead.functions_of(config, model, role, devices, kernels)
        jobs = [
            functools.partial(lambda function, given: function.lower(*given).compile(), *program)
            for call, _, *program in functions.described()
            if not isinstance(call, Score)  # compiled when it is first asked for
        ]
        begun = time.monotonic()
        parallel(jobs[::-1], os.cpu_count())
        took = time.monotonic() - begun
        print(f"{name} {role.value}: {len(jobs)} programs in {took:.0f} s", flush=True)
    return 0


def row_of(config, needs, chip, built) -> dict:
    """Of a program, what is kept."""
    peak = built.memory.peak + needs.parked
    if peak > chip.memory:
        built.faults.append(f"{peak / 1e9:.1f} GB with parked KV, of {chip.memory / 1e9:.1f}")
    return {
        "config": config,
        "role": needs.role.value,
        "name": built.name,
        "devices": needs.devices,
        "layers": built.layers,
        "seconds": round(built.lower_s + built.compile_s, 1),
        "temporaries": built.memory.temporaries,
        "peak": built.memory.peak,
        "free": chip.memory - peak,
        "operations": built.program.operations,
        "moved": built.moved,
        "cycles": built.program.cycles,
        "collectives": dict(built.program.collectives),
        "kernels": dict(built.program.custom_calls),
        "faults": built.faults,
        "known": built.known,
    }


if __name__ == "__main__":
    sys.exit(main())
