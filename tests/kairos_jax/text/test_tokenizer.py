import json
from pathlib import Path

import gguf
import pytest
from tokenizers import pre_tokenizers

from kairos_jax.process.hub import DEFAULT_MODEL, PACKAGED_MODELS, cached_path
from kairos_jax.text import gguf_tokenizer
from kairos_jax.text.detokenizer import Detokenizer
from kairos_jax.text.tokenizer import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "smollm2.json"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
HI = [{"role": "user", "content": "hi"}]


def byte_alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write_gguf(path: Path, pre: str = "smollm", kind: str = "gpt2", **fields) -> Path:
    """A vocabulary of three special tokens, one user-defined, the bytes, and a few merges."""
    control, user = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    merges = ["1 2", "12 3", "123 4", "h i", "Ġ hi", "e r"]
    tokens = ["<s>", "</s>", "<end>", "<tool>", *byte_alphabet()]
    tokens += [merge.replace(" ", "") for merge in merges]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([control] * 3 + [user] + [gguf.TokenType.NORMAL] * (len(tokens) - 4))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(2)
    writer.add_chat_template(TEMPLATE)
    if "add_bos" in fields:
        writer.add_add_bos_token(fields["add_bos"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    return load_tokenizer(write_gguf(tmp_path / "tiny.gguf"))


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.backend.encode(text, add_special_tokens=False).tokens


def test_gguf_has_what_the_server_needs(tokenizer):
    assert tokenizer.vocab_size == 4 + 256 + 6
    assert tokenizer.eos_ids == {1, 2}
    assert tokenizer.render_chat(HI) == "<s><user>hi</s>\n<assistant>"
    assert tokenizer.render_chat(HI, add_generation_prompt=False) == "<s><user>hi</s>\n"
    assert tokenizer.encode("<s>hi<tool>") == [0, tokenizer.backend.token_to_id("hi"), 3]
    # Special tokens are skipped, user-defined ones are text.
    assert tokenizer.decode(tokenizer.encode("<s>hi<tool></s>")) == "hi<tool>"


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["1234", "5", "Ġ", "Ġhi", "!", "e", "Ì", "ģ"]),
        ("default", ["1234", "5", "Ġ", "Ġhi", "!", "e", "Ì", "ģ"]),
        ("smollm", ["1", "2", "3", "4", "5", "Ġ", "Ġhi", "!", "e", "Ì", "ģ"]),
        ("llama-bpe", ["123", "4", "5", "Ġ", "Ġhi", "!", "e", "Ì", "ģ"]),
        # NFC joins the accent with its letter.
        ("qwen2", ["1", "2", "3", "4", "5", "Ġ", "Ġhi", "!", "Ã", "©"]),
    ],
)
def test_pre_tokenizers_cut_as_their_models_do(tmp_path, pre, expected):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "tiny.gguf", pre))
    assert pieces(tokenizer, "12345  hi!e\u0301") == expected


@pytest.mark.parametrize(
    ("pre", "add_bos", "ids"),
    [
        ("smollm", None, []),
        ("llama-bpe", None, [0]),
        ("llama-bpe", False, []),
        ("gpt-2", True, [0]),
    ],
)
def test_bos_is_put_in_front_where_the_file_says_so(tmp_path, pre, add_bos, ids):
    fields = {} if add_bos is None else {"add_bos": add_bos}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "tiny.gguf", pre, **fields))
    assert tokenizer.encode("") == ids
    assert tokenizer.encode("", add_special_tokens=False) == []


@pytest.mark.parametrize(
    ("pre", "kind", "message"),
    [("smollm", "llama", "'llama'; only 'gpt2'"), ("tekken", "gpt2", "'tekken'; supported are")],
)
def test_other_gguf_tokenizers_are_refused_by_name(tmp_path, pre, kind, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write_gguf(tmp_path / "tiny.gguf", pre, kind))


FIELDS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())],
    "tokenizer.ggml.merges": [],
    "tokenizer.ggml.token_type": [3, 3, 3],
}


