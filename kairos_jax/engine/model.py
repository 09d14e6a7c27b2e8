"""The model of a config: its description, its weights' files and its tokenizer."""

from dataclasses import dataclass

from kairos_jax.config import ServerConfig
from kairos_jax.process.command import UsageError
from kairos_jax.process.hub import resolve_model
from kairos_jax.text.tokenizer import Tokenizer, load_tokenizer
from models.checkpoint import Checkpoint, open_checkpoint
from models.checkpoint.gguf import GgufCheckpoint


@dataclass(frozen=True, slots=True)
class Model:
    """A model on disk. tokenizer: None if it came without one."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer | None

    @property
    def eos_ids(self) -> frozenset[int]:
        ids = frozenset(self.checkpoint.config.eos_token_ids)
        return ids | self.tokenizer.eos_ids if self.tokenizer else ids


def open_model(config: ServerConfig) -> Model:
    """Finds the model and reads its description.

    Raises:
        ModelNotAvailable, UsageError: it is not to be had, or cannot be served so.
    """
    path = resolve_model(config.model)
    try:
        checkpoint = open_checkpoint(path)
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        fields = checkpoint.fields if isinstance(checkpoint, GgufCheckpoint) else None
        tokenizer = load_tokenizer(checkpoint.path, fields)
    except FileNotFoundError:
        tokenizer = None
    except ValueError as error:
        raise UsageError(str(error)) from error
    model, limit = checkpoint.config, checkpoint.config.exact_context
    if config.max_context > limit:
        why = "" if limit == model.max_context else ", the sliding window of its attention"
        raise UsageError(
            f"config.max_context must be at most the model's {limit}{why}, got {config.max_context}"
        )
    return Model(checkpoint, tokenizer)
