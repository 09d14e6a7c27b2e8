"""Measures the jitted steps and fits the profile that policies, simulator and reports use.

kairos profile --config=smollm2_135m_cpu --output=profile.json
"""

from pathlib import Path

from absl import flags

from kairos_jax.engine import configure
from kairos_jax.engine.build import build_engines
from kairos_jax.engine.devices import start_jax
from kairos_jax.engine.model import open_model
from kairos_jax.engine.profiling import fit_line, measure, write
from kairos_jax.process import launch
from kairos_jax.process.progress import bars


def main(argv: list[str]) -> int:
    """Measures and writes. Returns the exit code."""
    config = configure.read_config()
    devices = start_jax(config.num_devices, flags.FLAGS.cpu_devices)
    model = open_model(config)
    with bars() as progress:
        engines = build_engines(config, model, devices, progress)
        profile = measure(engines, config, config.model, progress)
    output = Path(flags.FLAGS.output)
    write(profile, output)
    print(f"wrote {output}: {fit_line(profile)}")
    return 0


if __name__ == "__main__":
    launch.define_config_flag()
    flags.DEFINE_string("output", "profile.json", "File to write.")
    launch.run(main)
