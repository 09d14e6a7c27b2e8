"""Reads a model from disk into its shardings, from a Hugging Face, GGUF or Orbax checkpoint."""

from pathlib import Path
from typing import Protocol

from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models.checkpoint import files, gguf, gguf_parts, huggingface, orbax, safetensors_files
from models.checkpoint.huggingface import save_hugging_face
from models.checkpoint.orbax import save_orbax
from models.config import ModelConfig
from models.sharding import Rules

__all__ = ["Checkpoint", "open_checkpoint", "save_hugging_face", "save_orbax"]


class Checkpoint(Protocol):
    """A model on disk whose description has been read and whose weights have not."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def path(self) -> Path: ...

    def load(self, mesh: Mesh, rules: Rules, dtype: DTypeLike) -> dict[str, Array]:
        """The weights by path, cast to `dtype`, each in the sharding that the rules give it.

        Raises:
            ValueError: weights are missing, unknown, of another shape, or cannot be read.
        """
        ...


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a .gguf file, a directory with one model in .gguf files, or a Hugging Face or Orbax
    directory.

    path: of a model in several .gguf files, the directory or the first of them.

    Raises:
        ValueError: nothing is there, or it is none of the three, or it cannot be read.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise ValueError(f"checkpoint {path}: no such file or directory")
        return _open_directory(path) if path.is_dir() else gguf.open_gguf(path)
    except OSError as error:
        raise files.unreadable(path, error) from None


def _open_directory(path: Path) -> Checkpoint:
    if (path / orbax.WEIGHTS).exists():
        return orbax.open_orbax(path)
    if any(path.glob("*.safetensors")) or (path / safetensors_files.INDEX).exists():
        return huggingface.open_hugging_face(path)
    models = gguf_parts.models_in(path)
    if len(models) == 1:
        return gguf.open_gguf(models[0])
    raise ValueError(
        f"checkpoint {path}: expected *.safetensors, one model in *.gguf or an Orbax "
        f"{orbax.WEIGHTS!r} directory, found {sorted(entry.name for entry in path.iterdir())[:20]}"
    )
