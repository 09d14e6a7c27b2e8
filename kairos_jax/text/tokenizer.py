"""Text to token ids and back, and the chat template; from a Hugging Face directory or a GGUF."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from gguf import TokenType
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from kairos_jax.text.chat_template import compile_template
from kairos_jax.text.vocabulary import Bound, Spelling, bound_of, spelling_of
from models.checkpoint import gguf_file

# From this many ids on, decoding releases the GIL. Below, that costs more than it gives.
_LONG = 256


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with what a server needs around it.

    eos_ids: tokens that end an output. bos_token, eos_token: as the chat template sees them, empty
    if there is none. chat_template: Jinja source, None for a base model.
    """

    backend: tokenizers.Tokenizer
    eos_ids: frozenset[int] = frozenset()
    bos_token: str = ""
    eos_token: str = ""
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`.

        add_special_tokens: puts the BOS token in front where the model was trained so. Turn it off
        for the output of `render_chat`, which has it already.
        """
        # `backend.encode` gives the same ids, but holds the GIL: 1.1 s for 1 MiB of text.
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`: special tokens skipped, bytes that are not UTF-8 shown as U+FFFD."""
        if len(ids) < _LONG:
            return self.backend.decode(list(ids), skip_special_tokens=True)
        (text,) = self.backend.decode_batch([list(ids)], skip_special_tokens=True)
        return text

    @property
    def longest_token_bytes(self) -> int | None:
        """The most UTF-8 bytes of a text that one token stands for; None if there is no limit.

        Some tokenizers drop some characters, which do not count. `least_tokens` leaves them out.
        """
        return self._bound.longest if self._bound else None

    def least_tokens(self, text: str) -> int:
        """Tokens that `text` becomes at least, found without tokenizing; 0 if that is unknown."""
        return self._bound.least_tokens(text) if self._bound else 0

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character.

        A special or an added token stands for its content; an id past the vocabulary for nothing.
        """
        if (added := self._added.get(id)) is not None:
            return added.encode()
        token = self.backend.id_to_token(id)
        return b"" if token is None else self._spelling.bytes_of(token)

    def has_text(self, id: int) -> bool:
        """Whether `decode` makes something of `id`. (Models pad their vocabularies past ours.)"""
        return id not in self._special_ids and self.backend.id_to_token(id) is not None

    def render_chat(
        self, messages: Iterable[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt for a conversation of {"role", "content"} messages.

        Raises:
          ValueError: the model has no chat template, or the template refuses the messages.
        """
        if self._template is None:
            raise ValueError("the model has no chat template; send text or token ids")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the model's chat template refused the messages: {error}") from error

    def save(self, directory: Path) -> None:
        """Writes the files that `load_tokenizer`, and Hugging Face's own loaders, read."""
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        optional = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        config |= {name: token for name, token in optional.items() if token}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        _write_json(directory / "tokenizer_config.json", config)
        _write_json(directory / "generation_config.json", {"eos_token_id": sorted(self.eos_ids)})

    @cached_property
    def _bound(self) -> Bound | None:
        return bound_of(self.backend)

    @cached_property
    def _spelling(self) -> Spelling:
        return spelling_of(self.backend)

    @cached_property
    def _added(self) -> dict[int, str]:
        added = self.backend.get_added_tokens_decoder()
        return {id: token.content for id, token in added.items()}

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset(id for id, token in added.items() if token.special)

    @cached_property
    def _template(self) -> jinja2.Template | None:
        return None if self.chat_template is None else compile_template(self.chat_template)


def load_tokenizer(path: str | Path, gguf_fields: Mapping[str, Any] | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
      path: a .gguf file, or a directory with a tokenizer.json.
      gguf_fields: the file's metadata, where it has been read before.

    Raises:
      FileNotFoundError: there is no tokenizer.
      ValueError: there is one, of a kind that is not supported.
    """
    path = Path(path)
    if path.is_dir():
        return _from_directory(path)
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer: {path} does not exist")
    if path.suffix != ".gguf":
        raise ValueError(f"no tokenizer: {path} is neither a directory nor a .gguf file")
    return _from_gguf(path, gguf_fields or gguf_file.read(path)[0])


def _from_directory(directory: Path) -> Tokenizer:
    file = directory / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(f"no tokenizer: {directory} has no tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # The Rust library raises bare Exception.
        raise ValueError(f"{file} can't be read: {error}") from error
    # Some files ask for truncation or padding, as of training. Serving wants neither.
    backend.no_truncation()
    backend.no_padding()
    config = _read_json(directory / "tokenizer_config.json")
    eos_token = _token_text(config.get("eos_token"))
    ends: list[int | None] = [backend.token_to_id(eos_token)]
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(directory / name).get("eos_token_id")
        ends += ids if isinstance(ids, list) else [ids]
    return Tokenizer(
        backend,
        eos_ids=frozenset(id for id in ends if id is not None),
        bos_token=_token_text(config.get("bos_token")),
        eos_token=eos_token,
        chat_template=_read_template(directory, config),
    )


def _read_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # Several, named: [{"name": "default", "template": ...}, ...].
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


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


def _from_gguf(path: Path, fields: Mapping[str, Any]) -> Tokenizer:
    def get(name: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.{name}", default)

    kind, pre = get("ggml.model"), get("ggml.pre", "default")
    if kind is None:
        raise FileNotFoundError(f"no tokenizer: {path} has no tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model of {path} is {kind!r}; only 'gpt2' is supported")
    if pre not in _PRE_TOKENIZERS:
        supported = sorted(_PRE_TOKENIZERS)
        raise ValueError(f"tokenizer.ggml.pre of {path} is {pre!r}; supported are {supported}")
    tokens, types = get("ggml.tokens"), get("ggml.token_type", [])
    backend = _byte_level_bpe(tokens, types, get("ggml.merges"), pre)

    def token(name: str) -> str:
        id = get(f"ggml.{name}_token_id")
        return "" if id is None else tokens[id]

    bos, eos = token("bos"), token("eos")
    if bos and get("ggml.add_bos_token", pre == "llama-bpe"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    ends = [get(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return Tokenizer(
        backend,
        eos_ids=frozenset(id for id in ends if id is not None),
        bos_token=bos,
        eos_token=eos,
        chat_template=get("chat_template"),
    )


def _byte_level_bpe(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str
) -> tokenizers.Tokenizer:
    vocab = {token: id for id, token in enumerate(tokens)}
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    # Llama 3 has whole words in its vocabulary that its merges do not lead to.
    model = models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe")
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


def _token_text(token: str | Mapping[str, Any] | None) -> str:
    if isinstance(token, Mapping):  # An AddedToken, written out.
        return token["content"]
    return token or ""


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
