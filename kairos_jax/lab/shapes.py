"""The sizes of well-known models, to reckon with where their files are not at hand."""

from models.config import ModelConfig
from models.rope import RopeScaling

SHAPES = {
    "tiny": ModelConfig("llama", 512, 64, 2, 4, 2, 16, 128, tie_embeddings=True),
    "smollm2_135m": ModelConfig(
        *("llama", 49152, 576, 30, 9, 3, 64, 1536), 1e5, tie_embeddings=True, max_context=8192
    ),
    "llama3_8b": ModelConfig(
        *("llama", 128256, 4096, 32, 32, 8, 128, 14336),
        5e5,
        rope_scaling=RopeScaling("llama3", 8.0),
        max_context=131072,
    ),
}
# Gated or large ones, by the names that configs give them.
_OF_MODELS = {"meta-llama/Llama-3.1-8B-Instruct": "llama3_8b"}


def shape_of(model: str) -> ModelConfig | None:
    """The sizes of a model that is known by this name or hub id."""
    return SHAPES.get(_OF_MODELS.get(model, model))
