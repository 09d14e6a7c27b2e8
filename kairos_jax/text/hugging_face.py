"""A tokenizer's files as Hugging Face lays them out, read and written.

Source: `from_pretrained` in https://github.com/huggingface/transformers,
src/transformers/tokenization_utils_base.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from kairos_jax.text.parts import NAMED_TOKENS, Parts
from models.checkpoint.files import check_regular, is_there, unreadable

_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_GENERATION = "generation_config.json"
_TEMPLATE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"
# Special tokens with names of their own: {"image_token": "<image>"}.
_MORE_TOKENS = ("extra_special_tokens", "model_specific_special_tokens")


def read(directory: Path) -> Parts:
    """Reads a directory with a tokenizer.json.

    Raises:
      FileNotFoundError: there is no tokenizer.json.
      ValueError: a file cannot be read, or a field has a value of a wrong type.
    """
    file = directory / "tokenizer.json"
    if not is_there(file):
        raise FileNotFoundError(f"no tokenizer: {directory} has no tokenizer.json")
    check_regular(file)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # The Rust library raises bare Exception.
        raise ValueError(f"{file} can't be read: {error}") from error
    # Some files ask for truncation or padding, as of training. Serving wants neither.
    backend.no_truncation()
    backend.no_padding()
    config = _read_object(directory / _CONFIG)
    tokens = _special_tokens(directory, config)
    ends = [backend.token_to_id(tokens["eos_token"])] if "eos_token" in tokens else []
    for name in (_GENERATION, "config.json"):
        ends += _ids(directory / name, "eos_token_id")
    eos_ids = frozenset(id for id in ends if id is not None)
    return Parts(backend, eos_ids, tokens, _templates(directory, config))


def write(directory: Path, parts: Parts) -> None:
    """Writes the files that `read`, and Hugging Face's own loaders, read."""
    directory.mkdir(parents=True, exist_ok=True)
    parts.backend.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    more = {}
    for name, token in parts.special_tokens.items():
        (config if name in NAMED_TOKENS else more)[name] = token
    if more:
        config[_MORE_TOKENS[0]] = more
    if list(parts.templates) == ["default"]:
        config["chat_template"] = parts.templates["default"]
    elif parts.templates:
        named = parts.templates.items()
        config["chat_template"] = [{"name": name, "template": each} for name, each in named]
    _write_json(directory / _CONFIG, config)
    _write_json(directory / _GENERATION, {"eos_token_id": sorted(parts.eos_ids)})


def _special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by their names, such as "bos_token"."""
    sources = [(directory / _CONFIG, config)]
    if "added_tokens_decoder" not in config:  # From before 2023: the other file has the last word.
        sources.append((directory / _SPECIAL, _read_object(directory / _SPECIAL)))
    found = {}
    for file, values in sources:
        for name, value in values.items():
            if name in NAMED_TOKENS:
                if value is not None:
                    found[name] = _token(file, name, value)
            elif name.endswith("_token") and _is_token(value):
                found[name] = _token(file, name, value)
        for field in _MORE_TOKENS:
            if isinstance(more := values.get(field), dict):
                found |= {name: _token(file, f"{field}.{name}", more[name]) for name in more}
    return found


def _is_token(value: Any) -> bool:
    content = value.get("content") if isinstance(value, dict) else value
    return isinstance(content, str)


def _token(file: Path, field: str, value: Any) -> str:
    if not _is_token(value):
        raise _wrong(file, field, 'a string or an object with "content"', value)
    return value["content"] if isinstance(value, dict) else value


def _ids(file: Path, field: str) -> list[int]:
    """The token ids of a field: one, a list of them, or none."""
    value = _read_object(file).get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int for id in ids):
        raise _wrong(file, field, "a token id or a list of token ids", value)
    return ids


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name. Files of their own replace those of the config."""
    found = {}
    if is_there(directory / _TEMPLATE):
        found["default"] = _read_text(directory / _TEMPLATE)
    for file in sorted((directory / _MORE_TEMPLATES).glob("*.jinja")):
        found[file.stem] = _read_text(file)
    if found:
        return found
    file, field, value = directory / _CONFIG, "chat_template", config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, list):  # [{"name": "default", "template": ...}, ...]
        return dict(_named(file, f"{field}[{at}]", each) for at, each in enumerate(value))
    named = value if isinstance(value, dict) else {"default": value}
    for source in named.values():
        if not isinstance(source, str):
            raise _wrong(file, field, "a string or a list of named templates", value)
    return dict(named)


def _named(file: Path, field: str, entry: Any) -> tuple[str, str]:
    if not isinstance(entry, dict):
        raise _wrong(file, field, 'an object with "name" and "template"', entry)
    for name in ("name", "template"):
        if not isinstance(entry.get(name), str):
            raise _wrong(file, f"{field}.{name}", "a string", entry.get(name))
    return entry["name"], entry["template"]


def _wrong(file: Path, field: str, expected: str, value: Any) -> ValueError:
    got = json.dumps(value)
    return ValueError(f"{file}: {field} must be {expected}, got {got[:80]}")


def _read_text(file: Path) -> str:
    check_regular(file)
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(file, error) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no file."""
    if not is_there(file):
        return {}
    text = _read_text(file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, got {json.dumps(value)[:80]}")
    return value


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
