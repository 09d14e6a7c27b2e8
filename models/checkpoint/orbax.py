"""Orbax checkpoints: sharded weights under weights/, and config.json in Hugging Face's form.

Orbax is imported when it is first needed: that takes as long as a sixth of the server's imports.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models.checkpoint import source
from models.checkpoint.files import read_json
from models.checkpoint.huggingface import read_config
from models.checkpoint.huggingface_config import to_hugging_face
from models.config import ModelConfig
from models.params import abstract_params
from models.sharding import Rules

WEIGHTS = "weights"


@dataclass(frozen=True)
class OrbaxCheckpoint:
    """A directory that `save_orbax` wrote."""

    path: Path
    config: ModelConfig

    def load(self, mesh: Mesh, rules: Rules, dtype: DTypeLike) -> dict[str, Array]:
        """See `Checkpoint.load`. The mesh need not be the one that the weights were saved from."""
        abstract = abstract_params(self.config, dtype, mesh, rules)
        directory = (self.path / WEIGHTS).absolute()
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            stored = self._metadata(checkpointer, directory)
            source.check_keys(str(self.path), stored, abstract)
            for path, leaf in abstract.items():
                source.check_shape(str(self.path), path, stored[path].shape, leaf.shape)
            try:
                return checkpointer.restore(directory, abstract)
            except Exception as error:
                raise self._unreadable(error) from error

    def _metadata(self, checkpointer: Any, directory: Path) -> dict:
        try:
            metadata: Any = checkpointer.metadata(directory).item_metadata
            return dict(metadata)
        except Exception as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> ValueError:
        # Orbax and TensorStore have no error type of their own for a damaged checkpoint.
        return ValueError(f"checkpoint {self.path}: incomplete or damaged ({error})")


def open_orbax(path: Path) -> OrbaxCheckpoint:
    """Reads the config of a directory; ValueError if that cannot be read."""
    return OrbaxCheckpoint(path, read_config(path, read_json(path / "config.json")))


def save_orbax(directory: str | Path, config: ModelConfig, params: Mapping[str, Array]) -> None:
    """Writes weights, each device its own part, and config.json. Waits until all is on disk.

    Raises:
        ValueError: the directory holds a checkpoint already.
    """
    directory = Path(directory).absolute()
    if (directory / WEIGHTS).exists():
        raise ValueError(f"checkpoint {directory}: holds weights already")
    directory.mkdir(parents=True, exist_ok=True)
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / WEIGHTS, dict(params))
        checkpointer.wait_until_finished()
    if jax.process_index() == 0:
        text = json.dumps(to_hugging_face(config), indent=2)
        (directory / "config.json").write_text(text + "\n", encoding="utf-8")
