"""Text to token ids and back, and chats to text; from a Hugging Face directory or a GGUF file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from kairos_jax.text import gguf_tokenizer, hugging_face
from kairos_jax.text.parts import Parts
from kairos_jax.text.template_process import CLIENTS_SECONDS, TemplateRenderer
from kairos_jax.text.vocabulary import Bound, Spelling, bound_of, spelling_of
from models.checkpoint import gguf_file

# From this many ids on, decoding releases the GIL. Below, that costs more than it gives.
_LONG = 256


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with what a server needs around it.

    Attributes:
      backend: turns text into ids and back.
      eos_ids: tokens that end an output.
      special_tokens: what chat templates find under names such as "bos_token".
      chat_template: Jinja source, None if the model has no default template.
      named_templates: other templates of the model, by name.
      skips_special: whether special tokens have no text.
    """

    backend: tokenizers.Tokenizer
    eos_ids: frozenset[int] = frozenset()
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    named_templates: Mapping[str, str] = field(default_factory=dict)
    skips_special: bool = True

    @cached_property
    def showing_special(self) -> "Tokenizer":
        """The same tokenizer, whose special tokens have their content as text."""
        return replace(self, skips_special=False)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
          add_special_tokens: puts the BOS token in front where the model was trained so. Turn it
            off for the output of `render_chat`, which has it already.
        """
        # `backend.encode` gives the same ids, but holds the GIL: 1.1 s for 1 MiB of text.
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Bytes that are not UTF-8 are shown as U+FFFD."""
        skip = self.skips_special
        if len(ids) < _LONG:
            return self.backend.decode(list(ids), skip_special_tokens=skip)
        (text,) = self.backend.decode_batch([list(ids)], skip_special_tokens=skip)
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
        if self.skips_special and id in self._special_ids:
            return False
        return self.backend.id_to_token(id) is not None

    def render_chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a conversation, as `apply_chat_template` of `transformers` makes it.

        Args:
          messages: {"role", "content", ...} objects, of JSON values.
          add_generation_prompt: ends the prompt where the model's answer begins.
          continue_final_message: ends the prompt with the content of the final message.
          tools: JSON schemas of functions.
          documents: {"title", "text"} objects.
          chat_template: the name of one of the model's templates, or another source.
          template_kwargs: what else the template finds. They win over the arguments of the same
            name and over special tokens.

        Raises:
          ValueError: there is no template, or it cannot render the messages within its limits.
          OSError, RuntimeError: the process that renders templates cannot be started.
        """
        name, source = self._chosen(chat_template, tools)
        variables = {
            "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
            "add_generation_prompt": add_generation_prompt,
            **self.special_tokens,
            **(template_kwargs or {}),
        }
        conversation = [dict(message) for message in messages]
        if not conversation:
            raise ValueError("a chat needs at least 1 message")
        if "messages" in variables:
            raise ValueError("template_kwargs can't hold messages")
        if continue_final_message and variables["add_generation_prompt"]:
            raise ValueError("continue_final_message needs add_generation_prompt to be false")
        own = chat_template is None or self.has_template(chat_template)
        renderer = self._renderer if own else self._clients_renderer
        return renderer.render(name, source, conversation, variables, bool(continue_final_message))

    def has_template(self, name: object) -> bool:
        """Whether this is the name of one of the model's templates."""
        return isinstance(name, str) and name in self._templates

    def _chosen(self, wanted: str | None, tools: object) -> tuple[str, str]:
        """The name, as errors give it, and the source of a chat template. Raises ValueError."""
        known = self._templates
        if wanted is not None and wanted not in known:
            return "the given chat template", wanted
        if not known:
            raise ValueError("the model has no chat template; send text or token ids")
        if wanted is None:
            with_tools = tools is not None and "tool_use" in known
            wanted = "tool_use" if with_tools else "default"
        if wanted not in known:
            names = ", ".join(sorted(known))
            raise ValueError(f"the model has no default chat template; name one of these: {names}")
        name = "the model's chat template"
        return name if wanted == "default" else f"{name} {wanted!r}", known[wanted]

    def save(self, directory: Path) -> None:
        """Writes the files that `load_tokenizer`, and Hugging Face's own loaders, read."""
        parts = Parts(self.backend, self.eos_ids, self.special_tokens, self._templates)
        hugging_face.write(directory, parts)

    @cached_property
    def _templates(self) -> dict[str, str]:
        default = {} if self.chat_template is None else {"default": self.chat_template}
        return default | dict(self.named_templates)

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
    def _renderer(self) -> TemplateRenderer:
        return TemplateRenderer()

    @cached_property
    def _clients_renderer(self) -> TemplateRenderer:
        # Of its own: conversations that the model's template renders never wait for one.
        return TemplateRenderer(CLIENTS_SECONDS, processes=1)


def load_tokenizer(path: str | Path, gguf_fields: Mapping[str, Any] | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
      path: a .gguf file, or a directory with a tokenizer.json.
      gguf_fields: the file's metadata, where it has been read before.

    Raises:
      FileNotFoundError: there is no tokenizer.
      ValueError: there is one, of a kind that is not supported, or with files that are wrong.
    """
    path = Path(path)
    if path.is_dir():
        parts = hugging_face.read(path)
    elif not path.exists():
        raise FileNotFoundError(f"no tokenizer: {path} does not exist")
    elif path.suffix != ".gguf":
        raise ValueError(f"no tokenizer: {path} is neither a directory nor a .gguf file")
    else:
        parts = gguf_tokenizer.read(path, gguf_fields or _fields(path))
    named = dict(parts.templates)
    default = named.pop("default", None)
    tokenizer = Tokenizer(parts.backend, parts.eos_ids, parts.special_tokens, default, named)
    # Reads the whole vocabulary, which takes 0.1 s: better now than at the first request.
    tokenizer.least_tokens("")
    return tokenizer


def _fields(path: Path) -> dict[str, Any]:
    try:
        return gguf_file.read(path)[0]
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
