"""Compiles the programs of the packaged configs for their chips, which need not be here.

  python benchmarks/aot.py [--configs=llama3_8b:gpu1,...] [--output=out/aot/programs.json]

The compilers are installed once, in out/aot, beside this environment and not in it: libtpu for
TPUs, JAX's CUDA plugin for GPUs. Each has a process of its own. Every program of every config is
compiled and looked at (kairos_jax.lab.ahead): the largest steps and what moves pages with all
layers, the other sizes with two. A program that does what it should not is named, and the exit code
is 1, unless what it does is known.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "out/aot"
CONFIGS = ("llama3_8b:gpu1", "llama3_8b:gpu4", "llama3_8b:v5e8", "llama3_8b:v6e8")


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
    parser.add_argument("--platform", default="", help="the one that this process compiles for")
    values = parser.parse_args()
    if values.platform:
        return compile_all(values.platform, values.configs.split(","), Path(values.output))
    begun, rows, running = time.monotonic(), [], {}
    for platform in ("tpu", "gpu"):  # at the same time: XLA compiles mostly on one thread
        here = os.environ | {"PYTHONPATH": str(compiler(platform)), "PYTHONWARNINGS": "ignore"}
        part = FOLDER / f"{platform}.json"
        arguments = [f"--configs={values.configs}", f"--output={part}", f"--platform={platform}"]
        command = [sys.executable, __file__, *arguments]
        running[part] = subprocess.Popen(command, env=here, stderr=subprocess.DEVNULL)
    for part, process in running.items():
        if process.wait():
            print(f"{part.stem}: the compilation ended with code {process.returncode}")
            return 1
        rows += json.loads(part.read_text())
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


def compile_all(platform: str, names: list[str], output: Path) -> int:
    """The programs of the configs that are for a platform; each once, however many have it."""
    from kairos_jax.lab import topology

    topology.prepare()
    from rich.console import Console

    from kairos_jax import plan
    from kairos_jax.config import ServerConfig, files
    from kairos_jax.config.chips import CHIPS
    from kairos_jax.lab.planning import needs_of

    console, seen, rows = Console(width=140), set(), []
    for name in names:
        config = ServerConfig.from_dict(files.read_file(name))
        chip = CHIPS[config.chip]
        if chip.platform != platform:
            continue
        model = plan.model_of(config)
        needs = {role: needs_of(config, model, role, chip) for role in dict.fromkeys(config.roles)}
        for role in list(needs):
            key = (chip.name, role, config.devices(role), config.limits(role))
            if key in seen:
                del needs[role]
            seen.add(key)
        built = plan.compiled(config, model, chip, needs)
        console.print(f"{name} on {chip.title}", highlight=False)
        plan.show_memory(console, config, chip, list(needs.values()), known=True)
        plan.show_programs(console, [each for of_role in built.values() for each in of_role])
        for role, programs in built.items():
            rows += [row_of(name, needs[role], chip, each) for each in programs]
    output.write_text(json.dumps(rows, indent=1) + "\n")
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
        "bytes_accessed": built.bytes_accessed,
        "cycles": built.program.cycles,
        "collectives": dict(built.program.collectives),
        "kernels": dict(built.program.custom_calls),
        "faults": built.faults,
        "known": built.known,
    }


if __name__ == "__main__":
    sys.exit(main())
