"""The bytes that tokens stand for, and how few tokens a text can become."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import models

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")

# How far a normalizer can shrink a text, in UTF-8 bytes. Unicode normal forms: U+1D6D6 with two
# marks, 8 bytes, becomes U+03B0, 2 bytes; no code point shrinks further. Lowercase: U+212A, 3
# bytes, becomes k. Strip removes nothing but whitespace. Other normalizers have no limit.
_SHRINKS = {
    **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD"), 4),
    "Lowercase": 3,
    **dict.fromkeys(("ByteLevel", "Prepend", "Strip"), 1),
}
# Steps that remove whitespace; pre-tokenizers that remove nothing, or only where they are told to.
_REMOVE_WHITESPACE = {"Strip", "Whitespace", "WhitespaceSplit"}
_REMOVE_NOTHING = {"ByteLevel", "Digits", "FixedLength", "Metaspace", "UnicodeScripts"}
_REMOVE_WHERE_TOLD = {"Punctuation", "Split"}

_WHITESPACE = bytes(
    sorted({byte for code in range(0x3001) if chr(code).isspace() for byte in chr(code).encode()})
)
_NOT_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    A byte that Latin-1 shows as a visible character is that character. The other bytes are the
    characters from U+0100 on, in order.
    """
    visible = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


@dataclass(frozen=True)
class Spelling:
    """How a vocabulary writes the bytes of its tokens.

    Attributes:
      byte_level: each character stands for one byte.
      byte_fallback: tokens such as <0x0A> stand for one byte.
      replaced: what decoding replaces, and by what, such as "▁" by a space.
    """

    byte_level: bool
    byte_fallback: bool
    replaced: tuple[tuple[str, str], ...]

    def bytes_of(self, token: str) -> bytes:
        """The bytes that a token of the model stands for."""
        if self.byte_level and all(char in _ALPHABET for char in token):
            return bytes(_ALPHABET[char] for char in token)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self.replaced:
            token = token.replace(old, new)
        return token.encode()


def spelling_of(backend: tokenizers.Tokenizer) -> Spelling:
    """Reads the spelling from a tokenizer's decoder."""
    types, replaced = set(), []
    for step in _steps(backend.decoder):
        types.add(step["type"])
        if step["type"] == "Metaspace":
            replaced.append((step["replacement"], " "))
        elif step["type"] == "Replace" and (old := step["pattern"].get("String")):
            replaced.append((old, step["content"]))
    return Spelling("ByteLevel" in types, "ByteFallback" in types, tuple(replaced))


@dataclass(frozen=True)
class Bound:
    """A lower bound on the tokens of a text.

    Attributes:
      longest: the most UTF-8 bytes that one token stands for. `free` bytes do not count.
      free: bytes of which any number may become one token, or none.
    """

    longest: int
    free: bytes

    def least_tokens(self, text: str) -> int:
        """Tokens that `text` becomes at least."""
        # Lone surrogates are no text, which the tokenizer says better.
        counted = len(text.encode(errors="replace").translate(None, self.free))
        return -(-counted // self.longest)


def bound_of(backend: tokenizers.Tokenizer) -> Bound | None:
    """The bound on the tokens of a text; None where a text of any length may become one token."""
    normalizers, splits = list(_steps(backend.normalizer)), list(_steps(backend.pre_tokenizer))
    shrinks = 1
    for step in normalizers:
        shrinks *= _shrinks(step)
    if shrinks == 0 or not all(map(_is_harmless, splits)):
        return None
    added = backend.get_added_tokens_decoder().values()
    byte_level = any(step["type"] == "ByteLevel" for step in [*splits, *normalizers])
    vocabulary = backend.get_vocab(with_added_tokens=False)
    free = _unknown_bytes(backend.model, vocabulary, byte_level)
    if free is None:
        return None
    removes = any(step["type"] in _REMOVE_WHITESPACE for step in [*splits, *normalizers])
    if removes or any(token.lstrip or token.rstrip for token in added):
        free |= set(_WHITESPACE)
    if free and shrinks > 1:  # a character that counts may become one that does not
        return None
    lengths = map(len, vocabulary) if byte_level else (len(token.encode()) for token in vocabulary)
    # An unknown character has up to 4 bytes.
    longest = max(4, *lengths, *(len(token.content.encode()) for token in added))
    return Bound(shrinks * longest, bytes(sorted(free)))


def _shrinks(step: Mapping[str, Any]) -> int:
    """How far a normalizer shrinks a text at most; 0: there is no limit."""
    if step["type"] != "Replace":
        return _SHRINKS.get(step["type"], 0)
    old, new = step["pattern"].get("String"), step["content"]
    if not old or not new:  # a regular expression, or one that removes
        return 0
    return max(1, -(-len(old.encode()) // len(new.encode())))


def _is_harmless(split: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer removes nothing but whitespace."""
    if split["type"] in _REMOVE_WHERE_TOLD:
        return split["behavior"] != "Removed"
    return split["type"] in _REMOVE_NOTHING | _REMOVE_WHITESPACE


def _unknown_bytes(
    model: models.Model, vocabulary: Mapping[str, int], byte_level: bool
) -> set[int] | None:
    """Bytes of characters that are not in a vocabulary, where these may give no token; None: of a
    model that may make one token of a word of any length.
    """
    if not isinstance(model, models.BPE):
        return None
    if model.continuing_subword_prefix or model.end_of_word_suffix:  # these change the characters
        return None
    if byte_level:
        return {byte for char, byte in _ALPHABET.items() if char not in vocabulary} - _NOT_IN_UTF8
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return set()
    if model.unk_token in vocabulary and not model.fuse_unk:
        return set()
    return {byte for byte in range(256) if byte >= 0x80 or chr(byte) not in vocabulary}


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a tokenizer's part, as JSON objects, in order. None has no steps."""
    waiting = [] if part is None else [json.loads(part.__getstate__())]
    while waiting:
        step = waiting.pop(0)
        for name in ("normalizers", "pretokenizers", "decoders"):
            if name in step:
                waiting = step[name] + waiting
                break
        else:
            yield step
