"""Which tokens of a GGUF file end an output.

The metadata names some of them; most chat models have others, which llama.cpp finds by their text.
The rules and the texts are those of llama.cpp, so that a file ends its outputs in both alike. One
is left out: a file without `eos_token_id` gets none, where llama.cpp takes a fixed id by the
tokenizer's kind, which is a comma in Qwen's vocabulary.

Source: `load` in https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoint.fields import Fields

_TOKENS = "tokenizer.ggml.tokens"
_IDS = ("eos", "eot", "eom")
_TEXTS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>"),
    *("<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "</s>"),
    *("<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<|tool_response>"),
    *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "[e~["),
)
# Of models that fill in the middle of a text: a file may name each by an id; else its text counts.
_FILL_IN = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# A text ends nothing where the vocabulary has all texts of one of these sets.
_NOT_WITH = {
    "<|end|>": (
        {"<|return|>", "<|call|>"},
        {"<|return|>", "<|calls|>"},
        {"<|flush|>", "<|call|>"},
        {"<|flush|>", "<|calls|>"},
    ),
    "</s>": ({"<|tool_response>"},),
}


def named_token(metadata: Mapping[str, Any], name: str) -> int | None:
    """The id that the metadata gives a token, such as "bos". One outside the vocabulary counts as
    not given, as in llama.cpp: some writers put 2**32 - 1 or -1 for none.

    Raises:
        ValueError: the id is of another type.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    id, tokens = metadata.get(key), metadata.get(_TOKENS)
    if id is not None and type(id) is not int:
        raise Fields("gguf", metadata).error(key, "a token id")
    size = len(tokens) if isinstance(tokens, list) and tokens else 2**31
    return id if id is not None and 0 <= id < size else None


def end_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids of the tokens that end an output, each once; the ids in the metadata come first.

    metadata: of a GGUF file, as plain values by key.

    Raises:
        ValueError: an id or the vocabulary is of another type.
    """
    tokens = Fields("gguf", metadata).strings(_TOKENS)
    by_text = {text: id for id, text in enumerate(tokens)}

    def given(name: str) -> list[int]:
        id = named_token(metadata, name)
        return [] if id is None else [id]

    def found(texts: tuple[str, ...]) -> list[int]:
        return [by_text[text] for text in texts if text in by_text]

    ends = [id for name in _IDS for id in given(name)] + found(_TEXTS)
    for name, texts in _FILL_IN.items():
        ends += given(name) or found(texts)[:1]
    for text, sets in _NOT_WITH.items():
        if any(others <= by_text.keys() for others in sets):
            ends = [id for id in ends if id != by_text.get(text)]
    return tuple(dict.fromkeys(ends))
