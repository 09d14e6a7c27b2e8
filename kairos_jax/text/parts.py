"""What the files of a model say about its tokenizer and its chats."""

from collections.abc import Mapping
from dataclasses import dataclass

import tokenizers

# The special tokens that chat templates know by these names.
NAMED_TOKENS = frozenset(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)


@dataclass(frozen=True)
class Parts:
    """The parts of a `Tokenizer`, which says what each is. templates: the default one, too."""

    backend: tokenizers.Tokenizer
    eos_ids: frozenset[int]
    special_tokens: Mapping[str, str]
    templates: Mapping[str, str]
