"""Measures the jitted steps and fits the profile that policies, simulator and reports use.

kairos profile --config=smollm2_135m_cpu --output=profile.json
"""

from absl import flags

from kairos_jax.engine import configure
from kairos_jax.engine.build import build_engines
from kairos_jax.engine.devices import start_jax
from kairos_jax.engine.model import open_model
from kairos_jax.engine.profiling import fit_line, measure, write
from kairos_jax.process import launch
from kairos_jax.process.outputs import file_to_write, folder_to_write
from kairos_jax.process.progress import bars


def main(argv: list[str]) -> int:
    """Measures and writes. Returns the exit code."""
    config, output = configure.read_config(), file_to_write("output", flags.FLAGS.output)
    folder_to_write("output", output.parent)  # a file beside it takes its place
    devices = start_jax(config.num_devices, flags.FLAGS.cpu_devices)
    with bars() as progress:
        model = open_model(config)
        engines = build_engines(config, model, devices, progress)
        profile = measure(engines, config, config.model, progress)
    write(profile, output)
    print(f"wrote {output}: {fit_line(profile)}")
    return 0


if __name__ == "__main__":
    launch.define_config_flag()
    flags.DEFINE_string("output", "profile.json", "File to write.")
    launch.run(main)