def test_gguf_has_the_tokens_and_templates_that_chats_need():
    fields = FIELDS | {
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ bos_token }}{{ pad_token }}{{ unk_token is defined }}",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "with tools",
    }
    parts = gguf_tokenizer.read(Path("a.gguf"), fields)
    assert parts.eos_ids == {1}
    assert parts.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert parts.templates == {
        "default": fields["tokenizer.chat_template"],
        "tool_use": "with tools",
    }


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("ggml.tokens", None, "must be a list of str, it is missing"),
        ("ggml.tokens", [1], r"must be a list of str, got \[1\]"),
        ("ggml.merges", None, "must be a list of str, it is missing"),
        ("ggml.merges", ["a b"], "can't be used: .*out of vocabulary"),
        ("ggml.token_type", 3, "must be a list of int, got 3"),
        ("chat_template", ["x"], "must be a string, got "),
        ("chat_template.rag", 1, "must be a string, got 1"),
    ],
)
def test_what_is_wrong_with_gguf_fields_is_named(field, value, words):
    with pytest.raises(ValueError, match=rf"^tokenizer\.{field} of a\.gguf {words}"):
        gguf_tokenizer.read(Path("a.gguf"), FIELDS | {f"tokenizer.{field}": value})


@pytest.mark.parametrize("name", ["bos", "eos", "padding", "unknown", "seperator", "mask"])
def test_gguf_ids_outside_the_vocabulary_are_none(name):
    field = f"tokenizer.ggml.{name}_token_id"
    for id in (2**32 - 1, -1, 259, None):
        parts = gguf_tokenizer.read(Path("a.gguf"), FIELDS | {field: id})
        without = {key: value for key, value in FIELDS.items() if key != field}
        assert parts.special_tokens == gguf_tokenizer.read(Path("a.gguf"), without).special_tokens
    with pytest.raises(ValueError, match=rf"a\.gguf: gguf: {field} must be a token id, got '<s>'"):
        gguf_tokenizer.read(Path("a.gguf"), FIELDS | {field: "<s>"})


def test_save_and_load_give_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "out")
    loaded = load_tokenizer(tmp_path / "out")
    text = "<s>12345  hi 🙂<tool></s>"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.eos_ids == tokenizer.eos_ids
    assert loaded.render_chat(HI) == tokenizer.render_chat(HI)


def test_hugging_face_directory_in_its_variants(tokenizer, tmp_path):
    tokenizer.backend.enable_truncation(max_length=2)
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    config = {"eos_token": {"content": "</s>", "special": True}, "chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_ids == {1, 2}
    assert loaded.render_chat(HI) == "yes"
    assert len(loaded.encode("abcdef")) == 6
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path).render_chat(HI) == "from the file"


def test_no_tokenizer_is_said_clearly(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "absent.gguf")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="can't be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "other.gguf").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"other\.gguf: not a GGUF file, or cut short at 2 bytes"):
        load_tokenizer(tmp_path / "other.gguf")


# Against transformers, on the default model where it is in the cache.


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    path = cached_path(PACKAGED_MODELS[DEFAULT_MODEL])
    if not path.exists():
        pytest.skip(f"the default model is not in the cache ({path.name})")
    return load_tokenizer(path)


def test_ids_and_chats_equal_those_of_transformers(smollm2):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for case in golden["tokenizer"]:
        assert smollm2.encode(case["text"]) == case["ids"], case["text"]
        decoded = smollm2.backend.decode(case["ids"], skip_special_tokens=False)
        assert decoded == case["text"]
        detokenizer = Detokenizer(smollm2, ())
        deltas = [detokenizer.push([id]) for id in case["ids"]]
        assert "".join([*deltas, detokenizer.flush()]) == smollm2.decode(case["ids"])
    for case in golden["chats"]:
        text = smollm2.render_chat(case["messages"], case["add_generation_prompt"])
        assert text == case["text"]


def test_default_model_has_a_vocabulary_and_an_end(smollm2):
    assert smollm2.vocab_size == 49152
    ends = ("<|im_end|>", "<|endoftext|>", "<reponame>")
    assert smollm2.eos_ids == {smollm2.backend.token_to_id(text) for text in ends}
