"""Explains the keys of a config, or prints the values of one.

kairos config
kairos config --config=smollm2_135m_cpu --config.slo.ttft=1
kairos config llama3_8b:gpu4 --dump_config=mine.py
"""

import shutil

from absl import flags

from kairos_jax.config import files, keys
from kairos_jax.process import launch
from kairos_jax.process.usage import say


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    if flags.FLAGS.output == "markdown":
        say(keys.markdown().removesuffix("\n"))
    elif launch.has_config():
        config = launch.read_config()
        say(files.as_text(config, f"{config.layout}, {config.dtype}.").removesuffix("\n"))
    else:
        width = shutil.get_terminal_size().columns
        say(f"{keys.plain(width)}\n\nPackaged configs: {', '.join(files.packaged())}")
    return 0


if __name__ == "__main__":
    launch.define_config_flag()
    flags.DEFINE_enum("output", None, ["markdown"], "Print the keys as a table in Markdown.")
    launch.run(main, positional="config")
