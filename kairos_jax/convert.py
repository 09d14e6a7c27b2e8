"""Turns any model that we read into a sharded Orbax checkpoint with its tokenizer beside it.

  kairos convert --source=smollm2-135m-instruct --output=checkpoints/smollm2

Every binary takes the result as --model, on a mesh of any shape. --format=hugging_face writes what
other programs read, such as benchmarks that count tokens themselves: config.json,
model.safetensors and the tokenizer, as `transformers` has them.
"""

from pathlib import Path

import jax
from absl import flags

from kairos_jax.config import DTYPES
from kairos_jax.engine.devices import start_jax
from kairos_jax.process import command, launch
from kairos_jax.process.hub import resolve_model
from kairos_jax.process.outputs import folder_to_write
from kairos_jax.process.progress import Progress, bars
from kairos_jax.text.tokenizer import load_tokenizer
from models.checkpoint import open_checkpoint, save_hugging_face, save_orbax
from models.sharding import Rules, make_mesh

_FORMATS = {"orbax": save_orbax, "hugging_face": save_hugging_face}


def convert(source: str, output: Path, dtype: str, form: str, progress: Progress) -> str:
    """Converts and says what was written. Raises UsageError or ModelNotAvailable."""
    folder_to_write("output", output)
    if any(output.iterdir()):
        raise command.UsageError(f"--output={output} is not empty")
    path = resolve_model(source)
    progress("load weights", 0, 1)
    try:
        checkpoint = open_checkpoint(path)
        params = checkpoint.load(make_mesh(jax.devices()), Rules(), dtype)
    except ValueError as error:
        raise command.UsageError(str(error)) from error
    progress("load weights", 1, 1)
    progress("write weights", 0, 1)
    _FORMATS[form](output, checkpoint.config, params)
    progress("write weights", 1, 1)
    try:
        load_tokenizer(checkpoint.path).save(output)
    except FileNotFoundError:
        return f"wrote {output}: {len(params)} weights, no tokenizer (the source has none)"
    return f"wrote {output}: {len(params)} weights and the tokenizer"


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    if not flags.FLAGS.source or not flags.FLAGS.output:
        raise command.UsageError("--source and --output are both needed")
    start_jax(1)
    values = flags.FLAGS
    with bars() as progress:
        told = convert(values.source, Path(values.output), values.dtype, values.format, progress)
    print(told)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("source", None, "Path, hub id or name of a model.")
    flags.DEFINE_string("output", None, "Directory to write; it must be empty or new.")
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Dtype of the written weights.")
    flags.DEFINE_enum("format", "orbax", list(_FORMATS), "Format to write.")
    launch.run(main, positional="source")
