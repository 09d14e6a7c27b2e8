"""What a model is: its family, sizes, rope and special tokens. `models.checkpoint` reads it from
files.
"""

import math
from dataclasses import dataclass

from models.families import FAMILIES
from models.rope import RopeScaling

# Far beyond any model: a damaged file that asks for more would keep the loader busy for hours.
_MOST_LAYERS = 1024


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer of the Llama kind. Hashable, so jit can key on it.

    name: the family, a Hugging Face `model_type`. max_context: positions, prompt and output
    together. sliding_window: tokens that some or all layers look back on; None if all layers look
    back on all tokens. Attention is computed over all tokens either way: see `exact_context`.
    eos_token_ids: any of these ends the output.
    """

    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    max_context: int = 2048
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self):
        if self.name not in FAMILIES:
            raise ValueError(f"config.name must be one of {tuple(FAMILIES)}, got {self.name!r}")
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads")
        for field in (*sizes, "head_dim", "mlp_size", "max_context"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise ValueError(f"config.{field} must be an integer of at least 1, got {value!r}")
        if self.num_layers > _MOST_LAYERS:
            raise ValueError(
                f"config.num_layers must be at most {_MOST_LAYERS}, got {self.num_layers}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config.num_heads must be a multiple of num_kv_heads {self.num_kv_heads}, "
                f"got {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config.head_dim must be even for rope, got {self.head_dim}")
        for field in ("rope_theta", "norm_eps"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"config.{field} must be a positive number, got {value}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"config.sliding_window must be at least 1 or None, got {self.sliding_window}"
            )
        bos = () if self.bos_token_id is None else (self.bos_token_id,)
        for field, ids in (("eos_token_ids", self.eos_token_ids), ("bos_token_id", bos)):
            for id in ids:
                if not 0 <= id < self.vocab_size:
                    raise ValueError(
                        f"config.{field} must be below vocab_size {self.vocab_size}, got {id}"
                    )

    @property
    def exact_context(self) -> int:
        """The longest context in which attention over all tokens is what the model asks for.

        A window of W tokens includes the token itself, so that W tokens all see each other.
        """
        return min(self.max_context, self.sliding_window or self.max_context)
