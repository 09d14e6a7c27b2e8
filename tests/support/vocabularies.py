"""Small tokenizers of the kinds that models come with."""

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from kairos_jax.text.tokenizer import Tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def bpe(
    tokens: Iterable[str], merges: Sequence[tuple[str, str]] = (), **options
) -> tokenizers.Tokenizer:
    vocab = {token: id for id, token in enumerate(tokens)}
    return tokenizers.Tokenizer(models.BPE(vocab, list(merges), **options))


def byte_level(alphabet: Sequence[str] = ALPHABET, normalizer=None, **added) -> Tokenizer:
    """Like GPT-2: each byte is a character. added: of one special token."""
    backend = bpe([*alphabet, "hi", "Ġhi", "Ã©"], [("h", "i"), ("Ġ", "hi"), ("Ã", "©")])
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if added:
        backend.add_special_tokens([tokenizers.AddedToken(**added)])
    return Tokenizer(backend)


def sentencepiece(words: Sequence[str] = ("a", "b"), fallback: Sequence[str] = BYTES) -> Tokenizer:
    """Like Llama 2: a space in front of the text and of words; unknown characters as bytes.

    Ids 0, 1 and 2 are special: </s>, <s> and <turn>. words: of one or two characters.
    """
    letters = sorted(set("".join(words)))
    pairs = [(word[0], word[1]) for word in words if len(word) == 2]
    merges = [*pairs, *(("▁", word) for word in words), ("▁", "▁")]
    tokens = ["</s>", "<s>", "<turn>", "▁", *letters, *map("".join, merges), *fallback]
    byte_fallback = len(fallback) == 256
    backend = bpe(dict.fromkeys(tokens), merges, byte_fallback=byte_fallback)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["</s>", "<s>", "<turn>"])
    return Tokenizer(backend, frozenset({0}))


def metaspace() -> Tokenizer:
    """Like SentencePiece's newer files: the pre-tokenizer and the decoder see to the spaces."""
    backend = bpe(["▁", "a", "▁a", *BYTES], [("▁", "a")], unk_token="a", byte_fallback=True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend)


def plain(normalizer=None, splits=None, tokens=("a", "b", " "), **options) -> Tokenizer:
    """Characters and nothing else."""
    backend = bpe(tokens, **options)
    backend.normalizer, backend.pre_tokenizer = normalizer, splits
    return Tokenizer(backend)
