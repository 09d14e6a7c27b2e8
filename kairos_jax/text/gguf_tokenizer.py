"""The tokenizer in a GGUF file's metadata."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from gguf import TokenType
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from kairos_jax.text.parts import Parts
from models.checkpoint.gguf_tokens import end_tokens, named_token

# How text is cut before byte pairs are merged, by the name that GGUF files give it. The patterns
# are those of each model's published tokenizer.json.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "llama-bpe": _split(_WORDS + r"\p{N}{1,3}" + _REST),
    "qwen2": _split(_WORDS + r"\p{N}" + _REST),
}

# What chat templates call a token, and GGUF's name for it. ("seperator" is how GGUF spells it.)
_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",
    "pad_token": "padding",
    "mask_token": "mask",
}
_TEMPLATE = "tokenizer.chat_template"


def read(path: Path, fields: Mapping[str, Any]) -> Parts:
    """Reads the metadata of a file.

    Raises:
      FileNotFoundError: the file has no tokenizer.
      ValueError: its tokenizer is of a kind that is not supported, or a field is missing or wrong.
    """
    if fields.get("tokenizer.ggml.model") is None:
        raise FileNotFoundError(f"no tokenizer: {path} has no tokenizer.ggml.model")
    kind, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model of {path} is {kind!r}; only 'gpt2' is supported")
    if pre not in _PRE_TOKENIZERS:
        supported = sorted(_PRE_TOKENIZERS)
        raise ValueError(f"tokenizer.ggml.pre of {path} is {pre!r}; supported are {supported}")
    texts, merges = _list(path, fields, "tokens", str), _list(path, fields, "merges", str)
    types = _list(path, fields, "token_type", int, needed=False)
    backend = _byte_level_bpe(path, texts, types, merges, pre)
    try:
        ids = {called: named_token(fields, name) for called, name in _TOKENS.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tokens = {called: texts[id] for called, id in ids.items() if id is not None}
    bos = tokens.get("bos_token")
    if bos and fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return Parts(backend, frozenset(end_tokens(fields)), tokens, _templates(path, fields))


def _list(
    path: Path, fields: Mapping[str, Any], name: str, kind: type, needed: bool = True
) -> list[Any]:
    value = fields.get(f"tokenizer.ggml.{name}", None if needed else [])
    if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
        found = "it is missing" if value is None else f"got {value!r:.80}"
        raise ValueError(
            f"tokenizer.ggml.{name} of {path} must be a list of {kind.__name__}, {found}"
        )
    return value


def _templates(path: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name: tokenizer.chat_template.NAME; the default's has no name."""
    found = {}
    for field, value in fields.items():
        if field == _TEMPLATE or field.startswith(_TEMPLATE + "."):
            if not isinstance(value, str):
                raise ValueError(f"{field} of {path} must be a string, got {value!r:.80}")
            found[field.removeprefix(_TEMPLATE).removeprefix(".") or "default"] = value
    return found


def _byte_level_bpe(
    path: Path, tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str
) -> tokenizers.Tokenizer:
    vocab = {token: id for id, token in enumerate(tokens)}
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    try:
        # Llama 3 has whole words in its vocabulary that its merges do not lead to.
        model = models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # The Rust library raises bare Exception.
        raise ValueError(f"tokenizer.ggml.merges of {path} can't be used: {error}") from error
    backend = tokenizers.Tokenizer(model)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    added = {int(TokenType.CONTROL): True, int(TokenType.USER_DEFINED): False}
    backend.add_tokens(
        [
            tokenizers.AddedToken(token, special=added[type], normalized=False)
            for token, type in zip(tokens, types, strict=False)
            if type in added
        ]
    )
    return backend
