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


def end_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids of the tokens that end an output, each once; the ids in the metadata come first.

    metadata: of a GGUF file, as plain values by key. An id outside the vocabulary counts as not
    given, as in llama.cpp: some writers put 2**32 - 1 for none.

    Raises:
        ValueError: an id or the vocabulary is of another type.
    """
    fields = Fields("gguf", metadata)
    tokens = fields.strings("tokenizer.ggml.tokens")
    by_text = {text: id for id, text in enumerate(tokens)}

    def given(name: str) -> list[int]:
        key = f"tokenizer.ggml.{name}_token_id"
        id = metadata.get(key)
        if id is not None and type(id) is not int:
            raise fields.error(key, "a token id")
        return [] if id is None or (tokens and not 0 <= id < len(tokens)) else [id]

    def found(texts: tuple[str, ...]) -> list[int]:
        return [by_text[text] for text in texts if text in by_text]

    ends = [id for name in _IDS for id in given(name)] + found(_TEXTS)
    for name, texts in _FILL_IN.items():
        ends += given(name) or found(texts)[:1]
    for text, sets in _NOT_WITH.items():
        if any(others <= by_text.keys() for others in sets):
            ends = [id for id in ends if id != by_text.get(text)]
    return tuple(dict.fromkeys(ends))
