"""Reads a model from disk into its shardings: Hugging Face, GGUF or Orbax, told by content."""

from pathlib import Path
from typing import Protocol

from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models.checkpoint import gguf, huggingface, orbax
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
    """Opens a .gguf file, a directory that holds just one, or a Hugging Face or Orbax directory.

    Raises:
        ValueError: nothing is there, or it is none of the three, or it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"checkpoint {path}: no such file or directory")
    if path.is_file():
        return gguf.open_gguf(path)
    if (path / orbax.WEIGHTS).exists():
        return orbax.open_orbax(path)
    if any(path.glob("*.safetensors")) or (path / huggingface.INDEX).exists():
        return huggingface.open_hugging_face(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return gguf.open_gguf(files[0])
    raise ValueError(
        f"checkpoint {path}: expected *.safetensors, one *.gguf or an Orbax {orbax.WEIGHTS!r} "
        f"directory, found {sorted(entry.name for entry in path.iterdir())[:20]}"
    )
