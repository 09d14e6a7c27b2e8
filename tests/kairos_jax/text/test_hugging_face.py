"""A tokenizer's files in the variants that models come with, and what is wrong with others."""

import json
import os
import re

import pytest
import tokenizers
import vocabularies
from tokenizers import models

from kairos_jax.text.tokenizer import Tokenizer, load_tokenizer

HI = [{"role": "user", "content": "hi"}]
NAMED = [{"name": "tool_use", "template": "with tools"}, {"name": "default", "template": "of all"}]


@pytest.fixture
def directory(tmp_path):
    """With a tokenizer.json of <unk>, <s>, </s> and <end>, ids 0 to 3, and nothing else."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<end>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def load(directory, **files) -> Tokenizer:
    """files: JSON values by the names of files, without their ending."""
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return load_tokenizer(directory)


def test_a_tokenizer_alone_is_enough(directory):
    tokenizer = load(directory)
    assert (tokenizer.eos_ids, tokenizer.special_tokens) == (frozenset(), {})
    assert (tokenizer.chat_template, tokenizer.named_templates) == (None, {})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"eos_token": "</s>"}}, {2}),
        ({"tokenizer_config": {"eos_token": {"content": "</s>", "special": True}}}, {2}),
        ({"tokenizer_config": {"eos_token": {"__type": "AddedToken", "content": "</s>"}}}, {2}),
        ({"tokenizer_config": {"eos_token": None}}, set()),
        ({"tokenizer_config": {"eos_token": "<of another model>"}}, set()),
        ({"special_tokens_map": {"eos_token": "</s>"}}, {2}),
        ({"generation_config": {"eos_token_id": [2, 3]}, "config": {"eos_token_id": 1}}, {1, 2, 3}),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 2}}, {2}),
        ({"generation_config": {"eos_token_id": 2}, "config": {"eos_token_id": None}}, {2}),
        ({"generation_config": {"bos_token_id": [1]}, "config": {"bos_token_id": [1]}}, set()),
        ({"generation_config": {}, "config": {"eos_token_id": []}}, set()),
    ],
)
def test_ends_are_gathered_from_all_files(directory, files, expected):
    assert load(directory, **files).eos_ids == expected


def test_special_tokens_are_known_by_their_names(directory):
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
        "image_token": "<image>",
        "video_token": {"content": "<video>"},
        "add_bos_token": True,
        "extra_special_tokens": {"eot": "<eot>"},
        "additional_special_tokens": ["<end>"],
        "token": "<no>",
    }
    expected = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}
    expected |= {"video_token": "<video>", "eot": "<eot>"}
    tokenizer = load(directory, tokenizer_config=config)
    assert tokenizer.special_tokens == expected
    tokenizer.save(directory / "saved")
    assert load_tokenizer(directory / "saved").special_tokens == expected
    config["extra_special_tokens"] = ["<end>"]
    assert "eot" not in load(directory, tokenizer_config=config).special_tokens


@pytest.mark.parametrize(("decoder", "expected"), [(False, "<s>"), (True, "<end>")])
def test_the_special_tokens_map_counts_in_old_directories(directory, decoder, expected):
    config = {"bos_token": "<end>"} | ({"added_tokens_decoder": {}} if decoder else {})
    tokenizer = load(directory, tokenizer_config=config, special_tokens_map={"bos_token": "<s>"})
    assert tokenizer.special_tokens == {"bos_token": expected}


@pytest.mark.parametrize(
    ("template", "default", "named"),
    [
        ("of all", "of all", {}),
        ("", "", {}),
        (None, None, {}),
        ([], None, {}),
        (NAMED, "of all", {"tool_use": "with tools"}),
        (NAMED[:1], None, {"tool_use": "with tools"}),
        ({"default": "of all", "rag": "x"}, "of all", {"rag": "x"}),
    ],
)
def test_chat_templates_of_a_config(directory, template, default, named):
    tokenizer = load(directory, tokenizer_config={"chat_template": template})
    assert (tokenizer.chat_template, tokenizer.named_templates) == (default, named)
    tokenizer.save(directory / "saved")
    saved = load_tokenizer(directory / "saved")
    assert (saved.chat_template, saved.named_templates) == (default, named)


def test_chat_templates_in_files_replace_those_of_the_config(directory):
    config = {"chat_template": NAMED}
    (directory / "chat_template.jinja").write_text("é from a file\n", encoding="utf-8")
    tokenizer = load(directory, tokenizer_config=config)
    assert (tokenizer.chat_template, tokenizer.named_templates) == ("é from a file\n", {})
    more = directory / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("of documents")
    (more / "README.md").write_text("not one")
    tokenizer = load(directory)
    assert tokenizer.named_templates == {"rag": "of documents"}
    assert tokenizer.render_chat(HI, chat_template="rag") == "of documents"
    (directory / "chat_template.jinja").unlink()
    assert load(directory).chat_template is None


def test_a_model_whose_template_is_broken_serves_text(directory):
    tokenizer = load(directory, tokenizer_config={"chat_template": "{% if %}"})
    assert tokenizer.encode("<s></s>") == [1, 2]
    with pytest.raises(ValueError, match=r"^the model's chat template can't be compiled: line 1: "):
        tokenizer.render_chat(HI)
    assert tokenizer.render_chat(HI, chat_template="another") == "another"


@pytest.mark.parametrize(
    ("file", "value", "words"),
    [
        ("tokenizer_config", [], "must hold a JSON object, got []"),
        ("generation_config", None, "must hold a JSON object, got null"),
        ("special_tokens_map", "x", 'must hold a JSON object, got "x"'),
        ("tokenizer_config", {"eos_token": 7}, 'eos_token must be a string or an object with "con'),
        ("tokenizer_config", {"bos_token": ["<s>"]}, "bos_token must be a string or an object wit"),
        ("tokenizer_config", {"pad_token": {}}, "pad_token must be a string or an object with"),
        ("special_tokens_map", {"unk_token": {"content": 1}}, "unk_token must be a string or an"),
        (
            "tokenizer_config",
            {"extra_special_tokens": {"eot": 1}},
            "extra_special_tokens.eot must be a string or an object with",
        ),
        ("generation_config", {"eos_token_id": "2"}, "eos_token_id must be a token id or a list"),
        ("config", {"eos_token_id": [2, None]}, "eos_token_id must be a token id or a list of"),
        ("config", {"eos_token_id": True}, "eos_token_id must be a token id or a list of token id"),
        ("tokenizer_config", {"chat_template": 7}, "chat_template must be a string or a list of n"),
        ("tokenizer_config", {"chat_template": {"a": 7}}, "chat_template must be a string or a li"),
        ("tokenizer_config", {"chat_template": ["x"]}, "chat_template[0] must be an object with"),
        (
            "tokenizer_config",
            {"chat_template": [*NAMED, {"name": "x"}]},
            "chat_template[2].template must be a string, got null",
        ),
        ("tokenizer_config", {"chat_template": [{"template": ""}]}, "chat_template[0].name must"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(directory, file, value, words):
    with pytest.raises(ValueError, match=rf"{file}\.json:? {re.escape(words)}"):
        load(directory, **{file: value})


@pytest.mark.parametrize(
    "file", ["tokenizer_config", "generation_config", "config", "special_tokens_map"]
)
def test_files_that_are_not_json_are_named(directory, file):
    for raw, words in (b"{", "is not JSON"), (b"\xff", "is not UTF-8"), (b"[" * 10**6, "is not J"):
        (directory / f"{file}.json").write_bytes(raw)
        with pytest.raises(ValueError, match=rf"{file}\.json {words}"):
            load_tokenizer(directory)


def test_a_template_that_is_not_text_is_named(directory):
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    "file",
    [
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("generation_config.json", "chat_template.jinja", "additional_chat_templates/a.jinja"),
    ],
)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "must be a regular file, but is a FIFO"),
        (os.mkdir, "must be a regular file, but is a directory"),
        (lambda path: path.symlink_to("nowhere"), "no such file"),
    ],
)
def test_what_is_no_file_is_named_and_not_waited_for(directory, file, make, words):
    path = directory / file
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    make(path)
    with pytest.raises(ValueError, match=f"{file}: {words}"):
        load(directory)


def test_what_is_saved_is_loaded_again(tmp_path):
    made = vocabularies.sentencepiece()
    made.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("a ba é") == made.encode("a ba é")
    assert loaded.eos_ids == made.eos_ids
